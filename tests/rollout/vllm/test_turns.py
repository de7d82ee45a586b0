"""Conversations in the real vLLM: what was sampled is what transformers says of the whole conversation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from rollout.config import InputsConfig, TurnsConfig
from rollout.types import Prompt, SamplingParams
from rollout.vllm.launch import max_model_len
from tests.material.environments import Pages, Slow
from tests.rollout.parity import ROLLOUT, assert_conversations, assert_heard, reference_model


@pytest.fixture
def talking(alive, page_images, monkeypatch):
    """An engine with an environment; its limits of images and length were set for single turns."""
    limits = TurnsConfig(environment="any:thing", max_observation_tokens=250, max_images=2, timeout_s=0.5)
    monkeypatch.setattr(alive, "_rollout", replace(ROLLOUT, turns=limits))
    monkeypatch.setattr(alive, "_make_environment", partial(Pages, pages=page_images, stop=("e", "a", "1"), most=4))
    return alive


def test_every_sampled_token_has_the_probability_that_transformers_gives_it(talking, attentive_model_path, page_images):
    model = reference_model(attentive_model_path)
    prompts = [Prompt("none", "what amount is on page 2?"), Prompt("one", "<image>the code?", (page_images[1],))]
    groups = list(talking.generate(prompts, SamplingParams(group_size=6, temperature=0.8, max_tokens=48, seed=3)))
    assert [group.error for group in groups] == [None, None]
    observations = [o for group in groups for rollout in group.rollouts for o in rollout.observations]
    assert {len(o.images) for o in observations} >= {0, 1, 2}
    assert {o.fault for o in observations} >= {"", "limit"}
    for group in groups:
        assert len({rollout.token_ids_T for rollout in group.rollouts}) > 1
        assert_conversations(model, talking, group, 0.8)


def test_an_answer_that_never_comes_costs_its_time_limit_and_no_other_rollout(talking, monkeypatch):
    monkeypatch.setattr(talking, "_make_environment", Slow)
    prompts = [Prompt("slow", "what amount is on page 2?")]
    (group,) = talking.generate(prompts, SamplingParams(group_size=2, max_tokens=48))
    assert group.error is None
    assert {o.fault for rollout in group.rollouts for o in rollout.observations} == {"", "timeout"}


def test_images_of_observations_become_one_placeholder_each(alive, page_images):
    processor = alive.processor
    inputs = processor.encode_observation("a <image> b <image>", page_images[:2], has_ended=True)
    ids = processor.collapsed(inputs)
    assert ids == processor.token_ids(processor.template.observation("a <image> b <image>", 2, has_ended=True))
    assert len(ids) < len(inputs.token_ids_T)


def test_an_engine_is_made_for_what_an_environment_may_add():
    turns = TurnsConfig(environment="any:thing", max_observation_tokens=100, max_images=4)
    inputs = InputsConfig(max_prompt_tokens=50)
    assert max_model_len(replace(ROLLOUT, turns=turns), inputs) == 50 + ROLLOUT.max_response_tokens + 100
    assert max_model_len(ROLLOUT, inputs) == 50 + ROLLOUT.max_response_tokens
    assert replace(ROLLOUT, turns=turns).max_observation_images == 4


def test_a_conversation_is_heard_while_it_goes_on(talking, page_images):
    assert_heard(talking, Prompt("one", "<image>the code?", (page_images[1],)))
