"""Evaluations: finding benchmarks, predicting and resuming, scoring files, and what the pages show."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recipes.evaluate import EvaluateConfig, evaluate, folder_name, spell_out
from recipes.evaluation.benchmarks import BENCHMARKS, find_benchmark, load_benchmark
from rsgrpo import cli
from rsgrpo.errors import ConfigError, RsgrpoError
from rsgrpo.records.secrets import MASK
from tests.material import ROOT
from tests.material.answering import response

NOTHING = "no relevant information"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Folder that keeps one benchmark in EVisRAG-Test's layout: four questions about three pages each."""
    folder = tmp_path / "data/EVisRAG-Test-SlideVQA"
    (folder / "images").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (84, 56), (80 * number, 0, 0)).save(folder / f"images/{number}.png")
    images = [f"images/{number}.png" for number in range(3)]
    rows = [
        {"qid": "q0", "query": "what share?", "image": images, "answer": ["16%", "16 percent"], "is_sufficient": True},
        {"qid": "q1", "query": "<b>who</b>?", "image": images, "answer": ["Astrid Lindgren"], "is_sufficient": True},
        {"qid": "q2", "query": "when?", "image": images, "answer": ["2020"], "is_sufficient": False},
        {"qid": "q3", "query": "where?", "image": images, "answer": ["Lund"], "is_sufficient": True},
    ]
    for row in rows[:2]:
        row["evidence"] = ["Sweden 16%", NOTHING, NOTHING]
    (folder / "top3_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def released_file(path: Path, **texts: str) -> str:
    """A prediction file as the released code writes them: the gold answers are in it too."""
    rows = [{"qid": qid, "pred": text, "answer": ["gold"]} for qid, text in texts.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(data: Path, **more: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {
        "benchmark": "SlideVQA", "benchmark_dir": str(data), "output_dir": str(data.parent / "out"), "name": "e",
        "bootstrap_samples": 50, "permutations": 200,
    }  # fmt: skip
    return EvaluateConfig(**(settings | more))


def results(data: Path) -> dict[str, Any]:
    return json.loads((data.parent / "out/e/results.json").read_text())


# Benchmarks


def test_a_benchmark_is_found_by_name_folder_and_file(data, tmp_path):
    folder = data / "EVisRAG-Test-SlideVQA"
    for name in ("SlideVQA", "slidevqa", "EVisRAG-Test-SlideVQA", str(folder), str(folder / "top3_test.jsonl")):
        assert find_benchmark(name, str(data), 3) == folder / "top3_test.jsonl"
    for name in BENCHMARKS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "top1_test.jsonl").write_text("")
        assert find_benchmark(name, str(tmp_path), 1) == tmp_path / name / "top1_test.jsonl"


@pytest.mark.parametrize(
    ("name", "topk", "complaint"),
    [
        ("", 3, "benchmark is empty. Set it to one of ChartQA, InfoVQA"),
        ("SlidVQA", 3, "did you mean SlideVQA"),
        ("SlideVQA", 5, r"has no top5_test.jsonl; it has top3_test.jsonl"),
        ("SlideVQA", 0, "topk must be >= 1"),
        ("DocVQA", 3, r"openbmb/EVisRAG-Test-DocVQA is not on this machine[\s\S]*benchmark_dir"),
        ("none/of/this.jsonl", 3, "neither an existing file or folder"),
        ("desk/data/val.jsonl", 0, r"benchmark=desk/data/val\.jsonl: there is no .* Run `make desk-demo` once"),
    ],
)
def test_a_benchmark_that_is_not_there_says_what_is(data, name, topk, complaint):
    with pytest.raises(ConfigError, match=complaint):
        find_benchmark(name, str(data), topk)


def test_rows_of_the_test_layout_are_read_without_surplus_pages(data, caplog):
    questions = load_benchmark("SlideVQA", folder=str(data), topk=3)
    assert [(question.id, question.is_sufficient) for question in questions] == [
        ("q0", True), ("q1", True), ("q2", False), ("q3", True),
    ]  # fmt: skip
    assert questions[0].answers == ("16%", "16 percent")
    assert questions[0].images[2] == str(data / "EVisRAG-Test-SlideVQA/images/2.png")
    first = load_benchmark(str(data / "EVisRAG-Test-SlideVQA/top3_test.jsonl"), folder="", topk=2)[0]
    assert (len(first.images), first.evidence) == (2, ("Sweden 16%", NOTHING))
    assert "4 of 4 questions have more than topk=2 pages" in caplog.text


def test_repeated_ids_and_rows_without_gold_are_refused(data):
    path = data / "EVisRAG-Test-SlideVQA/top3_test.jsonl"
    path.write_text(path.read_text() * 2)
    with pytest.raises(RsgrpoError, match="4 ids occur more than once, such as 'q0'"):
        load_benchmark("SlideVQA", folder=str(data), topk=3)
    path.write_text('{"qid": 1, "query": "q"}\n')
    with pytest.raises(RsgrpoError, match=r"line 1 of top3_test.jsonl: no gold answer"):
        load_benchmark("SlideVQA", folder=str(data), topk=3)


# Scoring a file


def test_a_file_of_the_released_code_is_scored(data, tmp_path):
    file = released_file(tmp_path / "p.jsonl", q0=response("16%"), q1="Lindgren", q2=response("insufficient to answer"))
    evaluate(config_of(data, predictions=file))
    found = results(data)
    scores = found["scores"]["paper"]
    assert scores["global"]["em"]["value"] == pytest.approx(2 / 4)
    assert scores["sufficient"]["em"]["value"] == pytest.approx(1 / 3)
    assert scores["insufficient"]["em"]["value"] == 1.0
    assert scores["global"]["em"]["low"] <= 0.5 <= scores["global"]["em"]["high"]
    assert found["scores"]["abstention"]["precision"]["value"] == 1.0
    assert (found["num_questions"], found["num_missing"], found["num_unknown"]) == (4, 1, 0)
    assert found["worst"] == ["q1"]


def test_two_files_are_compared_and_the_lost_cases_come_first(data, tmp_path):
    mine = released_file(tmp_path / "mine.jsonl", q0=response("blue"), q1=response("nobody"), q3=response("Lund"))
    other = released_file(
        tmp_path / "other.jsonl", q0=response("blue"), q1=response("Astrid Lindgren"), q3=response("Lund")
    )
    evaluate(config_of(data, predictions=mine, against=other))
    found = results(data)
    assert found["differences"]["strict/global/em"]["value"] == pytest.approx(-1 / 4)
    assert 0 < found["differences"]["strict/global/em"]["p_value"] <= 1
    assert found["worst"] == ["q1", "q0"]
    assert "Astrid Lindgren" in (data.parent / "out/e/report.html").read_text()
    assert "Against the other file" in (data.parent / "out/e/results.md").read_text()


@pytest.mark.parametrize(("limit", "worst"), [(10, ["q1", "q0"]), (1, ["q1"])])
def test_the_worst_cases_are_answered_wrong_ones_in_order(data, tmp_path, limit, worst):
    file = released_file(tmp_path / "p.jsonl", q0=response("16 and more"), q1=response("x"), q3=response("Lund"))
    evaluate(config_of(data, predictions=file, worst_cases=limit))
    assert results(data)["worst"] == worst


def test_the_page_shows_cases_beside_their_pages_and_nothing_runs(data, tmp_path):
    hostile = response("<script>alert(1)</script>", NOTHING, "<img src=x onerror=alert(1)>", NOTHING)
    evaluate(config_of(data, predictions=released_file(tmp_path / "p.jsonl", q1=hostile)))
    page = (data.parent / "out/e/report.html").read_text()
    shown = ("&lt;script&gt;alert(1)", "&lt;b&gt;who&lt;/b&gt;?", "missed", "unfounded claim", "correctly left out")
    assert [text for text in shown if text not in page] == []
    assert [text for text in ("<script", "<img src=x") if text in page] == []
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    (data / "EVisRAG-Test-SlideVQA/images/0.png").write_bytes(b"broken")
    evaluate(config_of(data, predictions=released_file(tmp_path / "p.jsonl", q1=response("x"))))
    assert "0.png cannot be read" in (data.parent / "out/e/report.html").read_text()


def test_the_markdown_is_whole(data, tmp_path):
    evaluate(config_of(data, predictions=released_file(tmp_path / "p.jsonl", q0=response("16%", "Sweden 16%"))))
    text = (data.parent / "out/e/results.md").read_text()
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")
    assert "| sufficient | 3 | 33.3 (" in text
    assert "| pages in the evidence block | 100.0 (" in text
    assert "| without an answer | 3 |" in text


# Predicting


def fake(data: Path, model: str, **more: Any) -> EvaluateConfig:
    settings = ["benchmark=SlideVQA", f"model.path={model}", "rollout=fake", "inputs.min_pixels=784"]
    composed = cli.compose(EvaluateConfig, "evaluate", [*settings, "inputs.max_pixels=3136"])
    return dataclasses.replace(
        composed, benchmark_dir=str(data), output_dir=str(data.parent / "out"), name="e", bootstrap_samples=20, **more
    )


def test_an_evaluation_predicts_scores_and_resumes(data, tiny_model_path):
    config = fake(data, tiny_model_path, max_questions=2)
    evaluate(config)
    out = data.parent / "out/e"
    assert results(data)["scores"]["strict"]["sufficient"]["em"]["value"] == 1.0  # the fake engine says the gold
    assert results(data)["scores"]["evidence"]["slot_f1"]["value"] == 1.0
    lines = (out / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 2
    evaluate(dataclasses.replace(config, max_questions=0))
    more = (out / "predictions.jsonl").read_text().splitlines()
    assert more[:2] == lines
    assert len(more) == 4
    with pytest.raises(ConfigError, match=r"made with other settings \(seed=7, was 0\)"):
        evaluate(dataclasses.replace(config, seed=7))
    with pytest.raises(ConfigError, match="made with other settings"):
        evaluate(dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, template="{images}{question}?")))


def test_no_file_of_an_evaluation_holds_a_secret_of_its_settings(data, tiny_model_path):
    config = fake(data, tiny_model_path, max_questions=1)
    arguments = {"api_key": "sk-s3cr3t", "url": "http://me:pw-s3cr3t@host/v1"}
    turns = dataclasses.replace(
        config.rollout.turns, environment="tests.material.environments:Keyed", arguments=arguments
    )
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, turns=turns), harness_files=True)
    evaluate(config)
    evaluate(config)  # what is masked still counts as the same settings
    out = data.parent / "out/e"
    kept = json.loads((out / "settings.json").read_text())["rollout"]["turns"]["arguments"]
    assert kept == {"api_key": MASK, "url": f"http://{MASK}@host/v1"}
    assert [file.name for file in out.iterdir() if b"s3cr3t" in file.read_bytes()] == []


