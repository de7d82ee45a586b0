"""Assign groups to ranks and micro-batches, and lay a micro-batch out as one row.

The packing is a pure function of lengths, so every rank computes the same one without communication.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rsgrpo.types import MicroBatch, PrefixLayout, RsgrpoError, Sample

_HOME_SLACK = 1.05


@dataclass(frozen=True, slots=True)
class CostModel:
    """Predicted work; only ratios matter.

    `per_token` for each token of the row, `per_pair` for each query-key pair, `per_response_token` for the head.
    """

    per_token: float = 1.0
    per_pair: float = 0.0
    per_response_token: float = 0.0

    def cost(self, prompt_length: int, response_lengths: Sequence[int]) -> float:
        """Return the work of one group: its prompt once, each response against the prompt and itself."""
        responses = sum(response_lengths)
        pairs = prompt_length**2 / 2 + sum(length * prompt_length + length**2 / 2 for length in response_lengths)
        tokens = self.per_token * (prompt_length + responses)
        return tokens + self.per_pair * pairs + self.per_response_token * responses


@dataclass(frozen=True, slots=True)
class Unit:
    """A group, or a part of one that carries the prompt too.

    group: index into the step's groups. samples: indices of its responses that this unit holds.
    num_tokens: prompt once plus its responses.
    """

    group: int
    samples: tuple[int, ...]
    num_tokens: int
    cost: float


Packing = list[list[list[Unit]]]
"""For each rank, or each team of ranks that share rows, its micro-batches, each a list of units.

