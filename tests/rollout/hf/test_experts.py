"""Experts that the embedded engine records are those that transformers takes on the whole row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rollout.config import ConfigError, InputsConfig, RolloutConfig, TurnsConfig
from rollout.hf.engine import HFEngine
from rollout.types import Prompt, SamplingParams
from tests.material.environments import conversation
from tests.material.tiny_families import save_family
from tests.rollout.parity import experts_taken, reference_model

INPUTS = InputsConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
ROLLOUT = RolloutConfig(routing_replay=True, num_threads=1, max_batch_sequences=5)


@pytest.fixture(scope="module")
def prompts(page_images):
    return [
        Prompt("none", "what amount is on page 2?"),
        Prompt("two", "<image><image>what amount is on page 2? answer in one word", tuple(page_images[:2])),
    ]


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_every_token_but_the_last_comes_with_its_experts(family, tiny_model_path, tmp_path, prompts):
    path = save_family(family, tiny_model_path, tmp_path)
    engine, model = HFEngine(path, ROLLOUT, INPUTS), reference_model(path)
    sampling = SamplingParams(group_size=6, max_tokens=12, seed=1)
    (probe,) = engine.generate(prompts[:1], sampling)
    engine.processor.eos_token_id = probe.rollouts[0].token_ids_T[4]  # a response that ends before its siblings
    groups = list(engine.generate(prompts, sampling))
    assert len({len(rollout.token_ids_T) for group in groups for rollout in group.rollouts}) > 1
    for group in groups:
        for rollout in group.rollouts:
            assert_recorded(engine, model, group, rollout)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_and_so_does_what_a_conversation_reads(family, tiny_model_path, tmp_path, page_images, prompts):
    path = save_family(family, tiny_model_path, tmp_path)
    arguments = {"pages": list(page_images), "stop": ["e", "a", "1"]}
    turns = TurnsConfig(environment="tests.material.environments:Pages", arguments=arguments)
    engine, model = HFEngine(path, replace(ROLLOUT, turns=turns), INPUTS), reference_model(path)
    groups = list(engine.generate(prompts, SamplingParams(group_size=5, max_tokens=40, seed=3)))
    assert max(len(rollout.observations) for group in groups for rollout in group.rollouts) > 1
    for group in groups:
        for rollout in group.rollouts:
            assert_recorded(engine, model, group, rollout)


def assert_recorded(engine, model, group, rollout) -> None:
    ids, _, pixels, grids = conversation(engine.processor, group.prompt, rollout)
    row = torch.tensor([ids])
    images = {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)} if pixels else {}
    taken = experts_taken(
        model, {"input_ids": row, "mm_token_type_ids": (row == engine.processor.image_token_id).long(), **images}
    )
    assert (group.prompt_experts_TLk.dtype, rollout.experts_RLk.dtype) == (np.uint8, np.uint8)
    np.testing.assert_array_equal(group.prompt_experts_TLk, taken[: group.num_prompt_tokens])
    np.testing.assert_array_equal(rollout.experts_RLk, taken[group.num_prompt_tokens : len(ids) - 1])


def test_a_model_without_experts_is_refused(tiny_model_path):
    with pytest.raises(ConfigError, match=r"rollout\.routing_replay: qwen2_5_vl has no experts\. Set it to false"):
        HFEngine(tiny_model_path, ROLLOUT, INPUTS)
    with pytest.raises(ConfigError, match="needs an engine that runs a model"):
        RolloutConfig(engine="fake", routing_replay=True)


def test_nothing_is_recorded_unless_asked_for(tiny_model_path, tmp_path, prompts):
    path = save_family("qwen3_vl_moe", tiny_model_path, tmp_path)
    engine = HFEngine(path, replace(ROLLOUT, routing_replay=False), INPUTS)
    for group in engine.generate(prompts, SamplingParams(max_tokens=4)):
        assert group.prompt_experts_TLk is None
        assert group.rollouts[0].experts_RLk is None
