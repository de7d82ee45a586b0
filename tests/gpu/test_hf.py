"""What of the embedded engine needs CUDA."""

from __future__ import annotations

import pytest
import torch

from rollout.config import RolloutConfig
from rollout.hf.engine import HFEngine
from rollout.types import Prompt, SamplingParams
from tests.rollout.parity import INPUTS, assert_greedy, reference_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_greedy_on_cuda_equals_a_plain_forward(tiny_model_path, page_images):
    engine = HFEngine(tiny_model_path, RolloutConfig(), INPUTS, device="cuda")
    prompts = [
        Prompt("two", "<image><image>what amount is on page 2?", tuple(page_images[:2])),
        Prompt("none", "code?"),
    ]
    for group in engine.generate(prompts, SamplingParams(temperature=0, max_tokens=24)):
        assert_greedy(reference_model(tiny_model_path), engine, group)