The same number on every rank, empty ones at the end.
"""


def pack(
    lengths: Mapping[int, tuple[int, Sequence[int]]],
    *,
    num_ranks: int,
    max_tokens: int,
    cost_model: CostModel | None = None,
    homes: Sequence[int | None] = (),
) -> Packing:
    """Spread whole groups over ranks by predicted cost and pack them into micro-batches of at most `max_tokens`.

    Args:
        lengths: for each group, by its index, the tokens of its prompt and of each response.
        homes: for each group index, the rank that already has its images. The group goes there unless that rank would
            get over 5% more work than the busiest rank of a packing without homes. None, or an empty list: any rank.

    Raises:
        RsgrpoError: a prompt with one of its responses is longer than `max_tokens`.
    """
    cost_model = cost_model or CostModel()
    units = [
        unit
        for group, (prompt_length, response_lengths) in lengths.items()
        for unit in _split_group(group, prompt_length, response_lengths, max_tokens, cost_model)
    ]
    ranks = _spread(units, num_ranks)
    if homes:
        busiest = max(sum(unit.cost for unit in rank_units) for rank_units in ranks)
        ranks = _spread(units, num_ranks, homes, _HOME_SLACK * busiest)
    return _level([_fill_bins(rank_units, max_tokens) for rank_units in ranks])


def _spread(
    units: Sequence[Unit], num_ranks: int, homes: Sequence[int | None] = (), most: float = 0.0
) -> list[list[Unit]]:
    """Give each unit, costly ones first, to its home where that stays within `most`, else to the least busy rank."""
    ranks: list[list[Unit]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for unit in sorted(units, key=lambda unit: (-unit.cost, unit.group, unit.samples)):
        home = homes[unit.group] if homes else None
        rank = loads.index(min(loads)) if home is None or loads[home] + unit.cost > most else home
        ranks[rank].append(unit)
        loads[rank] += unit.cost
    return ranks


def _split_group(
    group: int, prompt_length: int, response_lengths: Sequence[int], max_tokens: int, cost_model: CostModel
) -> list[Unit]:
    """Cut a group that is over the budget into parts, in order; each part carries the prompt."""
    parts: list[list[int]] = []
    num_tokens = max_tokens + 1
    for index, length in enumerate(response_lengths):
        if prompt_length + length > max_tokens:
            raise RsgrpoError(
                f"learner.max_tokens_per_micro_batch={max_tokens} cannot hold one response: prompt {prompt_length} + "
                f"response {length} = {prompt_length + length} tokens. Raise it to at least that"
            )
        if num_tokens + length > max_tokens:
            parts.append([])
            num_tokens = prompt_length
        parts[-1].append(index)
        num_tokens += length
    units = []
    for part in parts:
        lengths = [response_lengths[index] for index in part]
        cost = cost_model.cost(prompt_length, lengths)
        units.append(Unit(group, tuple(part), prompt_length + sum(lengths), cost))
    return units


def _fill_bins(units: Sequence[Unit], max_tokens: int) -> list[list[Unit]]:
    """Put units into as few micro-batches as first fit, largest first, finds."""
    bins: list[list[Unit]] = []
    loads: list[int] = []
    for unit in sorted(units, key=lambda unit: (-unit.num_tokens, unit.group, unit.samples)):
        fits = [index for index, load in enumerate(loads) if load + unit.num_tokens <= max_tokens]
        if fits:
            bins[fits[0]].append(unit)
            loads[fits[0]] += unit.num_tokens
        else:
            bins.append([unit])
            loads.append(unit.num_tokens)
    return bins


def _level(packed: list[list[list[Unit]]]) -> Packing:
    """Give every rank as many micro-batches as the busiest one: split its fullest ones first, then add empty ones.

    A split costs nothing, because units share no work; an empty micro-batch is a forward that only keeps collectives in
    step.
    """
    most = max(len(bins) for bins in packed)
    levelled: Packing = []
    for rank_bins in packed:
        bins = [list(units) for units in rank_bins]
        while len(bins) < most:
            largest = max(bins, key=len, default=[])
            half = len(largest) // 2 or len(largest)
            bins.append(largest[half:])
            del largest[half:]
        levelled.append(bins)
    return levelled


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPrompt:
    """One prompt as the policy takes it.

    token_ids_T: (T,) int64. position_ids_3T: (3, T) int64.
    features: (image tokens, F) of each image, of a frozen tower; empty without images or with a trained tower.
    pixel_values, image_grid_thw: for a trained tower; None without images or with a frozen one.
    taken_F: (features of its images,) bool, which of a trained tower's are its image tokens; None: all.
    whole: of what it is a rank's share, (tokens, position of a response's first token); None: it is all of a prompt.
    index_L: (L,) int64, where in the whole its tokens lie; None: it is all of a prompt.
    """

    token_ids_T: torch.Tensor
    position_ids_3T: torch.Tensor
    features: tuple[torch.Tensor, ...] = ()
    pixel_values: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    taken_F: torch.Tensor | None = None
    whole: tuple[int, int] | None = None
    index_L: torch.Tensor | None = None

    @property
    def next_position(self) -> int:
        """The position of the first token behind it."""
        return self.whole[1] if self.whole else int(self.position_ids_3T.max()) + 1

    def own(self, of_prompt_T: np.ndarray | None) -> np.ndarray | None:
        """Return what a rank's share needs of an array over the whole prompt's tokens."""
        return of_prompt_T if of_prompt_T is None or self.index_L is None else of_prompt_T[self.index_L.numpy()]


@dataclass(frozen=True, slots=True, eq=False)
class EncodedResponse:
    """A response with its observations: all tokens as the policy takes them, and where among them its own lie.

    row: as a prompt's, positions counted from 0. own_T: (T,) int64.
    """

    row: EncodedPrompt
    own_T: torch.Tensor


def build_micro_batch(
    groups: Sequence[tuple[EncodedPrompt, Sequence[Sample]]],
    old_logprobs: Sequence[np.ndarray] | None = None,
    encoded: Sequence[EncodedResponse | None] | None = None,
    prompt_experts: Sequence[np.ndarray | None] | None = None,
) -> MicroBatch:
    """Lay groups out in one row.

    Args:
        groups: each prompt with the responses that follow it.
        old_logprobs: of each response in row order (T,) float32; None when no pass was needed.
        encoded: of each response in row order, itself with what it read; None where it read nothing, or all did.
        prompt_experts: of each group, (T, layers, k), to be replayed with those of its responses; None replays nothing.
    """
    samples = [sample for _, responses in groups for sample in responses]
    rest = iter(encoded or [None] * len(samples))
    parts: list[EncodedPrompt] = []
    positions: list[torch.Tensor] = []
    head_index: list[torch.Tensor] = []
    row = 0
    for prompt, responses in groups:
        parts.append(prompt)
        positions.append(prompt.position_ids_3T)
        last_of_prompt = row + len(prompt.token_ids_T) - 1
        row = last_of_prompt + 1
        first_position = prompt.next_position
        for sample in responses:
            response = next(rest) or _without_observations(sample)
            parts.append(response.row)
            positions.append(response.row.position_ids_3T + first_position)
            # Each token is predicted by the one before it in the row, the first one by the prompt's last.
            head_index.append(torch.where(response.own_T > 0, row + response.own_T - 1, last_of_prompt))
            row += len(response.row.token_ids_T)
    lengths = [len(sample.token_ids_T) for sample in samples]
    choices: list[np.ndarray | None] = []
    for (prompt, responses), experts in zip(groups, prompt_experts or (), strict=prompt_experts is not None):
        choices += [prompt.own(experts), *(sample.experts_RLk for sample in responses)]
    advantages_KN = np.concatenate([sample.advantages_KT for sample in samples], 1)
    return MicroBatch(
        layout=_layout(
            [prompt for prompt, _ in groups],
            [len(part.token_ids_T) for part in parts],
            [len(responses) for _, responses in groups],
        ),
        token_ids_T=torch.cat([part.token_ids_T for part in parts]),
        position_ids_3T=torch.cat(positions, 1),
        features=_cat([features for part in parts for features in part.features]),
        pixel_values=_cat([part.pixel_values for part in parts]),
        image_grid_thw=_cat([part.image_grid_thw for part in parts]),
        taken_F=_cat([part.taken_F for part in parts]),
        head_index_N=torch.cat(head_index),
        targets_N=torch.cat([torch.tensor(sample.token_ids_T) for sample in samples]),
        sample_index_N=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        scope_KN=torch.from_numpy(np.concatenate([sample.scope_KT for sample in samples], 1)),
        advantages_KN=torch.from_numpy(advantages_KN.astype(np.float32)),
        rollout_logprobs_N=_cat_if_all([sample.rollout_logprobs_T for sample in samples]),
        ref_logprobs_N=_cat_if_all([sample.ref_logprobs_T for sample in samples]),
        old_logprobs_N=None if old_logprobs is None else _cat_if_all(old_logprobs),
        experts_TLk=_experts(choices, [len(part.token_ids_T) for part in parts]),
    )


def _without_observations(sample: Sample) -> EncodedResponse:
    own_T = torch.arange(len(sample.token_ids_T))
    return EncodedResponse(EncodedPrompt(torch.tensor(sample.token_ids_T), own_T.expand(3, -1)), own_T)


def _experts(choices: Sequence[np.ndarray | None], lengths: Sequence[int]) -> torch.Tensor | None:
    """Lay recorded experts out as the row's parts lie in it: -1 where none are recorded; None where none are at all."""
    known = next((experts for experts in choices if experts is not None), None)
    if known is None:
        return None
    row = np.full((sum(lengths), *known.shape[1:]), -1, dtype=np.int16)
    for experts, start in zip(choices, np.cumsum([0, *lengths[:-1]]), strict=True):
        if experts is not None:
            row[start : start + len(experts)] = experts
    return torch.from_numpy(row)


def _layout(prompts: Sequence[EncodedPrompt], lengths: Sequence[int], num_responses: Sequence[int]) -> PrefixLayout:
    """Return where prompts and responses lie, from their lengths in row order."""
    rest = iter(lengths)
    pieces = [(next(rest), tuple(next(rest) for _ in range(number))) for number in num_responses]
    return PrefixLayout(
        tuple(prompt for prompt, _ in pieces),
        tuple(responses for _, responses in pieces),
        tuple(prompt.whole[0] for prompt in prompts if prompt.whole),
    )


def _cat(pieces: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [piece for piece in pieces if piece is not None]
    return torch.cat(present) if present else None


def _cat_if_all(pieces: Sequence[np.ndarray | None]) -> torch.Tensor | None:
    present = [np.asarray(piece, dtype=np.float32) for piece in pieces if piece is not None]
    return torch.from_numpy(np.concatenate(present)) if len(present) == len(pieces) else None
