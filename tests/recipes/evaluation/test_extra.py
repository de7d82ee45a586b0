"""Further scores of an evaluation: a protocol, the pages, joint and chain scores, a reward; and what results carry."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from recipes.answers.predictions import Prediction, Predictions
from recipes.answers.questions import Question
from recipes.evaluate import EvaluateConfig, evaluate
from recipes.evaluation.extra import extra_scorers
from recipes.evaluation.scoring import evaluate_predictions
from rsgrpo.errors import ConfigError, InputError

PAGES = ("16%", "no relevant information")


def response(answer: str, first: str = "16%", second: str = "no relevant information") -> str:
    return (
        f"<observe>o</observe><evidence>[1]: {first}\n[2]: {second}</evidence><think>t</think><answer>{answer}</answer>"
    )


def evaluation(texts: dict[str, str], **options):
    questions = [Question(name, "q", ("a.png", "b.png"), "", ("16",), evidence=PAGES) for name in ("a", "b", "c", "d")]
    found = Predictions({name: Prediction(name, text) for name, text in texts.items()})
    return evaluate_predictions(questions, found, num_samples=0, **options).estimates


def test_pages_joint_and_chain_scores():
    texts = {
        "a": response("16"),  # right, for the right reason
        "b": response("16", second="more"),  # right, with a page too many
        "c": response("17"),  # wrong, on the right page
    }  # d has no answer
    found = evaluation(texts, scorers=extra_scorers("anls", {}))
    assert found["pages/em"].value == pytest.approx(2 / 4)
    assert found["pages/precision"].value == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert found["joint/em"].value == pytest.approx(1 / 4)
    assert found["joint/f1"].value == pytest.approx((1 + 2 / 3 + 0 + 0) / 4)
    assert (found["chain/score"].value, found["chain/score"].count) == (0.5, 2)
    assert found["protocol/anls"].value == pytest.approx((1 + 1 + 0.5 + 0) / 4)  # 17 for 16: one half


def scored(protocol: str, rows: list[tuple[Question, str | None]]) -> dict[str, float | None]:
    answers = {question.id: Prediction(question.id, text) for question, text in rows if text is not None}
    found = evaluate_predictions(
        [question for question, _ in rows], Predictions(answers), num_samples=0, scorers=extra_scorers(protocol, {})
    )
    return {name: one.value for name, one in found.estimates.items()}


def test_mmlongbench_has_its_f1_and_reads_an_abstention_as_not_answerable():
    none = {"answer_format": "None"}
    found = scored(
        "mmlongbench",
        [
            (Question("a", "q", answers=("cat",)), "<answer>cat</answer>"),
            (Question("b", "q", answers=("cat",)), "<answer>insufficient to answer</answer>"),
            (Question("c", "q", answers=("Not answerable",), columns=none), "<answer>insufficient to answer</answer>"),
            (Question("d", "q", answers=("Not answerable",), columns=none), "<answer>cat</answer>"),
            (Question("e", "q", answers=("cat",)), None),  # no answer: wrong, and not an abstention
        ],
    )
    assert found["protocol/mmlongbench"] == pytest.approx(2 / 5)
    recall, precision = 1 / 3, 1 / 3  # of a, b, e; of a, d, e
    assert found["protocol/mmlongbench_f1"] == pytest.approx(2 * recall * precision / (recall + precision))


def test_slidevqa_joins_the_answer_in_its_own_normalisation_with_the_pages():
    question = Question("a", "q", ("a.png", "b.png"), answers=("sixteen",), evidence=PAGES)
    found = scored("slidevqa", [(question, response("16")), (dataclasses.replace(question, id="b"), None)])
    assert found["protocol/slidevqa_em"] == found["protocol/slidevqa_joint_em"] == 0.5
    assert found["protocol/slidevqa_joint_f1"] == 0.5
    assert found["joint/em"] == 0.0  # as SQuAD compares


@pytest.mark.parametrize(
    "columns", [{"evidence_pages": [1]}, {"evidence_pages": "[1]"}, {"answer_page_idx": 0}, {"answer_page_idx": "0"}]
)
def test_pages_may_be_named_by_number_as_benchmarks_do(columns):
    found = scored("", [(Question("a", "q", ("a.png", "b.png"), answers=("16",), columns=columns), response("16"))])
    assert found["pages/em"] == found["evidence/slot_f1"] == found["chain/score"] == 1.0


def test_zooms_are_scored_against_gold_boxes():
    columns = {"gold_pages": ["p"], "gold_box": [0, 0, 1, 1]}
    steps = ({"page": "p", "box": [0, 0, 1, 0.9], "at_char": 0}, {"page": "q", "box": [0, 0, 1, 1], "at_char": 0})
    question = Question("a", "q", answers=("16",), columns=columns)
    answers = Predictions({"a": Prediction("a", "16", steps=steps)})
    found = evaluate_predictions([question], answers, num_samples=0, scorers=extra_scorers("", {})).estimates
    assert (found["boxes/precision"].value, found["boxes/recall"].value) == (0.5, 1.0)


def test_rows_without_gold_evidence_have_no_such_scores():
    found = evaluate_predictions(
        [Question("a", "q", answers=("16",))],
        Predictions({"a": Prediction("a", "16")}),
        num_samples=0,
        scorers=extra_scorers("", {}),
    )
    assert not any(name.startswith(("pages/", "joint/", "chain/")) for name in found.estimates)


def test_a_reward_is_a_metric():
    found = evaluation(
        {"a": response("16"), "b": response("17")}, scorers=extra_scorers("", {"acc": "rewards.evisrag:accuracy"})
    )
    assert found["metric/acc"].value == pytest.approx(1 / 4)
    with pytest.raises(InputError, match=r"metrics\.x: no module 'gone'"):
        extra_scorers("", {"x": "gone:f"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """The working folder with one row and two evaluations' predictions, the second of another prompt."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps({"id": "a", "question": "q", "answer": "16", "answer_format": "Int"}))
    for name, template in (("one", "A {question}"), ("two", "B {question}")):
        Path(name).mkdir()
        Path(name, "predictions.jsonl").write_text(json.dumps({"id": "a", "raw": "<answer>16.0</answer>"}))
        settings = {
            "prompt": {"template": template},
            "topk": 0,
            "inputs": {"max_images": 5, "min_pixels": 1},
            "rollout": {},
        }
        Path(name, "settings.json").write_text(json.dumps(settings))
    return tmp_path