def test_a_prompt_that_cannot_be_sampled_counts_as_missing(data, tiny_model_path):
    (data / "EVisRAG-Test-SlideVQA/images/0.png").write_bytes(b"broken")
    evaluate(fake(data, tiny_model_path))
    assert (results(data)["num_missing"], results(data)["num_failed"]) == (4, 4)


def test_settings_that_led_to_no_prediction_may_change(data, tiny_model_path):
    config = fake(data, tiny_model_path)
    gone = dataclasses.replace(config, model=dataclasses.replace(config.model, path="no/such/model/folder"))
    with pytest.raises(ConfigError, match="no such file or folder"):
        evaluate(gone)
    evaluate(config)
    assert results(data)["num_missing"] == 0


def test_missing_pages_stop_a_prediction_before_it_starts(data):
    (data / "EVisRAG-Test-SlideVQA/images/0.png").unlink()
    with pytest.raises(RsgrpoError, match=r"1 of 3 pages are missing:\n  .*0.png\nUnpack"):
        evaluate(config_of(data, prompt=dataclasses.replace(EvaluateConfig().prompt, template="{images}{question}")))


# The configuration


@pytest.mark.parametrize("recipe", cli.groups(EvaluateConfig, "evaluate")["recipe"])
def test_every_evaluation_recipe_composes(recipe):
    config = cli.compose(EvaluateConfig, "evaluate", [f"recipe={recipe}"])
    assert config.rollout.temperature == (
        1 if recipe in ("evisrag_mini", "desk_demo") else 0
    )  # it asks how the policy samples
    assert folder_name(config)


