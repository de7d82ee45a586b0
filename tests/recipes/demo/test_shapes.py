"""The demo's level easy_vqa: its pages and questions, what is asked, and that training loads its rows."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("easy_vqa")

import easy_vqa

from recipes import prepare
from recipes.demo.items import Item, Split, response_text, teacher_reading, true_reading
from recipes.demo.shapes import COLORS, SHAPES, ShapeJob, answer_to, shape_pool
from rewards import evisrag
from rewards.api import Response
from rollout.config import InputsConfig
from rollout.inputs.processor import InputProcessor
from rsgrpo.config.train import DataConfig, PromptConfig
from rsgrpo.data.dataset import load_prompts

SMALL = ["--sft-items", "40", "--train-items", "30", "--val-items", "20", "--vision-steps", "1"]
JOB = ShapeJob()
ITEM = Item(
    pages=(3, 5),
    shown=(("teal", "circle"), ("red", "triangle")),
    question="page 2: is there not a red shape?",
    relevant=(1,),
    answer=lambda shown: answer_to("is there not a red shape?", *shown[0]),
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shapes") / "demo"
    assert prepare.main(["demo", "--level", "easy_vqa", "--out", str(out), *SMALL]) == 0
    return out


def read(demo: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (demo / f"data/{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_question_of_the_package_is_understood(split: Split):
    rows = easy_vqa.get_train_questions() if split == "train" else easy_vqa.get_test_questions()
    files = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    shown = {page.file: (page.color, page.shape) for page in shape_pool(split)}
    compared = 0
    for text, answer, image in zip(*rows, strict=True):
        if files[image] in shown:
            assert answer_to(text, *shown[files[image]]) == answer, (text, image)
            compared += 1
    assert compared > {"train": 25_000, "val": 6_000}[split]


def test_a_right_response_worked_by_hand():
    assert response_text(JOB, ITEM, true_reading(ITEM)) == (
        "<observe>teal circle, red triangle</observe>\n<evidence>\n[1]: no relevant information\n[2]: red triangle\n"
        "</evidence>\n<think>page 2 has it</think>\n<answer>no</answer>"
    )


def test_a_teacher_without_noise_is_right_and_one_with_noise_answers_what_they_read():
    assert teacher_reading(JOB, ITEM, 0.0, Random(0)) == true_reading(ITEM)
    readings = [teacher_reading(JOB, ITEM, 1.0, Random(seed)) for seed in range(400)]
    responses = [response_text(JOB, ITEM, reading) for reading in readings]
    for response in responses:
        slot = response.partition("[2]: ")[2].partition("\n")[0]
        if slot != "no relevant information":
            assert ("red" in slot.split()) == ("<answer>no<" in response)
    assert 0.05 < sum("<answer>insufficient" in response for response in responses) / 400 < 0.35  # 0.6 / 3


def test_pages_for_training_and_validation_never_overlap(demo):
    used = {name: {path for row in read(demo, name) for path in row["image"]} for name in ("sft", "train", "val")}
    assert not (used["sft"] | used["train"]) & used["val"]
    package = Path(easy_vqa.__file__).parent / "data"
    for split, folder, names in (("train", "train", ("sft", "train")), ("val", "test", ("val",))):
        theirs = {path.read_bytes() for path in (package / folder / "images").glob("*.png")}
        for path in set().union(*(used[name] for name in names)):
            assert path.startswith(f"images/{split}-")
            assert (demo / "data" / path).read_bytes() in theirs


def test_rows_load_through_the_check_of_training_and_gold_scores_the_maximum(demo):
    inputs = InputsConfig(min_pixels=784, max_pixels=50176, max_images=4, max_prompt_tokens=256)
    processor = InputProcessor(str(demo / "model"), inputs)
    abstained = 0
    for name in ("sft", "train", "val"):
        dataset = load_prompts(str(demo / f"data/{name}.jsonl"), DataConfig(), PromptConfig(), processor)
        assert dataset.dropped == {}
        assert len(dataset) == {"sft": 40, "train": 30, "val": 20}[name]
        for prompt in dataset:
            tokens = len(processor.tokenizer.encode(prompt.truth["gold"]))
            assert tokens < 128
            gold = Response(prompt.truth["gold"], prompt.truth, num_tokens=tokens)
            if name == "val":
                assert (evisrag.accuracy(gold), evisrag.well_formed(gold), evisrag.evidence(gold)) == (1, 1, 1)
            abstained += prompt.truth["answers"] == ["insufficient to answer"]
            assert 2 <= len(prompt.images) <= 4
    assert abstained


def test_the_words_of_questions_and_answers_are_few_tokens(tmp_path):
    from recipes.demo.model import train_tokenizer

    rng = Random(0)
    items = [JOB.draw("train", rng) for _ in range(500)]
    texts = [response_text(JOB, item, true_reading(item)) for item in items]
    tokenizer = train_tokenizer(texts)
    for word in (*COLORS, *SHAPES):
        assert len(tokenizer.encode(f" {word}")) <= 2, word
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts[:50])
