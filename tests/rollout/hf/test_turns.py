"""Conversations in the embedded engine: what was sampled is what transformers says of the whole conversation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rollout.config import ConfigError, InputsConfig, RolloutConfig, TurnsConfig
from rollout.hf.engine import HFEngine
from rollout.types import Prompt, SamplingParams
from tests.material.environments import Queue
from tests.material.tiny_families import save_family
from tests.rollout.parity import assert_conversations, assert_heard, reference_model

INPUTS = InputsConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
HOME = "tests.material.environments"


def build(path, name="Pages", *, pages=(), stop=("e", "a", "1"), rollout=None, **limits):
    arguments = {"pages": list(pages), "stop": list(stop)} if name == "Pages" else {}
    turns = TurnsConfig(environment=f"{HOME}:{name}", arguments=arguments, **limits)
    return HFEngine(path, replace(rollout or RolloutConfig(), turns=turns), INPUTS)


@pytest.fixture(scope="module")
def prompts(page_images):
    return [
        Prompt("none", "what amount is on page 2?"),
        Prompt("one", "<image>what is the code?", (page_images[1],)),
        Prompt("two", "<image><image>what amount is on page 2? answer in one word", tuple(page_images[:2])),
    ]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_every_sampled_token_has_the_probability_that_transformers_gives_it(
    family, tiny_model_path, tmp_path, page_images, prompts
):
    path = tiny_model_path if family == "qwen2_5_vl" else save_family(family, tiny_model_path, tmp_path)
    engine, model = build(path, pages=page_images), reference_model(path)
    sampling = SamplingParams(group_size=6, temperature=0.8, max_tokens=60, seed=3)
    groups = list(engine.generate(prompts, sampling))
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    read = [len(o.images) for rollout in rollouts for o in rollout.observations]
    turns = {len(rollout.observations) for rollout in rollouts}
    assert max(turns) == 3 > min(turns)
    assert set(read) >= {0, 1, 2, 3}
    for group in groups:
        assert_conversations(model, engine, group, 0.8)


def test_text_spans_and_observations_fit_together(tiny_model_path, page_images, prompts):
    engine = build(tiny_model_path, pages=page_images)
    (group,) = engine.generate(prompts[1:2], SamplingParams(group_size=8, max_tokens=80, seed=1))
    for rollout in group.rollouts:
        for observation in rollout.observations:
            assert rollout.text[observation.at_char :].startswith("\n") or observation.at == len(rollout.token_ids_T)
            before = rollout.token_spans_T[: observation.at]
            assert max(end for _, end in before) >= observation.at_char
            assert all(start >= observation.at_char for start, _ in rollout.token_spans_T[observation.at :])
        assert len(rollout.token_ids_T) == len(rollout.logprobs_T) == len(rollout.token_spans_T) <= 80


def test_a_batch_changes_nothing_and_the_same_seed_gives_the_same_conversations(tiny_model_path, page_images, prompts):
    engine = build(tiny_model_path, pages=page_images)
    sampling = SamplingParams(group_size=3, max_tokens=50, seed=5)
    together = {group.prompt.id: group for group in engine.generate(prompts, sampling)}
    for prompt in prompts:
        (alone,) = engine.generate([prompt], sampling)
        assert [r.token_ids_T for r in alone.rollouts] == [r.token_ids_T for r in together[prompt.id].rollouts]
        assert [r.observations for r in alone.rollouts] == [r.observations for r in together[prompt.id].rollouts]


def test_whatever_an_environment_does_the_policy_is_told_and_it_is_counted(tiny_model_path, prompts):
    engine = build(tiny_model_path, "Faulty", max_turns=9)
    (group,) = engine.generate(prompts[:1], SamplingParams(group_size=1, max_tokens=400))
    (rollout,) = group.rollouts
    faults = [observation.fault for observation in rollout.observations]
    assert faults == ["exception", "exception", "unreadable", "unreadable", "limit", "limit", ""]
    texts = [observation.text for observation in rollout.observations]
    assert "no such page" in texts[0]
    assert "must return a Reply" in texts[1]
    assert "the result has 99 images, but 8 are left" in texts[4]
    assert "tokens, but" in texts[5]
    assert rollout.finish_reason == "stop"
    assert rollout.observations[-1].facts == {"done": True}
    assert all(engine.processor.eos_token_id in o.token_ids_S for o in rollout.observations[:-1])


def test_an_answer_that_never_comes_costs_its_time_limit(tiny_model_path, prompts):
    engine = build(tiny_model_path, "Slow", max_turns=4, timeout_s=0.2)
    (group,) = engine.generate(prompts[:1], SamplingParams(group_size=2, max_tokens=200))
    for rollout in group.rollouts:
        assert [o.fault for o in rollout.observations] == ["", "timeout", "timeout", "timeout"]
        assert rollout.finish_reason == "turns"


def test_a_prompt_that_the_environment_refuses_costs_no_other(tiny_model_path, prompts):
    groups = {g.prompt.id: g for g in build(tiny_model_path, "Refuses").generate(prompts, SamplingParams(max_tokens=4))}
    assert groups["two"].error == "the environment cannot begin: KeyError: 'two'"
    assert groups["one"].error is None
    assert groups["one"].rollouts[0].finish_reason == "length"


def test_an_environment_that_does_not_exist_is_refused_before_anything_is_sampled(tiny_model_path):
    with pytest.raises(ConfigError, match="module:Class"):
        build(tiny_model_path, "")
    with pytest.raises(ConfigError, match="cannot be loaded: AttributeError"):
        build(tiny_model_path, "Nothing")
    with pytest.raises(ConfigError, match="is not an environment"):
        build(tiny_model_path, "Reply")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5"])
def test_others_go_on_while_an_answer_is_awaited_and_the_order_of_answers_changes_nothing(
    family, tiny_model_path, tmp_path, prompts
):
    path = tiny_model_path if family == "qwen2_5_vl" else save_family(family, tiny_model_path, tmp_path)
    engine, model = build(path, "Queue", patience_s=0.0, timeout_s=300.0), reference_model(path)
    sampling, said = SamplingParams(group_size=2, max_tokens=40, seed=1), []
    for order in [(), ("one", "two"), ("two", "one"), ("none", "two", "one")]:
        Queue.begin(order, {prompt.id: 2 for prompt in prompts})
        groups = {group.prompt.id: group for group in engine.generate(prompts, sampling)}
        rollouts = [rollout for prompt in prompts for rollout in groups[prompt.id].rollouts]
        assert {o.fault for rollout in rollouts for o in rollout.observations} == {""}, "an answer waited for another"
        assert {(len(rollout.observations), rollout.finish_reason) for rollout in rollouts} == {(2, "stop")}
        said.append([rollout.token_ids_T for rollout in rollouts])
        for group in groups.values():
            assert_conversations(model, engine, group, 1.0)
    assert said[1:] == said[:1] * 3


def test_a_conversation_is_heard_while_it_goes_on(tiny_model_path, page_images):
    assert_heard(build(tiny_model_path, pages=page_images), Prompt("one", "<image>the code?", (page_images[1],)))
