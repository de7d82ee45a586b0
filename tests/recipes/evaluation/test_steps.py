"""Trajectories in evaluations: what was called and opened, and rewards that read turns."""

from __future__ import annotations

import json
from typing import Any

from PIL import Image

from recipes.answers.predictions import Prediction, load_predictions
from recipes.answers.questions import Question
from recipes.evaluate import EvaluateConfig, evaluate
from recipes.evaluation.extra import turns_of
from recipes.evaluation.scoring import score_item
from rewards.api import Span
from rsgrpo import cli


def test_turns_are_cut_where_the_environment_answered():
    steps = ({"at_char": 5, "call": "open", "page": "a", "fault": "", "text": "[1]"}, {"at_char": 9, "fault": "limit"})
    one, two, last = turns_of(Prediction("q", "first\nsec\nthird", steps=steps))
    assert [turn.span for turn in (one, two, last)] == [Span(0, 5), Span(6, 9), Span(10, 15)]
    assert (one.facts["page"], one.observation, two.fault, last.fault) == ("a", "[1]", "limit", "")
    assert turns_of(Prediction("q", "text")) == ()


def test_a_call_is_not_scored_as_an_answer():
    steps = ({"at_char": 14, "call": "open", "fault": ""},)
    question = Question("q", "how much?", answers=("7",))
    unfinished = score_item(question, Prediction("q", "<open>7</open>", "turns", steps=steps))
    assert unfinished.predicted["strict"] == ""
    assert unfinished.parsed is not None
    assert unfinished.parsed.errors == ("no <answer> block", "the answer is empty")
    bare = score_item(question, Prediction("q", "<open>1</open>\n7", "stop", steps=steps))
    assert bare.answer["strict"].em == 1.0


def test_an_evaluation_asks_the_desk_and_scores_the_steps(tmp_path, tiny_model_path):
    for name in ("a", "b"):
        Image.new("RGB", (56, 28)).save(tmp_path / f"{name}.png")
    row = {"question": "how much?", "image": ["a.png", "b.png"], "pages": ["a.png", "b.png"], "answer": ["7"]}
    rows = [row | {"id": name, "gold_pages": ["b.png"]} for name in ("q0", "q1")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    scripts = {
        "q0": ["<open>2</open>", "<answer>7</answer>"],
        "q1": ["<open>9</open>", "<open>1</open>", "<answer>7</answer>"],
    }
    lines = [{"id": name, "responses": [script]} for name, script in scripts.items()]
    (tmp_path / "script.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = cli.compose(
        EvaluateConfig,
        "evaluate",
        [
            f"benchmark={tmp_path}/rows.jsonl", f"model.path={tiny_model_path}", "rollout=fake", "topk=0", "name=e",
            f"rollout.script={tmp_path}/script.jsonl", f"rollout.turns.arguments.folder={tmp_path}",
            "rollout.turns.environment=recipes.retrieval.desk.environment:Desk", f"output_dir={tmp_path}/out",
            "bootstrap_samples=0", "inputs.min_pixels=784", "inputs.max_pixels=3136",
            "+metrics.found=rewards.desk:gold_opened",
        ],
    )  # fmt: skip
    evaluate(config)
    found = load_predictions(tmp_path / "out/e/predictions.jsonl").by_id
    assert [step["call"] for step in found["q1"].steps or ()] == ["open", "open"]
    scores = json.loads((tmp_path / "out/e/results.json").read_text())["scores"]
    steps = {name: score["value"] for name, score in scores["steps"].items()}
    assert steps == {"turns": 2.5, "calls": 1.5, "faults": 0.5, "images": 1.0, "opened": 1.0}
    assert {name: score["value"] for name, score in scores["read"].items()} == {"recall": 0.5, "precision": 0.5}
    predicted: list[Any] = [
        json.loads(line) for line in (tmp_path / "out/e/predictions.jsonl").read_text().splitlines()
    ]
    assert [line["num_image_tokens"] for line in predicted] == [
        6,
        6,
    ]  # of three images
    tokens = {name: score["value"] for name, score in scores["tokens"].items()}
    assert tokens["image"] == 6
    for kind, keys in (("model", ["response"]), ("processed", ["prompt", "response", "observation"])):
        assert tokens[kind] == sum(line[f"num_{key}_tokens"] for line in predicted for key in keys) / 2
    assert scores["metric"]["found"]["value"] == 0.5
    assert "At the page desk" in (tmp_path / "out/e/results.md").read_text()
