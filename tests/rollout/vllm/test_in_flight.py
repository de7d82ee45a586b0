"""Weights that change while vLLM samples: responses go on under the new ones, and know where they began."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from rollout.build import build_engine
from rollout.types import Prompt, RolloutGroup, SamplingParams
from tests.rollout.parity import INPUTS, ROLLOUT, reference_logprobs, reference_model

NUM_TOKENS = 600


@pytest.fixture(scope="module")
def engine(attentive_model_path):
    vllm = dataclasses.replace(ROLLOUT.vllm, in_flight=True)
    rollout = dataclasses.replace(ROLLOUT, max_response_tokens=NUM_TOKENS, vllm=vllm)
    engine = build_engine(attentive_model_path, rollout, INPUTS, name="engine in flight")
    yield engine
    engine.close()


def test_each_token_is_sampled_from_the_weights_that_its_response_names(engine, attentive_model_path, page_images):
    models = {0: reference_model(attentive_model_path), 1: reference_model(attentive_model_path, seed=1)}
    models[1].model.visual.load_state_dict(models[0].model.visual.state_dict())
    prompts = [
        Prompt("two", "<image> and <image> what amount is on page 2?", tuple(page_images[:2])),
        Prompt("none", "insufficient to answer?"),
    ]
    groups: list[RolloutGroup] = []
    sampling = SamplingParams(group_size=4, max_tokens=NUM_TOKENS, seed=3)
    thread = threading.Thread(target=lambda: groups.extend(engine.generate(prompts, sampling)))
    thread.start()
    num_tokens = 0.0
    while num_tokens < 8 and thread.is_alive():
        num_tokens += engine.stats()["generated_tokens"]
        time.sleep(0.001)
    engine.load_weights((n, tensor) for n, tensor in models[1].named_parameters() if ".visual." not in n)
    engine.finish_weights(1)
    thread.join(60)
    assert {group.prompt.id for group in groups} == {"two", "none"}
    mixed = [rollout for group in groups for rollout in group.rollouts if rollout.version_ends]
    assert mixed, "no response was running while the weights changed"
    for group in groups:
        for rollout in group.rollouts:
            ends = rollout.version_ends or ((rollout.weights_version, len(rollout.token_ids_T)),)
            assert ends[-1][1] == len(rollout.token_ids_T)
            assert rollout.weights_version == ends[0][0]
            start = 0
            for version, end in ends:
                expected = reference_logprobs(models[version], engine.processor, group.prompt, rollout.token_ids_T)
                found = torch.tensor(rollout.logprobs_T)
                torch.testing.assert_close(found[start:end], expected[start:end], atol=1e-4, rtol=0)
                start = end
    [after] = engine.generate(prompts[1:], dataclasses.replace(sampling, group_size=1, max_tokens=4))
    assert (after.rollouts[0].weights_version, after.rollouts[0].version_ends) == (1, ())