def test_the_groups_of_training_can_be_chosen():
    assert set(cli.groups(EvaluateConfig, "evaluate")) == {"recipe", "model", "prompt", "rollout"}
    overrides = ["benchmark=ChartQA", "model=qwen2_5_vl_3b", "prompt=contrastive", "rollout=vllm", "topk=1"]
    config = cli.compose(EvaluateConfig, "evaluate", overrides)
    assert config.model.path == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert config.rollout.engine == "vllm"
    assert "Similarities" in config.prompt.template
    assert folder_name(config) == "ChartQA-Qwen2.5-VL-3B-Instruct-top1"
    text = cli.help_text(EvaluateConfig, "evaluate")
    assert "prompt=direct rollout=vllm" in text
    assert "learner." not in text.replace("colocated learner.", "")


def test_a_model_folder_can_be_given_like_an_option():
    given = ["model=runs/a/export", "model=demo", "model=demonstration", "seed=1"]
    assert spell_out(given) == ["model.path=runs/a/export", "model=demo", "model.path=demonstration", "seed=1"]


def test_the_folder_is_named_after_benchmark_model_and_sweep():
    config = EvaluateConfig(benchmark="data/my rows.jsonl", topk=0, name="-seed=2")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path="runs/first/export"))
    assert folder_name(config) == "my_rows-first-topall-seed=2"
    assert folder_name(dataclasses.replace(config, name="mine")) == "mine"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"topk": -1}, "topk must be >= 0"),
        ({"permutations": 0}, "permutations must be >= 1"),
        ({"name": "a/b"}, "name must be letters"),
    ],
)
def test_impossible_settings_are_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        EvaluateConfig(**settings)


