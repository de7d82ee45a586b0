"""Passes over a step's groups: pack them, run every micro-batch, and total the metrics over ranks.

Every rank makes the same packing and runs the same number of micro-batches, so that FSDP's collectives match. The ranks
of a team run the same micro-batches at the same time, each its share of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rollout.types import Prompt
from rsgrpo.learning.packing import (
    CostModel,
    EncodedPrompt,
    EncodedResponse,
    Packing,
    Unit,
    build_micro_batch,
    pack,
)
from rsgrpo.learning.policy import Policy
from rsgrpo.learning.prompt_store import Item, PromptStore
from rsgrpo.learning.response_rows import ResponseRow, response_row, row_length
from rsgrpo.types import LossOutput, MicroBatch, RsgrpoError, Sample, TokenScores, TrainGroup

Logprobs = dict[tuple[int, int], np.ndarray]
"""(group, sample) -> (T,) float32."""

LossOf = Callable[[TokenScores, MicroBatch], LossOutput]
"""(scores of a micro-batch's tokens, the micro-batch) -> its share of the step's loss."""


class Passes:
    """This rank's passes through the policy.

    Args:
        max_tokens: of a micro-batch.
        filler_token_id: a token that may be sampled; micro-batches without work consist of it.
        banned_token_ids: tokens that no response may hold.
        balance_coef: weight of the loss that spreads tokens evenly over experts; 0 is off.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: PromptStore,
        device: torch.device,
        *,
        max_tokens: int,
        filler_token_id: int,
        banned_token_ids: Sequence[int],
        balance_coef: float = 0.0,
    ) -> None:
        self.policy, self.prompts, self.device = policy, prompts, device
        self.world_size = dist.get_world_size()
        self.num_teams = self.world_size // policy.team.size
        self.my_team = dist.get_rank() // policy.team.size
        self._max_tokens = max_tokens
        self._filler_token_id = filler_token_id
        self._banned_token_ids = banned_token_ids
        self._balance_coef = balance_coef
        self._cost_model = cost_model(policy)
        self._homes: dict[str, int] = {}
        self._counted: dict[str, float] = {}

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        """Start to encode this team's share of the prompts that a later pass will need, and return at once.

        Every rank gets the same prompts. Later a group stays with the team that has its images, where that keeps the
        work balanced.
        """
        shares: list[list[Prompt]] = [[] for _ in range(self.num_teams)]
        loads = [0] * self.num_teams
        lengths = self.prompts.count_tokens(prompts, unreadable=0) if self.num_teams > 1 else [0] * len(prompts)
        for length, prompt in sorted(zip(lengths, prompts, strict=True), key=lambda pair: -pair[0]):
            team = loads.index(min(loads))
            shares[team].append(prompt)
            loads[team] += length
            self._homes[prompt.id] = team
        self.prompts.prefetch(shares[self.my_team])

    def pack(self, groups: Sequence[TrainGroup], chunks: Sequence[Sequence[int]]) -> list[Packing]:
        """Pack each chunk of group indices for one optimiser step; start to encode this rank's prompts. Collective.

        Raises:
            RsgrpoError: groups that cannot be trained on.
        """
        check_groups(groups, self._banned_token_ids)
        prompts = [group.prompt for group in groups]
        lengths = self.prompts.count_tokens(prompts)
        for group, length in zip(groups, lengths, strict=True):
            if group.prompt_experts_TLk is not None and len(group.prompt_experts_TLk) != length:
                raise RsgrpoError(
                    f"group {group.prompt.id}: experts of {len(group.prompt_experts_TLk)} prompt tokens, but the "
                    f"prompt has {length} here. Give engine and learner the same inputs.* settings"
                )
        homes: list[int | None] = []
        if self.num_teams > 1:  # rank 0's knowledge of who has which prompt: all ranks must pack alike
            homes = [self._homes.get(prompt.id) for prompt in prompts]
            dist.broadcast_object_list(homes, 0)
        samples = [[row_length(sample) for sample in group.samples] for group in groups]
        packings = [
            pack(
                {index: (lengths[index], samples[index]) for index in chunk},
                num_ranks=self.num_teams,
                max_tokens=self._max_tokens,
                cost_model=self._cost_model,
                homes=homes,
            )
            for chunk in chunks
        ]
        needed: list[Item] = []
        for units in (units for packing in packings for units in packing[self.my_team]):
            for unit in self._own(groups, units):
                group = groups[unit.group]
                needed += [group.prompt, *(row for row in _response_rows(group, unit) if row is not None)]
        self.prompts.start(needed)
        return packings

    def run(
        self,
        groups: Sequence[TrainGroup],
        packing: Packing,
        loss_of: LossOf,
        *,
        temperature: float,
        old: Logprobs | None = None,
        entropy_gradient: bool = False,
        learn: bool = True,
    ) -> dict[str, float]:
        """Add the gradient of the step's loss to the parameters; return its metrics over all ranks. Collective.

        learn: False computes the metrics only, without dropout and gradients.
        """
        self.policy.train(learn)
        shares: list[dict[str, torch.Tensor]] = []
        all_units = [unit for team in packing for units in team for unit in units]
        num_samples = sum(len(unit.samples) for unit in all_units)
        num_tokens = sum(len(groups[unit.group].samples[s].token_ids_T) for unit in all_units for s in unit.samples)
        with torch.set_grad_enabled(learn):
            for keys, batch in self._micro_batches(groups, packing, old, replays=True):
                scores = self.policy(batch, temperature, entropy_gradient)
                if keys:
                    output = loss_of(scores, batch)
                    loss = output.loss
                    shares.append(output.metrics | self.policy.routing.metrics(batch, num_tokens))
                    if self._balance_coef:
                        loss = loss + self._balance_coef * self.policy.routing.balance_loss(batch, num_samples)
                else:
                    loss = scores.logprobs_N.sum() * 0.0
                if learn:  # FSDP averages gradients over ranks, while the shares of the loss add up
                    torch.autograd.backward(loss * self.world_size)
        return self._total(shares)

    def logprobs(
        self, groups: Sequence[TrainGroup], packings: Sequence[Packing], temperature: float, *, replays: bool = True
    ) -> Logprobs:
        """Return the log-probabilities of this rank's responses, without dropout and gradients. Collective.

        replays: take the experts that the rollouts were sampled with, where they are recorded.
        """
        self.policy.eval()
        logprobs: Logprobs = {}
        with torch.no_grad():
            for packing in packings:
                for keys, batch in self._micro_batches(groups, packing, None, replays=replays):
                    logprobs_N = self.policy(batch, temperature, False).logprobs_N
                    if keys:
                        lengths = [len(groups[group].samples[sample].token_ids_T) for group, sample in keys]
                        pieces = torch.split(logprobs_N.float().cpu(), lengths)
                        logprobs |= {key: piece.numpy().copy() for key, piece in zip(keys, pieces, strict=True)}
        return logprobs

    def gather(self, logprobs: Logprobs) -> Logprobs:
        """Return the union of all ranks' log-probabilities, on every rank."""
        return {key: value for one in self._gathered(logprobs) for key, value in one.items()}

    def _micro_batches(
        self, groups: Sequence[TrainGroup], packing: Packing, old: Logprobs | None, *, replays: bool
    ) -> Iterator[tuple[list[tuple[int, int]], MicroBatch]]:
        """Yield this rank's share of every micro-batch of its team, with the (group, sample) of its responses.

        Without responses of its own it scores a token that teaches nothing, which keeps it in step with the others.
        """
        nothing = filler_sample(self._filler_token_id, num_terms=groups[0].samples[0].scope_KT.shape[0])
        for units in packing[self.my_team]:
            rows: list[tuple[EncodedPrompt, list[Sample]]] = []
            encoded: list[EncodedResponse | None] = []
            own = self._own(groups, units)
            for unit in own:
                group = groups[unit.group]
                rows.append((self.prompts.get(group.prompt), [group.samples[sample] for sample in unit.samples]))
                encoded += [None if row is None else self._encoded(row) for row in _response_rows(group, unit)]
            keys = [(unit.group, sample) for unit in own for sample in unit.samples]
            before = [old[key] for key in keys] if old is not None and keys else None
            experts = [groups[unit.group].prompt_experts_TLk for unit in own] if replays and own else None
            if not rows:
                rows = [(self._filler_prompt(), [])]
            if not keys:
                rows[0][1].append(nothing)
            batch = build_micro_batch(rows, before, encoded if keys else None, experts)
            yield keys, move(batch, self.device)

    def _own(self, groups: Sequence[TrainGroup], units: Sequence[Unit]) -> list[Unit]:
        """Return the units of a micro-batch with this rank's responses of them: all where it shares no rows."""
        team = self.policy.team
        if team.size == 1:
            return list(units)
        ranks = iter(team.deal([row_length(groups[unit.group].samples[s]) for unit in units for s in unit.samples]))
        return [replace(unit, samples=tuple(s for s in unit.samples if next(ranks) == team.rank)) for unit in units]

    def _encoded(self, row: ResponseRow) -> EncodedResponse:
        return EncodedResponse(self.prompts.get(row), torch.from_numpy(row.own_T))

    def _filler_prompt(self) -> EncodedPrompt:
        token_ids_T = torch.tensor([self._filler_token_id])
        whole = None if self.policy.team.size == 1 else (1, 1)  # the last token of a prompt is on every rank
        return EncodedPrompt(token_ids_T, torch.zeros(3, 1, dtype=torch.int64), whole=whole)

    def work(self) -> dict[str, float]:
        """Return what encoding prompts has cost all ranks since the last call. Collective."""
        counts = self.prompts.counts()
        mine = {key: count - self._counted.get(key, 0.0) for key, count in counts.items()}
        self._counted = counts
        everyone = self._gathered(mine)
        return {key: (max if key.startswith("time/") else sum)(each[key] for each in everyone) for key in mine}

    def _gathered(self, mine: Any) -> list[Any]:
        """Return every rank's object, in the order of ranks."""
        if self.world_size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, mine)
        return everyone

    def _total(self, shares: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Add the shares of micro-batches and ranks; of a key that ends in `_max` take the maximum."""
        values: dict[str, list[float]] = {}
        for share in self._gathered([{key: float(value) for key, value in share.items()} for share in shares]):
            for each in share:
                for key, value in each.items():
                    values.setdefault(key, []).append(value)
        return {key: max(v) if key.endswith("_max") else sum(v) for key, v in sorted(values.items())}


def _response_rows(group: TrainGroup, unit: Unit) -> list[ResponseRow | None]:
    """Return the rows of a unit's responses; None of one that read nothing."""
    return [response_row(_name(group, sample), group.samples[sample]) for sample in unit.samples]


def _name(group: TrainGroup, sample: int) -> str:
    return f"group {group.prompt.id}, sample {sample}"


def filler_sample(token_id: int, *, num_terms: int) -> Sample:
    """Return a response of one token that no loss term may teach."""
    shape = (num_terms, 1)
    return Sample(np.array([token_id]), np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.float32))


