"""Attention within the windows of a vision tower: one call per length of window instead of one per window.

A page of 1.6 megapixels has 125 windows. Transformers splits them on the host in every layer, which takes longer than
their arithmetic on a GPU.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface

WINDOWS = "rsgrpo_windows_flash"
"""Transformers passes the bounds of all windows at once where the name has "flash" in it."""


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """The windows of some images, sorted by length.

    counts: (windows, patches in each) of every length. order: (T,) int64, patches so that windows of a length are
    neighbours; inverse: back again. Both None where all windows are of one length.
    """

    counts: list[tuple[int, int]]
    order: torch.Tensor | None
    inverse: torch.Tensor | None


def windows_of(bounds: torch.Tensor) -> Windows:
    """Sort the windows between `bounds`, (windows + 1,) int32."""
    limits = bounds.tolist()
    of_length: dict[int, list[int]] = {}
    for start, end in itertools.pairwise(limits):
        of_length.setdefault(end - start, []).append(start)
    counts = [(len(starts), length) for length, starts in of_length.items()]
    if len(counts) < 2:
        return Windows(counts, None, None)
    pieces = [torch.tensor(starts)[:, None] + torch.arange(length) for length, starts in of_length.items()]
    order = torch.cat([piece.flatten() for piece in pieces])
    return Windows(counts, order.to(bounds.device), order.argsort().to(bounds.device))


_known: Any = WeakTensorKeyDictionary()  # all layers of a tower get the same tensor of bounds


def attend_in_windows(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Let every patch attend to its own window.

    query, key, value: (1, heads, T, dim). cu_seq_lens_q: bounds of the windows. Returns (1, T, heads, dim).
    """
    if cu_seq_lens_q not in _known:
        _known[cu_seq_lens_q] = windows_of(cu_seq_lens_q)
    windows: Windows = _known[cu_seq_lens_q]
    sizes = [count * length for count, length in windows.counts]

    def batches(state: torch.Tensor) -> list[torch.Tensor]:
        """Return (windows, heads, length, dim) for each length."""
        sorted_state = state[0] if windows.order is None else state[0].index_select(1, windows.order)
        heads, _, width = sorted_state.shape
        parts = torch.split(sorted_state, sizes, 1)
        return [
            part.reshape(heads, *shape, width).transpose(0, 1)
            for part, shape in zip(parts, windows.counts, strict=True)
        ]

    outputs = []
    for queries, keys, values in zip(batches(query), batches(key), batches(value), strict=True):
        output = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    joined = torch.cat(outputs)
    return (joined if windows.inverse is None else joined.index_select(0, windows.inverse))[None], None


AttentionInterface.register(WINDOWS, attend_in_windows)