def settings(**changes) -> EvaluateConfig:
    return EvaluateConfig(benchmark="rows.jsonl", topk=0, predictions="one/predictions.jsonl", name="out", **changes)


def test_results_carry_the_protocol_and_what_the_answers_depend_on(folder):
    evaluate(settings(protocol="mmlongbench", bootstrap_samples=10))
    found = json.loads(Path("runs/evaluation/out/results.json").read_text())
    assert found["protocol"].startswith("mmlongbench 2 (arXiv 2407.01523")
    assert found["scores"]["protocol"]["mmlongbench"]["value"] == 1.0  # the row's answer_format chose the rule
    assert len(found["prompt_hash"]) == 16
    assert found["pages"] == "at most 5, topk all"
    assert "Further scores" in Path("runs/evaluation/out/results.md").read_text()


def test_a_protocol_says_which_of_its_columns_no_row_has(folder, capsys):
    evaluate(settings(protocol="chartqapro", bootstrap_samples=0))
    said = "".join(capsys.readouterr())
    assert "protocol=chartqapro chooses its rule by the column 'Year', which no row has" in said
    assert "the column 'Question Type'" in said
    evaluate(settings(protocol="mmlongbench", bootstrap_samples=0))  # the row has answer_format
    assert "chooses its rule" not in "".join(capsys.readouterr())


def test_answers_to_different_prompts_do_not_share_a_table(folder):
    with pytest.raises(ConfigError, match=r"were predicted with different settings \(prompt\).*set mixed=true"):
        evaluate(settings(against="two/predictions.jsonl"))
    evaluate(settings(against="two/predictions.jsonl", mixed=True, bootstrap_samples=10, permutations=10))


def test_a_protocol_that_is_not_there_is_answered_with_the_names():
    with pytest.raises(ConfigError, match="did you mean anls"):
        EvaluateConfig(protocol="anl")
