"""Supervised steps on trajectories: what is imitated is what an engine would have sampled, mistakes only read."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from recipes.answers.gold_responses import GoldResponses
from recipes.files.row_check import check_rows
from recipes.sft import sft
from rollout.config import TurnsConfig
from rollout.turns.environment import Reply
from rollout.turns.episode import Episode
from rollout.types import Prompt
from rsgrpo.cli import compose
from rsgrpo.config.train import SftConfig
from rsgrpo.data.dataset import load_prompts
from rsgrpo.errors import RsgrpoError
from rsgrpo.records.tracking import read_metrics
from tests.material.environments import conversation
from tests.material.learner import make_learner
from tests.rollout.parity import reference_model


def trajectory(pages: list[str]) -> list[dict]:
    return [
        {"turn": "<open>9</open>", "observation": "no page 9", "learn": False},
        {"turn": "<open>1</open>", "observation": "page 1: <image>", "images": [pages[1]]},
        {
            "turn": "<open>2</open>",
            "observation": "<image> and <image>",
            "images": [pages[2], pages[0]],
            "learn": False,
        },
        {"turn": "<answer>7</answer>"},
    ]


@pytest.fixture
def configure(tiny_model_path, tmp_path, page_images):
    def configure(rows: list[dict], *overrides: str) -> SftConfig:
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = [
            "recipe=sft_demo", f"output_dir={tmp_path}", f"model.path={tiny_model_path}", f"data.train={data}",
            "data.val=''", "validation.every=0", "max_response_tokens=64", "batch_size=2", "total_steps=1",
            "learner.num_threads=1", "prompt.template=''", "prompt.file=''", "data.gold=rewards.gold:detect",
            "checkpoint.export=false", "inputs.min_pixels=784", "inputs.max_pixels=12544",
        ]  # fmt: skip
        return compose(SftConfig, "sft", [*settings, *overrides])

    return configure


def row_of(pages: list[str], **columns) -> dict:
    return {"id": "a", "prompt": "<image>what is it?", "image": [pages[0]], "turns": trajectory(pages)} | columns


def prompts_of(config: SftConfig, processor: Any) -> list[Prompt]:
    return list(load_prompts(config.data.train, config.data, config.prompt, processor))


def test_the_row_is_what_an_engine_would_have_sampled_and_mistakes_are_only_read(configure, page_images):
    gold = GoldResponses(configure([row_of(page_images)]))
    processor = gold._processor
    [prompt] = prompts_of(gold.config, processor)
    [group], dropped = gold.groups([prompt])
    [sample] = group.samples
    assert dropped == 0
    turns = trajectory(page_images)

    class Answers:
        def __init__(self):
            self.replies = [Reply(turn["observation"], turn.get("images", ())) for turn in turns[:-1]]

        def step(self, turn):
            return self.replies.pop(0) if self.replies else None

    episode = Episode(Answers(), processor, TurnsConfig(environment="x:Y"))
    for turn in turns:
        ids = processor.encode_response(turn["turn"])
        episode.answer(ids, [0.0] * len(ids))
    ids, _, pixels, _ = conversation(processor, prompt, episode.rollout(0))
    own_ids, is_own, own_pixels, _ = conversation(processor, prompt, sample)
    assert own_ids == ids
    assert all(torch.equal(one, other) for one, other in zip(own_pixels, pixels, strict=True))
    learned = [token for token, own in zip(own_ids, is_own, strict=True) if own]
    assert learned == [*processor.encode_response("<open>1</open>"), *processor.encode_response("<answer>7</answer>")]


def test_the_loss_is_that_of_the_learned_tokens_in_transformers_own_forward(configure, page_images, tiny_model_path):
    gold = GoldResponses(configure([row_of(page_images)]))
    learner = make_learner(tiny_model_path, self_check=True)
    encoder: Any = learner.encoder
    [prompt] = prompts_of(gold.config, learner.encoder)
    groups, _ = gold.groups([prompt])
    ids, is_own, pixels, grids = conversation(learner.encoder, prompt, groups[0].samples[0])
    row = torch.tensor([ids])
    model = reference_model(tiny_model_path)
    with torch.no_grad():
        logits = model(
            input_ids=row, pixel_values=torch.cat(pixels), image_grid_thw=torch.cat(grids), use_cache=False,
            mm_token_type_ids=(row == encoder.image_token_id).long(),
        ).logits[0, :-1]  # fmt: skip
    logits[:, learner.encoder.banned_token_ids] = float("-inf")
    logprobs = torch.log_softmax(logits, -1).gather(1, row[0, 1:, None])[:, 0]
    expected = -logprobs[torch.tensor(is_own[1:])].mean().item()
    assert learner.supervised_loss(groups)["actor/loss"] == pytest.approx(expected, rel=1e-5)
    assert learner.supervised_update(groups)["actor/loss"] == pytest.approx(expected, rel=1e-5)


def test_a_run_learns_trajectories_beside_plain_responses(configure, page_images, tmp_path):
    plain = {"id": "b", "prompt": "what?", "image": [], "answer": "<answer>7</answer>", "evidence": []}
    sft(configure([row_of(page_images, answer=["7"]), plain], "data.gold=rewards.evisrag:read_gold"))
    [row] = [row for row in read_metrics(tmp_path / "sft") if "actor/loss" in row]
    assert row["actor/loss"] == pytest.approx(6.0, abs=0.5)  # ln 400
    assert "data/dropped" not in row


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({1: {"observation": None, "images": []}}, "turn 2 has no observation, but turn 3 follows it"),
        ({1: {"images": []}}, "the observation of turn 2 has 1 <image> marks for 0 images"),
        ({1: {"images": ["nowhere.png"]}}, "nowhere.png does not exist"),
        ({1: {"learn": "no"}}, "'learn' of turn 2 must be true or false, got 'no'"),
        ({3: {"turn": 7}}, "'turn' of turn 4 must be text, got int"),
        ({1: {"learn": False}, 3: {"learn": False}}, "no turn is to be learned"),
        ({3: {"turn": "<|im_start|>"}}, "the response contains the control token"),
        ({0: {"observation": "<|im_end|>"}}, "the observation contains the control token"),
        ({3: {"turn": "so " * 90}}, "max_response_tokens is 64"),
    ],
)
def test_a_trajectory_that_cannot_be_imitated_is_named(changes, why, configure, page_images):
    turns = trajectory(page_images)
    for index, change in changes.items():
        turns[index] = turns[index] | change
    config = configure([row_of(page_images, turns=turns)])
    gold = GoldResponses(config)
    with pytest.raises(RsgrpoError, match="a") as caught:
        gold.check(load_prompts(config.data.train, config.data, config.prompt, gold._processor))
    assert why in str(caught.value)


def test_a_row_longer_than_a_micro_batch_is_named_with_its_parts(configure, page_images):
    gold = GoldResponses(configure([row_of(page_images)], "learner.max_tokens_per_micro_batch=1000"))
    learner = dataclasses.replace(gold.config.learner, max_tokens_per_micro_batch=100)
    gold.config = dataclasses.replace(gold.config, learner=learner)
    prompts: Any = prompts_of(gold.config, gold._processor)
    with pytest.raises(RsgrpoError, match=r"prompt, response and observations have .* = \d+ tokens, .* is 100"):
        gold.check(prompts)


def test_the_row_check_takes_trajectories_and_other_columns_of_that_name_are_left_alone(configure, page_images):
    config = configure([row_of(page_images)])
    report = check_rows(config.data.train, "sft", config.inputs, run=config)
    assert (len(report.good), report.bad) == (1, ())
    config = configure([row_of(page_images, turns=3, answer="7")])
    [prompt] = prompts_of(config, GoldResponses(config)._processor)
    assert prompt.truth["turns"] == 3
