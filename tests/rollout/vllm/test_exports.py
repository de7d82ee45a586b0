"""What a learner exports is loaded by the real vLLM, which samples as transformers does and takes new weights."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from rollout.build import build_engine
from rollout.types import Prompt, SamplingParams
from tests.material.learner import make_learner
from tests.material.tiny_families import save_family
from tests.rollout.parity import INPUTS, ROLLOUT, assert_sampled_from, reference_model


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_vl", "internvl", "qwen3_vl_moe"])
def test_an_export_is_loaded_by_transformers_and_vllm_which_then_takes_new_weights(
    model_type, tiny_model_path, page_images, tmp_path
):
    learner = make_learner(save_family(model_type, tiny_model_path, tmp_path / "start"))
    learner.export(tmp_path / "export", torch.float32)
    model = reference_model(tmp_path / "export")
    prompts = [
        Prompt("two", "page 1 shows a code 4 <image> and <image> what amount?", tuple(page_images[:2])),
        Prompt("none", "page 1 shows a code 4 and an amount 7 insufficient to answer?"),
    ]
    engine = build_engine(str(tmp_path / "export"), ROLLOUT, INPUTS)
    try:
        for group in engine.generate(prompts, SamplingParams(group_size=2, max_tokens=8)):
            assert_sampled_from(model, engine, group)
        if model_type == "qwen3_vl_moe":
            return  # vLLM's CPU build cannot reload experts whose width it has padded
        moved, published = reference_model(tmp_path / "export", seed=1), learner.policy.family.published
        engine.load_weights((name, published(name, weight)) for name, weight in moved.named_parameters())
        engine.finish_weights(1)
        for group in engine.generate(prompts, SamplingParams(group_size=2, max_tokens=8)):
            assert_sampled_from(moved, engine, group)
    finally:
        engine.close()
