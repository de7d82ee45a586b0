"""Several evaluations in one table, which refuses numbers that were made differently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.answers.predictions import Prediction, Predictions
from recipes.answers.questions import Question
from recipes.evaluate import EvaluateConfig, evaluate
from recipes.evaluation import table
from recipes.evaluation.extra import extra_scorers
from recipes.evaluation.scoring import compare_evaluations, evaluate_predictions


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """The working folder with the evaluations of two models by one protocol, and of the first by another."""
    monkeypatch.chdir(tmp_path)
    rows = [{"id": str(n), "question": "q", "answer": "16"} for n in range(2)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, answers in (("one", ("16", "16")), ("two", ("16", "cat"))):
        Path(f"{name}.jsonl").write_text(
            "".join(json.dumps({"id": str(n), "raw": answers[n]}) + "\n" for n in range(2))
        )
        for protocol in ("anls", "relaxed"):
            evaluate(
                EvaluateConfig(
                    benchmark="rows.jsonl", topk=0, predictions=f"{name}.jsonl", name=f"{name}-{protocol}",
                    protocol=protocol, bootstrap_samples=0,
                )
            )  # fmt: skip
    return tmp_path


def test_evaluations_that_were_made_alike_share_a_table(folder, capsys):
    assert table.main(["runs/evaluation/one-anls", "runs/evaluation/two-anls/results.json"]) == 0
    out = capsys.readouterr().out
    assert "- protocol: anls 2 (arXiv 1907.00490" in out
    assert "- num questions: 2" in out
    assert "| evaluation | strict/global/em | strict/global/f1 | protocol/anls |" in out
    assert "| one-anls | 100.0 | 100.0 | 100.0 |" in out
    assert "| two-anls | 50.0 | 50.0 | 50.0 |" in out


def test_two_protocols_refuse_one_table_unless_told(folder, capsys):
    both = ["runs/evaluation/one-anls", "runs/evaluation/one-relaxed"]
    assert table.main(both) == 2
    said = capsys.readouterr().err
    assert "were made differently" in said
    assert "protocol: one-anls: anls 2 (" in said
    assert "set --mixed" in said
    assert table.main([*both, "--mixed", "--scores", "protocol/anls,strict/global/em"]) == 0
    assert "| evaluation | protocol | protocol/anls | strict/global/em |" in capsys.readouterr().out
    assert table.main([*both, "--mixed", "--scores", "gone"]) == 2
    assert "no evaluation has the score gone; they have paper/global/em" in capsys.readouterr().err


def test_other_questions_are_another_benchmark_whatever_the_file_is_called(folder, capsys):
    Path("rows.jsonl").write_text(Path("rows.jsonl").read_text().replace("16", "17"))
    config = EvaluateConfig(benchmark="rows.jsonl", topk=0, predictions="one.jsonl", name="changed", protocol="anls")
    evaluate(config)
    assert table.main(["runs/evaluation/one-anls", "runs/evaluation/changed"]) == 2
    assert "question_hash: one-anls: " in capsys.readouterr().err


def test_what_is_no_evaluation_is_named(folder, capsys):
    assert table.main(["runs"]) == 2
    assert "runs has no results.json: name a folder that recipes.evaluate wrote" in capsys.readouterr().err
    Path("results.json").write_text("{}")
    assert table.main(["results.json"]) == 2
    assert "results.json has no scores" in capsys.readouterr().err


def test_a_comparison_has_the_difference_of_the_protocols_score_too():
    questions = [Question(str(n), "q", answers=("16",)) for n in range(8)]
    first, second = (
        evaluate_predictions(
            questions,
            Predictions({one.id: Prediction(one.id, text) for one in questions}),
            num_samples=0,
            scorers=extra_scorers("anls", {}),
        )
        for text in ("16", "17")
    )
    found = compare_evaluations(first, second, num_samples=10, num_permutations=500)
    assert found["protocol/anls"].value == 0.5
    assert found["protocol/anls"].p_value is not None
    assert found["protocol/anls"].p_value < 0.05
    assert "evidence/slot_precision" not in found
