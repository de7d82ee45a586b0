"""The desk demo's pages, questions and expert, and that its trajectories are what the desk answers."""

from __future__ import annotations

import io
from random import Random

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn")

from recipes.demo.desk_make import DeskSettings, write_desk_data
from recipes.demo.desk_pages import BOXES, FIELD, DeskPage, render, thumbnail
from recipes.demo.desk_rows import PERFECT, DeskJob, Expert
from recipes.demo.forms import Scans
from recipes.retrieval.desk.environment import Desk
from rewards import desk as rewards
from rewards.api import Response, Span, Turn
from rollout.files import read_jsonl
from rollout.inputs.images import decode
from rollout.types import Prompt
from rsgrpo.records.console import Console

SETTINGS = DeskSettings(sft_items=120, train_items=10, val_items=40, vision_steps=1)


@pytest.fixture(scope="module")
def job():
    return DeskJob(0)


@pytest.fixture(scope="module")
def data(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("desk")
    write_desk_data(SETTINGS, job, folder, Console(io.StringIO()))
    return folder


def rows(data, name):
    return [row for _, row in read_jsonl(data / f"{name}.jsonl")]


def test_a_trajectory_is_what_the_desk_answers_to_its_turns(data):
    for row in [*rows(data, "sft"), *rows(data, "val")]:
        desk = Desk(Prompt(row["id"], row["prompt"], truth=row), folder=str(data), box_scale=100)
        for turn in row["turns"][:-1]:
            reply = desk.step(turn["turn"])
            assert reply is not None
            assert (reply.text, reply.fault) == (turn["observation"], "")
            written = [str(data / name) for name in turn["images"]]
            assert all(
                decode(one).tobytes() == decode(two).tobytes() for one, two in zip(written, reply.images, strict=True)
            )
        assert desk.step(row["turns"][-1]["turn"]) is None


def test_held_out_trajectories_are_right_and_earn_every_reward(data):
    for row in rows(data, "val"):
        desk = Desk(Prompt(row["id"], row["prompt"], truth=row), folder=str(data), box_scale=100)
        text, turns = "", []
        for turn in row["turns"]:
            reply = desk.step(turn["turn"])
            facts = reply.facts if reply else {}
            turns.append(Turn(Span(len(text), len(text) + len(turn["turn"])), facts=facts))
            text += turn["turn"] + "\n"
        response = Response(text.rstrip(), {**row, "answers": [row["answer"]]}, turns=tuple(turns))
        assert (rewards.answer_f1(response), rewards.gold_opened(response)) == (1.0, 1.0)
        assert rewards.region_overlap(response) == (pytest.approx(1.0) if "gold_box" in row else None)
        strays = sum(not turn.get("learn", True) for turn in row["turns"])
        assert rewards.calls(response) == (2.0 if "gold_box" in row else 1.0) + strays


def test_training_rows_hold_gold_and_no_trajectory(data):
    for row in rows(data, "train"):
        assert "turns" not in row
        assert len(row["image"]) == len(row["pages"]) == row["prompt"].count("<image>")
        assert set(row["gold_pages"]) <= set(row["pages"])


@pytest.mark.parametrize("names", ["number", "colour"])
def test_questions_name_one_of_their_pages(names):
    job, rng = DeskJob(0, names), Random(3)
    for _ in range(200):
        item = job.draw("train", rng)
        pages = [job.pages["train"][page] for page in item.pages]
        assert len({page.colour for page in pages}) == len(pages)
        name = f"page {item.asked + 1}" if names == "number" else f"the {pages[item.asked].colour} page"
        assert f" {name}?" in item.question


def test_an_expert_without_errors_opens_zooms_where_it_must_and_answers(job):
    plain = DeskPage("red", "plain", 1, 7, 0, 7)
    small = DeskPage("blue", "top", 2, 5, 2, 5)
    item = job.draw("train", Random(0))
    item = type(item)((0, 1), 1, "amount of the blue page?")
    learnt = {
        tuple(text for text, learn in PERFECT.turns(item, [plain, small], Random(seed)) if learn) for seed in range(40)
    }
    assert learnt == {("<open>2</open>", "<zoom>2 90 0 100 20</zoom>", "<answer>5</answer>")}
    strays = {
        text for seed in range(40) for text, learn in PERFECT.turns(item, [plain, small], Random(seed)) if not learn
    }
    assert strays == {"<open>1</open>", "<zoom>2 90 80 100 100</zoom>"}


@pytest.mark.parametrize(
    ("expert", "share"), [(Expert(0.5, 0.0, 0.0), 0.55), (Expert(0.0, 0.5, 0.0), 0.55), (PERFECT, 1.0)]
)
def test_the_expert_errs_as_often_as_its_settings_say(job, expert, share):
    rng, items = Random(1), [job.draw("train", Random(seed)) for seed in range(600)]
    right = 0
    for item in items:
        pages = [job.pages["train"][page] for page in item.pages]
        *_, (answer, _) = expert.turns(item, pages, rng)
        right += answer == f"<answer>{pages[item.asked].amount}</answer>"
    assert right / len(items) == pytest.approx(share, abs=0.06)


def test_no_scan_is_in_both_splits(job):
    train, val = (
        {scan for page in job.pages[split] for scan in (page.code_scan, page.amount_scan)} for split in job.pages
    )
    assert not train & val


def test_a_small_amount_lies_in_its_box_and_nowhere_else():
    scans = Scans()
    for kind, (left, top, right, bottom) in BOXES.items():
        page = np.asarray(render(scans, DeskPage("gray", kind, 1, 7, 0, 7)), int)
        field = page[:, FIELD:].copy()
        ink = np.argwhere(field.max(-1) > field.min()) / (FIELD, FIELD)
        columns = 0.5 + ink[:, 1] / 2
        assert columns.min() * 100 >= left
        assert ink[:, 0].min() * 100 >= top
        assert ink[:, 0].max() * 100 <= bottom
        assert columns.max() * 100 <= right


def test_a_thumbnail_shows_the_colour_of_the_paper():
    scans = Scans()
    red = thumbnail(render(scans, DeskPage("red", "plain", 1, 7, 0, 7)))
    assert isinstance(red, Image.Image)
    assert red.size == (2, 2)
    pixels = np.asarray(red, int).reshape(-1, 3)
    assert (pixels[:, 0] > pixels[:, 1] + 60).all()
