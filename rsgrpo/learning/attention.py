"""Attention over a padding-free row of groups, `[prompt | r_1 … r_G][prompt | r_1 …]…`, for transformers' layers.

Each prompt attends causally to itself, each response to its prompt and causally to itself, and to nothing else. No
mask over the whole row exists.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from rsgrpo.errors import InputError
from rsgrpo.types import PrefixLayout

SDPA = "rsgrpo_prefix_sdpa"
VARLEN = "rsgrpo_prefix_varlen"


Segment = tuple[torch.Tensor, torch.Tensor, dict[str, Any]]
"""Keys and values that a segment of a row attends to, (1, kv_heads, S, head_dim), and options of torch's kernel."""


class PrefixRow:
    """A layout prepared for one device: made once per forward and shared by all layers.

    split_lengths: lengths of the row's segments, prompts and responses, in row order.
    masked: of each segment that a mask is built for, the tokens of its prefix and its own.
    """

    def __init__(self, layout: PrefixLayout, device: torch.device, dtype: torch.dtype) -> None:
        self.layout, self.device, self._dtype = layout, device, dtype
        self.groups = list(zip(layout.prompt_lengths, layout.response_lengths, strict=True))
        self.split_lengths = [length for prompt, responses in self.groups for length in (prompt, *responses)]
        self.masked = [(prompt, length) for prompt, responses in self.groups for length in (*responses, 0)]

    def segments(self, key: torch.Tensor, value: torch.Tensor) -> Iterator[Segment]:
        """Yield what each segment of the row attends to, in row order."""
        # One split each, so that backward writes every gradient once instead of one row-long tensor per slice.
        keys, values = (torch.split(tensor, self.split_lengths, 2) for tensor in (key, value))
        rest = iter(zip(keys, values, strict=True))
        for prompt_length, lengths in self.groups:
            prompt = next(rest)
            yield *prompt, {"is_causal": True}
            for length in lengths:
                seen_keys, seen_values = (torch.cat(pair, 2) for pair in zip(prompt, next(rest), strict=True))
                yield seen_keys, seen_values, {"attn_mask": self.response_mask(prompt_length, length)}

    def response_mask(self, prompt_length: int, response_length: int) -> Any:
        """Return what lets query i of a response see its prompt and its own first i + 1 tokens.

        On an accelerator this is a description that the flash kernels take; on CPU a view of one additive mask, as
        wide as the longest prompt and response.
        """
        if self.device.type != "cpu":
            return causal_lower_right(response_length, prompt_length + response_length)
        mask, longest_prompt = self._additive_mask
        return mask[:response_length, longest_prompt - prompt_length : longest_prompt + response_length]

    @cached_property
    def _additive_mask(self) -> tuple[torch.Tensor, int]:
        longest_prompt = max(prefix for prefix, _ in self.masked)
        longest_response = max(length for _, length in self.masked)
        shape = (longest_response, longest_prompt + longest_response)
        blocked = torch.ones(shape, dtype=torch.bool).triu(longest_prompt + 1)
        return torch.zeros(shape, dtype=self._dtype).masked_fill_(blocked, float("-inf")), longest_prompt

    @cached_property
    def varlen(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """What flash-attn's varlen kernel needs: query bounds, key bounds, key positions in the row, maxima.

        The keys of a response are its prompt's and its own, so the row's keys are gathered G times per prompt.
        """
        positions = self.key_positions()
        key_lengths = [len(piece) for piece in positions]
        return (
            _bounds(self.split_lengths, self.device),
            _bounds(key_lengths, self.device),
            torch.cat(positions).to(self.device),
            max(self.split_lengths),
            max(key_lengths),
        )

    def source(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values that `key_positions` counts in."""
        return key, value

    def key_positions(self) -> list[torch.Tensor]:
        """Return where in `source` the keys of each segment lie."""
        positions: list[torch.Tensor] = []
        start = 0
        for prompt_length, lengths in self.groups:
            prompt = torch.arange(start, start + prompt_length)
            positions.append(prompt)
            start += prompt_length
            for length in lengths:
                positions.append(torch.cat([prompt, torch.arange(start, start + length)]))
                start += length
        return positions


def _bounds(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PrefixRow, float | None, float], torch.Tensor]
"""(query, key, value, row, scale, dropout) -> (1, T, heads, head_dim).

query: (1, heads, T, head_dim). key, value: (1, kv_heads, T, head_dim).
"""


def register(name: str, kernel: Kernel) -> None:
    """Let transformers' layers attend by `kernel` where their configuration names it."""

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        prefix_row: PrefixRow,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        assert attention_mask is None, "a mask over the whole row was built"
        return kernel(query, key, value, prefix_row, scaling, dropout), None

    uncompiled: Any = torch.compiler.disable
    AttentionInterface.register(name, uncompiled(attend))


def kernels_of(device: torch.device) -> AbstractContextManager[Any]:
    """Keep cuDNN out: it plans, and keeps, a graph for every length of prompt. On CPU torch chooses."""
    if device.type == "cpu":
        return nullcontext()
    allowed: Any = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(allowed)


def prefix_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_row: PrefixRow,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend segment by segment with torch's own kernels (flash on CUDA)."""
    with kernels_of(query.device):
        return _segments(query, key, value, prefix_row, scale, dropout)


def _segments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_row: PrefixRow,
    scale: float | None,
    dropout: float,
) -> torch.Tensor:
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    outputs = []
    for own, (keys, values, how) in zip(
        torch.split(query, prefix_row.split_lengths, 2), prefix_row.segments(key, value), strict=True
    ):
        outputs.append(F.scaled_dot_product_attention(own, keys, values, **how, **options) if own.shape[2] else own)
    return torch.cat(outputs, 2).transpose(1, 2)


def prefix_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_row: PrefixRow,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """As `prefix_sdpa`, in one call of flash-attn's varlen kernel (its causal mask is aligned to the last key)."""
    from flash_attn import flash_attn_varlen_func

    query_bounds, key_bounds, key_positions, longest_query, longest_key = prefix_row.varlen
    key, value = prefix_row.source(key, value)
    output = flash_attn_varlen_func(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1).index_select(0, key_positions),
        value[0].transpose(0, 1).index_select(0, key_positions),
        query_bounds,
        key_bounds,
        longest_query,
        longest_key,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
    )
    rows: torch.Tensor = output[None]
    return rows


def choose_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the registered name for `learner.attention`: "auto", "sdpa" or "flash".

    "auto" takes flash-attn where it is installed and can run (CUDA, 16-bit), otherwise torch's own kernels.

    Raises:
        InputError: "flash" where it cannot run.
    """
    installed = importlib.util.find_spec("flash_attn") is not None
    can_run = installed and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if wanted == "flash" and not can_run:
        raise InputError(
            "learner.attention=flash needs flash-attn, CUDA and bfloat16, but flash-attn is "
            f"{'installed' if installed else 'not installed'}, the device is {device.type} and the dtype {dtype}. "
            "Set learner.attention=sdpa"
        )
    return VARLEN if wanted != "sdpa" and can_run else SDPA


register(SDPA, prefix_sdpa)
register(VARLEN, prefix_varlen)