def check_groups(groups: Sequence[TrainGroup], banned_token_ids: Sequence[int]) -> None:
    """Refuse groups that the loss cannot be computed on.

    Raises:
        RsgrpoError: no group, a group without samples, an empty response, one with a token that is never sampled, or
            with observations in disorder.
    """
    if not groups:
        raise RsgrpoError("the learner was given no groups. Pass at least one")
    for group in groups:
        if not group.samples:
            raise RsgrpoError(f"group {group.prompt.id} has no samples. Leave it out")
        for index, sample in enumerate(group.samples):
            where = _name(group, index)
            shape = (sample.scope_KT.shape[0], len(sample.token_ids_T))
            if shape[1] == 0:
                raise RsgrpoError(f"{where}: the response has no tokens")
            if sample.scope_KT.shape != shape or sample.advantages_KT.shape != shape:
                raise RsgrpoError(
                    f"{where}: scope {sample.scope_KT.shape} and advantages {sample.advantages_KT.shape} must both be "
                    f"(terms, tokens) = {shape}"
                )
            banned = np.intersect1d(sample.token_ids_T, banned_token_ids)
            if len(banned):
                raise RsgrpoError(
                    f"{where}: the response contains vision token(s) {banned.tolist()}, which have no probability"
                )
            response_row(where, sample)
            if sample.experts_RLk is not None and len(sample.experts_RLk) != row_length(sample) - 1:
                raise RsgrpoError(
                    f"{where}: experts of {len(sample.experts_RLk)} tokens, but its row has {row_length(sample)}, of "
                    "which all but the last have experts"
                )


def move(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Return the micro-batch with every tensor on `device`."""
    if device.type == "cpu":
        return batch
    tensors: dict[str, Any] = {
        field.name: value.to(device, non_blocking=True)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }
    return dataclasses.replace(batch, **tensors)


def cost_model(policy: Policy) -> CostModel:
    """Return forward FLOPs of the policy's language model: 2 per weight and token, 4 per pair and hidden unit."""
    language_model = policy.family.language_model(policy.hf)
    config = language_model.config
    layer_weights = sum(parameter.numel() for parameter in language_model.layers.parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_attending = config.num_hidden_layers - len(policy.family.recurrent_layers(policy.hf))
    return CostModel(
        per_token=2.0 * layer_weights,
        per_pair=4.0 * num_attending * config.num_attention_heads * head_dim,
        per_response_token=2.0 * config.hidden_size * config.vocab_size,
    )
