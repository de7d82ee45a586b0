"""Context parallelism: the ranks of a team share one row, so that a prompt need not fit one device.

Of every prompt a rank holds two slices and the last token; of the responses that follow, its own. In each layer the
team gathers the keys and values of all slices, so that a response sees its whole prompt; the backward pass sums their
gradients on the rank that made them. The last token is computed on every rank, because it predicts the first token of
each response; the sum of its copies' gradients is that of one.

Slices are taken from both ends, rank r has the r-th from the front and from the back: causal attention then costs every
rank the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from rsgrpo.errors import InputError
from rsgrpo.learning.attention import PrefixRow, Segment
from rsgrpo.types import PrefixLayout


@dataclass(frozen=True, slots=True)
class Team:
    """The ranks that share a row, and this one's place among them. group: None of a rank alone."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def slices(self, num_tokens: int, rank: int) -> list[tuple[int, int]]:
        """Return (start, tokens) of a rank's two slices of a prompt, which together hold all tokens but the last.

        >>> Team(size=2).slices(10, 0), Team(size=2).slices(10, 1)
        ([(0, 2), (6, 3)], [(2, 2), (4, 2)])
        """
        bounds = [(num_tokens - 1) * index // (2 * self.size) for index in range(2 * self.size + 1)]
        return [(bounds[i], bounds[i + 1] - bounds[i]) for i in (rank, 2 * self.size - 1 - rank)]

    def deal(self, lengths: Sequence[int]) -> list[int]:
        """Return the rank of each response: the longest first, each to the rank with the fewest tokens.

        >>> Team(size=2).deal([3, 9, 4])
        [1, 0, 1]
        """
        loads = [0] * self.size
        ranks = [0] * len(lengths)
        for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
            ranks[index] = loads.index(min(loads))
            loads[ranks[index]] += lengths[index]
        return ranks


ALONE = Team()

# torch 2.13 has new names for them.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def make_team(size: int) -> Team:
    """Return the team of `size` neighbouring ranks that this one belongs to. Collective."""
    if size == 1:
        return ALONE
    untyped: Any = dist
    group, _ = untyped.new_subgroups(size)
    return Team(dist.get_rank() % size, size, group)


def refuse_recurrent(team: Team, num_recurrent: int) -> None:
    """Raise InputError where layers carry a state from token to token, which slices on several ranks would break."""
    if team.size > 1 and num_recurrent:
        raise InputError(
            f"learner.context_parallel={team.size} spreads a prompt over ranks, but {num_recurrent} layers of this "
            "model carry a recurrent state from token to token. Set learner.context_parallel=1"
        )


@dataclass(frozen=True, slots=True, eq=False)
class PromptCut:
    """What a rank takes of a prompt.

    index_L: (L,) int64, its tokens, in order. images: those with a token among them.
    taken_F: (features of these images,) bool, which of them its image tokens are.
    """

    index_L: torch.Tensor
    images: list[int]
    taken_F: torch.Tensor


def cut_prompt(is_image_T: torch.Tensor, tokens_per_image: Sequence[int], team: Team) -> PromptCut:
    """Return what this rank takes of a prompt of T tokens.

    is_image_T: (T,) bool, its image tokens, those of its images in order.
    """
    num_tokens = len(is_image_T)
    pieces = [torch.arange(start, start + length) for start, length in team.slices(num_tokens, team.rank)]
    index_L = torch.cat([*pieces, torch.tensor([num_tokens - 1])])
    is_taken_T = torch.zeros(num_tokens, dtype=torch.bool)
    is_taken_T[index_L] = True
    per_image = torch.split(is_taken_T[is_image_T], list(tokens_per_image))
    images = [index for index, taken in enumerate(per_image) if taken.any()]
    return PromptCut(index_L, images, torch.cat([is_taken_T[:0], *(per_image[index] for index in images)]))


class _Gather(torch.autograd.Function):
    """Every rank's tensor, stacked; the backward pass gives each rank the sum of what all ranks have for its own."""

    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor, team: Team) -> torch.Tensor:
        ctx.team = team
        found = mine.new_empty(team.size * mine.shape[0], *mine.shape[1:])
        _all_gather(found, mine.contiguous(), group=team.group)
        return found.view(team.size, *mine.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        [gradient] = gradients
        summed = gradient.new_empty(gradient.shape[1:])
        _reduce_scatter(summed, gradient.flatten(0, 1).contiguous(), group=ctx.team.group)
        return summed, None


class TeamRow(PrefixRow):
    """This rank's share of a row: of each prompt two slices and its last token, then its own responses.

    A slice attends to the slices before it, wherever they are, and causally to itself; the last token to all slices;
    a response to all slices, the last token and causally to itself.
    """

    def __init__(self, layout: PrefixLayout, team: Team, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(layout, device, dtype)
        self._team, self._responses = team, layout.response_lengths
        slices = [[team.slices(whole, rank) for whole in layout.whole_lengths] for rank in range(team.size)]
        # Of every rank, how long its slices are, one prompt's after the other's; they are padded to the longest.
        self._slice_lengths = [[length for of_prompt in own for _, length in of_prompt] for own in slices]
        self._longest = max(sum(lengths) for lengths in self._slice_lengths)
        self._attending = [
            [*own, (whole - 1, 1), *((whole, length) for length in lengths)]
            for whole, own, lengths in zip(layout.whole_lengths, slices[team.rank], self._responses, strict=True)
        ]
        self.masked = [segment for segments in self._attending for segment in segments]
        self.split_lengths = [length for _, length in self.masked]
        firsts = [0, *itertools.accumulate(len(segments) for segments in self._attending)]
        self._firsts = firsts[:-1]  # of each group, the index of its first segment

    def segments(self, key: torch.Tensor, value: torch.Tensor) -> Iterator[Segment]:
        """Yield what each segment attends to, as `PrefixRow.segments` does; gather the slices first. Collective."""
        own = torch.split(torch.stack([key, value]), self.split_lengths, 3)
        second = 2 * self._team.size - 1 - self._team.rank
        for first, segments, slices in zip(self._firsts, self._attending, self._slices(own), strict=True):
            last = own[first + 2]
            before = [slices[: self._team.rank], slices[:second], slices, *[[*slices, last]] * (len(segments) - 3)]
            for index, (prefix, length) in enumerate(segments):
                keys, values = torch.cat([*before[index], own[first + index]], 3)
                yield keys, values, {"attn_mask": self.response_mask(prefix, length)}

    def source(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all ranks' slices and behind them this rank's row. Collective."""
        row = torch.stack([key, value])
        slices = self._gathered(torch.split(row, self.split_lengths, 3))
        keys, values = torch.cat([slices.movedim(0, 3).flatten(3, 4), row], 3)
        return keys, values

    def key_positions(self) -> list[torch.Tensor]:
        """Return where in `source` the keys of each segment lie."""
        team, own_row = self._team, self._team.size * self._longest
        slices: list[list[torch.Tensor]] = [[] for _ in self._firsts]
        for group, of_group in enumerate(slices):
            for rank, half in self._holders():
                before = sum(self._slice_lengths[rank][: 2 * group + half])
                start = rank * self._longest + before
                of_group.append(torch.arange(start, start + self._slice_lengths[rank][2 * group + half]))
        starts = [own_row, *(own_row + end for end in itertools.accumulate(self.split_lengths))]
        found = []
        for first, segments, of_group in zip(self._firsts, self._attending, slices, strict=True):
            for index, (_, length) in enumerate(segments):
                own = torch.arange(starts[first + index], starts[first + index] + length)
                last = torch.arange(starts[first + 2], starts[first + 2] + 1)
                num_before = {0: team.rank, 1: 2 * team.size - 1 - team.rank}.get(index, 2 * team.size)
                found.append(torch.cat([*of_group[:num_before], *([last] if index > 2 else []), own]))
        return found

    def _holders(self) -> list[tuple[int, int]]:
        """Return of each slice of a prompt, from its front, the rank that has it and which of that rank's two it is."""
        size = self._team.size
        return [*((rank, 0) for rank in range(size)), *((rank, 1) for rank in reversed(range(size)))]

    def _gathered(self, own: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the slices of all ranks, (ranks, 2, 1, kv_heads, tokens of the longest, head_dim)."""
        mine = torch.cat([piece for first in self._firsts for piece in own[first : first + 2]], 3)
        padded = F.pad(mine, (0, 0, 0, self._longest - mine.shape[3]))
        found: torch.Tensor = _Gather.apply(padded, self._team)  # type: ignore[no-untyped-call]
        return found

    def _slices(self, own: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Return of each group all slices of its prompt, in order."""
        if not self._longest:
            return [[] for _ in self._firsts]
        by_rank = [
            torch.split(found, [*lengths, self._longest - sum(lengths)], 3)
            for found, lengths in zip(self._gathered(own), self._slice_lengths, strict=True)
        ]
        return [
            [by_rank[rank][2 * group + half] for rank, half in self._holders()] for group in range(len(self._firsts))
        ]
