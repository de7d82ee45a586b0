"""What a learner exports is loaded by the real vLLM, which samples as transformers does and takes new weights."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from rollout.build import build_engine
from rollout.types import Prompt, SamplingParams
from rollout.vllm.peers import local_peer
from rollout.vllm.weights_out import build_sender
from tests.material.learner import make_learner
from tests.material.tiny_families import save_family
from tests.rollout.parity import INPUTS, ROLLOUT, assert_sampled_from, reference_model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of GLM's processor
@pytest.mark.parametrize("model_type", ["qwen3_vl", "internvl", "glm4v", "qwen3_vl_moe"])
def test_an_export_is_loaded_by_transformers_and_vllm_which_then_takes_new_weights(
    model_type, tiny_model_path, page_images, tmp_path
):
    start = save_family(model_type, tiny_model_path, tmp_path / "start")
    reference_model(start, seed=3).save_pretrained(start)  # biases that are not zero
    learner = make_learner(start)
    published = learner.policy.family.published
    learner.export(tmp_path / "export", torch.float32)
    model = reference_model(tmp_path / "export")
    prompts = [
        Prompt("two", "page 1 shows a code 4 <image> and <image> what amount?", tuple(page_images[:2])),
        Prompt("none", "page 1 shows a code 4 and an amount 7 insufficient to answer?"),
    ]
    engine = build_engine(str(tmp_path / "export"), ROLLOUT, INPUTS)
    sender = build_sender([local_peer(engine)], backend=engine.backend, timeout_s=60)
    try:
        assert_follows(model, engine, prompts)
        moved = reference_model(tmp_path / "export", seed=1)
        engine.load_weights((name, published(name, weight)) for name, weight in moved.named_parameters())
        engine.finish_weights(1)
        assert_follows(moved, engine, prompts)
        again = reference_model(tmp_path / "export", seed=2)
        sender.send(((name, published(name, weight)) for name, weight in again.named_parameters()), 2)
        assert_follows(again, engine, prompts)
        if model_type == "qwen3_vl_moe":
            assert_experts_come_whole(engine, again, published)
    finally:
        sender.close()
        engine.close()


def assert_follows(model, engine, prompts) -> None:
    for group in engine.generate(prompts, SamplingParams(group_size=2, max_tokens=8)):
        assert_sampled_from(model, engine, group)


def assert_experts_come_whole(engine, model, published) -> None:
    """An update without experts leaves them as they are, and a part of a layer's experts is refused by name."""
    names = [name for name, _ in model.named_parameters()]
    assert engine._rpc("missing_parts", names) == [[]]
    part = [name for name in names if name.endswith("layers.1.mlp.experts.down_proj")]
    assert engine._rpc("missing_parts", part) == [
        ["language_model.model.layers.1.mlp.experts.routed_experts.w13_weight (routed_experts)"]
    ]
    rest = [(name, weight) for name, weight in model.named_parameters() if ".experts." not in name]
    engine.load_weights((name, published(name, weight)) for name, weight in rest)
    engine.finish_weights(3)
    assert_follows(model, engine, [Prompt("none", "page 1 shows a code 4 and an amount 7 insufficient to answer?")])
