"""Qwen3-VL through the same adapter: its shared-prefix forward and gradients equal the plain ones."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLForConditionalGeneration

from rollout.config import InputsConfig
from rollout.inputs.processor import InputProcessor
from rsgrpo.learning.packing import build_micro_batch
from tests.laws.test_02_shared_prefix import assert_same, backward, encoded, groups_of, make_policy, plain_rows
from tests.material.learner import make_groups, make_learner
from tests.material.tiny_qwen3 import save_qwen3


@pytest.fixture(scope="module")
def qwen3_path(tiny_model_path, tmp_path_factory) -> str:
    return save_qwen3(tiny_model_path, tmp_path_factory.mktemp("tiny-qwen3"))


@pytest.fixture(scope="module")
def processor(qwen3_path) -> InputProcessor:
    return InputProcessor(qwen3_path, InputsConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 16))


@pytest.mark.parametrize("train_tower", [False, True])
@pytest.mark.parametrize("counts", [[2, 0, 5], [0]], ids=str)
def test_shared_equals_plain(counts, train_tower, qwen3_path, processor, page_images):
    policy = make_policy(qwen3_path, processor, train_tower=train_tower)
    groups = groups_of(processor, page_images, counts)
    row = build_micro_batch([(encoded(policy, inputs), group) for inputs, group in groups])
    plain, shared = backward(policy, plain_rows(groups)), backward(policy, [row])
    if train_tower and not any(counts):  # the plain forward of text never runs the tower; here its gradient is zero
        shared = (shared[0], {name: g for name, g in shared[1].items() if "visual" not in name})
    assert_same(plain, shared)


def test_deeper_features_matter(qwen3_path, processor, page_images):
    policy = make_policy(qwen3_path, processor).eval()
    [(inputs, group)] = groups_of(processor, page_images, [2])
    prompt = encoded(policy, inputs)
    assert prompt.features is not None
    assert prompt.features.shape[1] == 3 * 64
    with torch.no_grad():
        before = policy(build_micro_batch([(prompt, group)]), 1.0, False).logprobs_N
        prompt.features[:, 64:] = 0
        after = policy(build_micro_batch([(prompt, group)]), 1.0, False).logprobs_N
    assert not torch.allclose(before, after)


def test_the_learner_trains_it(qwen3_path, page_images):
    learner = make_learner(qwen3_path)
    metrics = learner.update(make_groups(page_images, [1, 0, 2]), [1.0, 1.0])
    assert metrics["actor/skipped"] == 0


def test_an_export_loads_and_has_the_hubs_names(qwen3_path, page_images, tmp_path):
    learner = make_learner(qwen3_path)
    learner.update(make_groups(page_images, [1, 2]), [1.0, 1.0])
    learner.export(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(model, Qwen3VLForConditionalGeneration)
    named = dict(model.named_parameters())
    for name, tensor in learner.gather_weights():
        torch.testing.assert_close(named[name].data, tensor)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:  # the names that vLLM's loader maps
        prefixes = {".".join(name.split(".")[:2]) for name in file.keys()}  # noqa: SIM118
    assert prefixes == {"model.language_model", "model.visual", "lm_head.weight"}
    assert AutoProcessor.from_pretrained(tmp_path).image_processor is not None
