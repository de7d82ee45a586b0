"""Attention within a tower's windows against transformers' own, window by window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rollout.families import family_of
from rollout.families.windows import WINDOWS
from tests.rollout.parity import reference_model


class AttentionCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "attention" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def tower(tiny_model_path) -> Any:
    model = reference_model(tiny_model_path)
    return family_of(model.config.model_type).vision_tower(model)


def run(tower: Any, attention: str, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the tower's output, the gradient of its pixels, and the number of calls of attention."""
    config = tower.config
    patch = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(int(grid.prod(1).sum()), patch, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before, config._attn_implementation = config._attn_implementation, attention
    try:
        with AttentionCalls() as calls:
            output = tower(pixels, grid_thw=grid).pooler_output
    finally:
        config._attn_implementation = before
    output.square().sum().backward()
    assert pixels.grad is not None
    return output.detach(), pixels.grad, calls.count


@pytest.mark.parametrize(
    ("grids", "num_lengths"),
    [
        ([[1, 16, 16]], 1),  # windows of 112 x 112 pixels, 8 x 8 patches
        ([[1, 20, 28]], 3),  # cut off at the right, at the bottom, and both in the same number of patches
        ([[1, 2, 2], [1, 20, 22], [1, 8, 8]], 6),
    ],
)
def test_windows_of_a_length_attend_in_one_call_and_change_no_bit(grids, num_lengths, tower):
    grid = torch.tensor(grids)
    expected, expected_gradient, single_calls = run(tower, "sdpa", grid)
    output, gradient, calls = run(tower, WINDOWS, grid)
    assert torch.equal(output, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    full_blocks = len(tower.config.fullatt_block_indexes)
    windowed_blocks = tower.config.depth - full_blocks
    assert calls <= windowed_blocks * num_lengths + full_blocks * len(grids)
    assert calls < single_calls


def test_learner_and_engine_attend_so(tiny_model_path):
    model = reference_model(tiny_model_path)
    family_of("qwen2_5_vl").attend_by(model, "sdpa")
    tower: Any = family_of("qwen2_5_vl").vision_tower(model)
    assert tower.config._attn_implementation == WINDOWS
