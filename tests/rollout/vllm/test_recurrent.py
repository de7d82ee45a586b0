"""The real vLLM on a model with recurrent layers: it samples from, and is updated to, the weights of transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from rollout.build import build_engine
from rollout.config import ConfigError
from rollout.types import Prompt, SamplingParams
from rollout.vllm.peers import local_peer
from rollout.vllm.weights_out import build_sender
from tests.material.tiny_families import save_family
from tests.rollout.parity import INPUTS, ROLLOUT, reference_logprobs, reference_model

BFLOAT16 = replace(ROLLOUT, dtype="bfloat16")


@pytest.fixture(scope="module")
def path(tiny_model_path, tmp_path_factory) -> str:
    return save_family("qwen3_5", tiny_model_path, tmp_path_factory.mktemp("tiny-qwen3_5"))


def test_another_dtype_is_refused_with_the_one_that_runs(path):
    with pytest.raises(ConfigError, match=r"rollout\.dtype=float32, .* Set rollout\.dtype=bfloat16 or "):
        build_engine(path, replace(ROLLOUT, dtype="float32"), INPUTS)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_vllm_samples_right_before_and_after_new_weights(family, path, tiny_model_path, tmp_path, page_images):
    path = path if family == "qwen3_5" else save_family(family, tiny_model_path, tmp_path)
    prompts = [
        Prompt("two", "page 1 shows a code 4 <image> and <image> what amount?", tuple(page_images[:2])),
        Prompt("none", "page 1 shows a code 4 and an amount 7 insufficient to answer?"),
    ]
    engine = build_engine(path, BFLOAT16, INPUTS)
    sender = build_sender([local_peer(engine)], backend=engine.backend, dtype=torch.bfloat16, timeout_s=60)
    try:
        start, moved = reference_model(path), reference_model(path, seed=1, scale=0.1)
        assert_follows(engine, start, prompts, not_like=moved)
        sender.send(moved.named_parameters(), 1)
        assert_follows(engine, moved, prompts, not_like=start)
    finally:
        sender.close()
        engine.close()


def assert_follows(engine, model, prompts, *, not_like) -> None:
    """The log-probabilities are as near to float32 as bfloat16 is, in which a token may also take another expert."""
    for group in engine.generate(prompts, SamplingParams(group_size=2, max_tokens=12)):
        assert group.error is None
        for rollout in group.rollouts:
            sampled_T = torch.tensor(rollout.logprobs_T)
            near, far = (
                (sampled_T - reference_logprobs(each, engine.processor, group.prompt, rollout.token_ids_T)).abs().mean()
                for each in (model, not_like)
            )
            assert near < 0.1
            assert near < 0.2 * far
