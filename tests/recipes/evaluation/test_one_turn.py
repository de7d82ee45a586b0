"""Trajectories beside policies of one turn that see as many image tokens."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from recipes.answers.predictions import Prediction
from recipes.answers.questions import Question
from recipes.evaluate import EvaluateConfig, evaluate
from recipes.evaluation.one_turn import baselines, fitted
from recipes.retrieval.desk.shelf import store_shelf
from rollout.config import TurnsConfig
from rollout.inputs.images import decode
from rsgrpo import cli
from rsgrpo.errors import ConfigError, InputError
from tests.material.retrieval import ingested, write_pdf

HERE = "tests.recipes.evaluation.test_one_turn"


def png(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def area(image):
    """One token per 100 pixels."""
    width, height = decode(image).size
    return -(-width * height // 100)


class Shelf:
    """Two pages at once, of 8 and 2 tokens, with thumbnails of one."""

    def __init__(self, prompt):
        pass

    def step(self, turn):
        return None

    def at_once(self, question, most):
        return [("a", png(10, 10), png(40, 20)), ("b", png(10, 10), png(20, 10))][:most]


class Silent:
    """Answers nothing, and has no pages to give."""

    def __init__(self, prompt):
        pass

    def step(self, turn):
        return None


def test_a_page_is_shrunk_to_its_budget_and_left_out_where_nothing_is_left():
    page = png(40, 20)
    assert fitted(page, 8, area) == page
    smaller = fitted(page, 3, area)
    assert smaller is not None
    assert 1 <= area(smaller) <= 3
    assert fitted(page, 0, area) is None
    with pytest.raises(InputError, match=r"nowhere\.png"):
        fitted("nowhere.png", 3, area)


def test_baselines_are_asked_over_what_fits_into_the_images_of_the_trajectory():
    questions = [Question(name, "how much?", columns={"gold_pages": ["a"]}) for name in ("all", "one", "blind", "lost")]
    seen = {"all": 10, "one": 5, "blind": 0}
    found = {name: Prediction(name, "x", steps=(), num_tokens={"image": count}) for name, count in seen.items()}
    made = baselines(questions, found, TurnsConfig(f"{HERE}:Shelf"), area)
    assert [len(question.images) for question in made["thumbnails"]] == [2, 2, 0, 2]
    assert [question.columns["given_pages"] for question in made["pages"]] == [["a", "b"], ["a"], [], ["a"]]
    for question, budget in zip(made["pages"], (10, 5, 0, 5), strict=True):  # the last one's is the mean
        assert sum(map(area, question.images)) <= budget
    with pytest.raises(InputError, match=r"test_one_turn:Silent cannot give its pages in one prompt"):
        baselines(questions, found, TurnsConfig(f"{HERE}:Silent"), area)
    with pytest.raises(InputError, match="do not say how many tokens images took"):
        baselines(questions, {}, TurnsConfig(f"{HERE}:Shelf"), area)


def test_one_command_scores_trajectories_beside_one_turn_over_a_store(tmp_path, tiny_model_path):
    (tmp_path / "docs").mkdir()
    write_pdf(tmp_path / "docs" / "report.pdf", ["the tax rate is 16 percent", "rivers", "a list of harbours"])
    ingested(tmp_path / "store", tmp_path / "docs")
    gold = store_shelf(str(tmp_path / "store"), "", "words", 1).search("tax")[0].page_id
    rows = [{"id": name, "question": "tax rate?", "answer": ["16"], "gold_pages": [gold]} for name in ("q0", "q1")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    script = ["<search>tax</search>", "<open>1</open>", "<answer>16</answer>"]
    lines = [{"id": "q0", "responses": [script]}, {"id": "q1", "responses": [["<answer>7</answer>"]]}]
    (tmp_path / "script.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    one_turn = [line | {"responses": [line["responses"][0][-1]]} for line in lines]
    (tmp_path / "one_turn.jsonl").write_text("".join(json.dumps(line) + "\n" for line in one_turn))
    overrides = [
        f"benchmark={tmp_path}/rows.jsonl", f"model.path={tiny_model_path}", "rollout=fake", "topk=0", "name=e",
        f"rollout.turns.arguments={{store: '{tmp_path}/store', k: 2}}", f"output_dir={tmp_path}/out", "prompt=desk",
        "bootstrap_samples=20", "permutations=20", "inputs.min_pixels=784", "inputs.max_pixels=50176",
    ]  # fmt: skip
    desk = "rollout.turns.environment=recipes.retrieval.desk.environment:Desk"
    with pytest.raises(ConfigError, match=r"Set rollout\.turns\.environment as well"):
        cli.compose(EvaluateConfig, "evaluate", [*overrides, "baselines=true"])
    evaluate(cli.compose(EvaluateConfig, "evaluate", [*overrides, desk, f"rollout.script={tmp_path}/script.jsonl"]))
    # the script of whole trajectories is no script of single turns: what is predicted is kept
    again = [*overrides, desk, f"rollout.script={tmp_path}/one_turn.jsonl", "baselines=true"]
    evaluate(cli.compose(EvaluateConfig, "evaluate", again))
    results = json.loads((tmp_path / "out/e/results.json").read_text())
    policies = {name: policy["scores"] for name, policy in results["policies"].items()}
    assert list(policies) == ["trajectories", "one turn, thumbnails", "one turn, pages"]
    images = [scores["tokens/image"]["value"] for scores in policies.values()]
    assert 0 < images[1] <= images[0]
    assert 0 < images[2] <= images[0]
    assert [scores["read/recall"]["value"] for scores in policies.values()] == [0.5, 0.0, 0.5]
    assert policies["trajectories"]["steps/turns"]["value"] == 2.0
    assert [scores["strict/global/f1"]["value"] for scores in policies.values()] == [0.5, 0.5, 0.5]
    assert results["policies"]["one turn, pages"]["gain_of_trajectories"]["strict/global/f1"]["value"] == 0
    table = (tmp_path / "out/e/results.md").read_text().partition("## Trajectories beside one turn")[2]
    header, _, *rows_shown = [line for line in table.splitlines() if line.startswith("|")][:5]
    assert "image tokens | tokens processed" in header
    assert "one turn, pages" in rows_shown[2]
    assert header.count("|") == rows_shown[0].count("|") == rows_shown[2].count("|")
    asked = (tmp_path / "out/e/one_turn_pages/predictions.jsonl").read_text().splitlines()
    assert len({json.loads(line)["prompt_hash"] for line in asked}) == 2  # one with a page, one without
