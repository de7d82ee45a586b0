"""A recurrent layer over a row of groups gives what it gives to each response behind its own copy of the prompt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from rsgrpo.learning.attention import PrefixRow
from rsgrpo.learning.layers.forked_state import fork_states
from rsgrpo.types import PrefixLayout

WIDTH = 32


@pytest.fixture(scope="module")
def layer() -> Any:
    torch.manual_seed(0)
    config: Any = Qwen3_5TextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=4,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=8,
    )
    layer = Qwen3_5GatedDeltaNet(config, 0)
    torch.nn.init.uniform_(layer.A_log, -3.0, 0.0)  # slow enough to remember the prompt
    return layer


def gradients(layer: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    layer.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize(
    "groups",
    [
        [(130, (70, 1, 64, 3))],  # prompt and responses over several chunks of 64, and on their edges
        [(64, (5, 65)), (1, (2,)), (2, (1, 1, 1)), (3, (4,)), (63, (9,))],  # prompts shorter than the convolution
        [(5, ()), (7, (3,))],
    ],
    ids=["long", "many groups", "a prompt alone"],
)
def test_a_row_equals_one_sequence_per_response(groups, layer):
    torch.manual_seed(1)
    plain, forked = layer, copy.deepcopy(layer)
    fork_states([forked])
    pieces = [(torch.randn(prompt, WIDTH), [torch.randn(n, WIDTH) for n in lengths]) for prompt, lengths in groups]
    weights = [[torch.randn(n, WIDTH) for n in lengths] for _, lengths in groups]

    separate: list[torch.Tensor] = []
    for prompt, responses in pieces:
        separate += [plain(torch.cat([prompt, response])[None])[0, len(prompt) :] for response in responses]
    row = torch.cat([piece for prompt, responses in pieces for piece in (prompt, *responses)])
    layout = PrefixLayout(tuple(prompt for prompt, _ in groups), tuple(lengths for _, lengths in groups))
    output = forked(row[None], prefix_row=PrefixRow(layout, row.device, row.dtype))[0]
    shared: list[torch.Tensor] = []
    start = 0
    for prompt_length, lengths in groups:
        start += prompt_length
        for length in lengths:
            shared.append(output[start : start + length])
            start += length

    flat = [weight for group in weights for weight in group]
    for one, other in zip(separate, shared, strict=True):
        torch.testing.assert_close(other, one, atol=2e-6, rtol=1e-5)
    losses = [(torch.cat(outputs) * torch.cat(flat)).sum() for outputs in (separate, shared)]
    expected, found = gradients(plain, losses[0]), gradients(forked, losses[1])
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert all(gradient.norm() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * whole, name


def test_responses_remember_their_prompt_and_no_sibling(layer):
    forked = copy.deepcopy(layer)
    fork_states([forked])
    row = torch.randn(1, 20 + 4 + 4, WIDTH)
    layout = PrefixRow(PrefixLayout((20,), ((4, 4),)), row.device, row.dtype)
    with torch.no_grad():
        before = forked(row, prefix_row=layout)
        row[:, 20:24] += 1.0  # the first response
        assert torch.equal(forked(row, prefix_row=layout)[:, 24:], before[:, 24:])
        row[:, 2] += 1.0  # the prompt, far before the convolution's reach
        assert not torch.allclose(forked(row, prefix_row=layout)[:, 24:], before[:, 24:], atol=1e-4)