def config_classes(schema: type) -> set[type]:
    inner = [hint for hint in typing.get_type_hints(schema).values() if dataclasses.is_dataclass(hint)]
    return {schema}.union(*(config_classes(typing.cast(type, hint)) for hint in inner))


def test_every_key_is_read_and_documented():
    read = {
        node.attr
        for room in ("recipes", "rollout", "rsgrpo")
        for path in (ROOT / room).rglob("*.py")
        if path.name != "config.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    text = (ROOT / "docs/reference/evaluation.md").read_text() + (ROOT / "docs/reference/inference.md").read_text()
    for schema in config_classes(EvaluateConfig):
        names = [item.name for item in dataclasses.fields(schema)]
        assert [name for name in names if name not in read] == []
        if schema.__module__.startswith("recipes."):
            leaves = set(names) - {"inputs", "endpoint", "extractor", "model", "prompt", "rollout"}
            assert {name for name in leaves if f"{name}`" not in text} == set()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recipes.evaluate", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_scores_a_file_and_explains_mistakes(data, tmp_path):
    file = released_file(tmp_path / "p.jsonl", q0=response("16%"))
    common = ["benchmark=SlideVQA", f"benchmark_dir={data}", f"output_dir={tmp_path}/out", f"predictions={file}"]
    result = run(*common)
    assert result.returncode == 0, result.stderr
    assert "# SlideVQA: p" in result.stdout
    assert (tmp_path / "out/SlideVQA-p-top3/report.html").is_file()
    wrong = run(*common, "tpok=2")
    assert wrong.returncode == 2
    assert "did you mean topk?" in wrong.stderr


def test_scoring_needs_no_torch():
    program = "import sys, recipes.evaluate, recipes.infer, recipes.answers.parsing; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout == "False\n", result.stderr
