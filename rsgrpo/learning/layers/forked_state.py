"""The gated delta rule over a padding-free row of groups: every response starts from its prompt's final state.

A layer of this kind carries a recurrent state and the last inputs of a short convolution from token to token. On the
row `[prompt | r_1 … r_G][prompt | …]…` the prompt runs once, its two states are forked to the responses, and in the
backward pass the gradients of the forks add up in it, as they would if each response had its own copy of the prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from rsgrpo.learning.attention import PrefixRow


def fork_states(layers: Sequence[nn.Module]) -> None:
    """Let these layers, in place, fork their states where they are given a `prefix_row`; else they run as before.

    layers: with the interface of transformers' `Qwen3_5GatedDeltaNet`.
    """
    for layer in layers:
        _fork_states(layer)


def _fork_states(layer: Any) -> None:
    plain = layer.forward

    def forward(
        hidden_states: torch.Tensor,
        cache_params: Any = None,
        attention_mask: torch.Tensor | None = None,
        prefix_row: PrefixRow | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if prefix_row is None:
            output: torch.Tensor = plain(hidden_states, cache_params, attention_mask, **kwargs)
            return output
        assert attention_mask is None, "a mask over the whole row was built"
        return _forked(layer, hidden_states, prefix_row)

    layer.forward = forward


def _forked(layer: Any, hidden_1TH: torch.Tensor, row: PrefixRow) -> torch.Tensor:
    """Return the layer's output for a whole row, (1, T, H)."""
    qkv = torch.split(layer.in_proj_qkv(hidden_1TH), row.split_lengths, 1)
    decay = -layer.A_log.float().exp() * F.softplus(layer.in_proj_a(hidden_1TH).float() + layer.dt_bias)
    decays = torch.split(decay, row.split_lengths, 1)
    strengths = torch.split(layer.in_proj_b(hidden_1TH).sigmoid(), row.split_lengths, 1)
    outputs: list[torch.Tensor] = []
    for _, lengths in row.groups:
        at = len(outputs)
        nothing = qkv[at].new_zeros(1, layer.conv_kernel_size - 1, qkv[at].shape[2])
        output, state = _delta_rule(layer, _convolve(layer, nothing, qkv[at]), decays[at], strengths[at], None)
        outputs.append(output)
        if not lengths:
            continue
        last_inputs = torch.cat([nothing, qkv[at]], 1)[:, -nothing.shape[1] :]
        own = slice(at + 1, at + 1 + len(lengths))
        # Zero decay and zero strength leave the state alone on padding.
        output, _ = _delta_rule(
            layer,
            _convolve(layer, last_inputs.expand(len(lengths), -1, -1), _padded(qkv[own])),
            _padded(decays[own]),
            _padded(strengths[own]),
            state.expand(len(lengths), -1, -1, -1),
        )
        outputs += [output[index : index + 1, :length] for index, length in enumerate(lengths)]
    values = torch.cat(outputs, 1).reshape(-1, layer.head_v_dim)
    gated = layer.norm(values, layer.in_proj_z(hidden_1TH).reshape(-1, layer.head_v_dim))
    projected: torch.Tensor = layer.out_proj(gated.reshape(*hidden_1TH.shape[:2], -1))
    return projected


def _convolve(layer: Any, before_BKC: torch.Tensor, inputs_BTC: torch.Tensor) -> torch.Tensor:
    """Return the causal convolution of inputs that follow `before_BKC`, the kernel's size - 1 inputs, (B, T, C)."""
    padded_BCT = torch.cat([before_BKC, inputs_BTC], 1).transpose(1, 2)
    output_BCT = F.conv1d(padded_BCT, layer.conv1d.weight, layer.conv1d.bias, groups=padded_BCT.shape[1])
    activated: torch.Tensor = ACT2FN[layer.activation](output_BCT)
    return activated.transpose(1, 2)


def _delta_rule(
    layer: Any, qkv_BTC: torch.Tensor, decay_BTN: torch.Tensor, strength_BTN: torch.Tensor, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rule's output and its final state.

    output: (B, T, heads, head_v_dim). state: (B, heads, head_k_dim, head_v_dim) float32.
    The kernel is the layer's own: transformers' in torch, or flash-linear-attention's where that is installed.
    """
    rule: Any = vars(sys.modules[type(layer).__module__])["torch_chunk_gated_delta_rule"]
    parts = torch.split(qkv_BTC, [layer.key_dim, layer.key_dim, layer.value_dim], 2)
    head_dims = (layer.head_k_dim, layer.head_k_dim, layer.head_v_dim)
    query, key, value = (part.reshape(*part.shape[:2], -1, dim) for part, dim in zip(parts, head_dims, strict=True))
    repeats = layer.num_v_heads // layer.num_k_heads
    if repeats > 1:
        query, key = query.repeat_interleave(repeats, 2), key.repeat_interleave(repeats, 2)
    result: tuple[torch.Tensor, torch.Tensor] = rule(
        query,
        key,
        value,
        g=decay_BTN,
        beta=strength_BTN,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return result


def _padded(segments: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack (1, T, C) segments of several lengths to (segments, longest T, C), zeros behind."""
    return nn.utils.rnn.pad_sequence([segment[0] for segment in segments], batch_first=True)
