"""Forward and backward passes over a step's groups: plan, rows, micro-batches, metrics over ranks.

Every rank makes the same plan from the same groups and runs the same number of passes, so FSDP's collectives meet.
Knows nothing of optimisers; the loss is handed in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rollout.types import Prompt
from rsgrpo.learning.packing import CostModel, EncodedPrompt, Plan, Unit, build_micro_batch, plan
from rsgrpo.learning.policy import Policy
from rsgrpo.learning.prompt_store import PromptStore
from rsgrpo.types import LossOutput, MicroBatch, RsgrpoError, Sample, TokenScores, TrainGroup

Logprobs = dict[tuple[int, int], np.ndarray]
"""(group, sample) -> (T,) float32."""

LossOf = Callable[[MicroBatch, TokenScores], LossOutput]
"""(micro-batch, its tokens' scores) -> its share of the step's loss."""


class Passes:
    """This rank's passes through the policy.

    Args:
        filler_token_id: a token that may be sampled; rows without work are made of it.
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
    ) -> None:
        self.policy, self.prompts, self.device = policy, prompts, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._max_tokens = max_tokens
        self._filler_token_id = filler_token_id
        self._banned_token_ids = banned_token_ids
        self._cost_model = cost_model(policy)
        self._homes: dict[str, int] = {}
        self._counted: dict[str, float] = {}

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        """Let every rank begin to encode its share of prompts that a later pass will want; returns at once.

        Every rank gets the same prompts. A later plan leaves a group on the rank that has its images, where that costs
        no balance.
        """
        shares: list[list[Prompt]] = [[] for _ in range(self.world_size)]
        loads = [0] * self.world_size
        lengths = self.prompts.count_tokens(prompts, unreadable=0) if self.world_size > 1 else [0] * len(prompts)
        for length, prompt in sorted(zip(lengths, prompts, strict=True), key=lambda pair: -pair[0]):
            rank = loads.index(min(loads))
            shares[rank].append(prompt)
            loads[rank] += length
            self._homes[prompt.id] = rank
        self.prompts.prefetch(shares[self.rank])

    def plan_all(self, groups: Sequence[TrainGroup], chunks: Sequence[Sequence[int]]) -> list[Plan]:
        """Plan each chunk of group indices as one optimiser step, and start encoding this rank's prompts. Collective.

        Raises:
            RsgrpoError: groups that cannot be trained on.
        """
        check_groups(groups, self._banned_token_ids)
        lengths = self.prompts.count_tokens([group.prompt for group in groups])
        homes = self._homes_of(groups)
        plans = []
        for chunk in chunks:
            chunk_plan = plan(
                [lengths[index] for index in chunk],
                [[len(sample.token_ids_T) for sample in groups[index].samples] for index in chunk],
                num_ranks=self.world_size,
                max_tokens=self._max_tokens,
                cost_model=self._cost_model,
                homes=[homes[index] for index in chunk] if self.world_size > 1 else (),
            )
            plans.append(
                [
                    [[dataclasses.replace(unit, group=chunk[unit.group]) for unit in units] for units in micro_batches]
                    for micro_batches in chunk_plan
                ]
            )
        order = [unit.group for step_plan in plans for units in step_plan[self.rank] for unit in units]
        self.prompts.start([group.prompt for group in groups], order)
        return plans

    def _homes_of(self, groups: Sequence[TrainGroup]) -> list[int | None]:
        """Return rank 0's knowledge of who has which prompt: all ranks must plan alike."""
        homes = [self._homes.get(group.prompt.id) for group in groups]
        if self.world_size > 1:
            dist.broadcast_object_list(homes, 0)
        return homes

    def forward(self, groups: Sequence[TrainGroup], plans: Sequence[Plan], temperature: float) -> Logprobs:
        """Return the log-probabilities of this rank's responses, without gradients. Collective."""
        self.policy.eval()
        logprobs: Logprobs = {}
        with torch.no_grad():
            for units, batch in self._micro_batches(groups, plans, None):
                logprobs_N = self.policy(batch, temperature, False).logprobs_N
                keys = [(unit.group, sample) for unit in units for sample in unit.samples]
                lengths = [len(groups[group].samples[sample].token_ids_T) for group, sample in keys]
                if units:
                    pieces = logprobs_N.float().cpu().split(lengths)
                    logprobs |= {key: piece.numpy().copy() for key, piece in zip(keys, pieces, strict=True)}
        return logprobs

    def backward(
        self,
        groups: Sequence[TrainGroup],
        step_plan: Plan,
        loss_of: LossOf,
        *,
        temperature: float,
        old: Logprobs | None = None,
        entropy_gradient: bool = False,
    ) -> dict[str, float]:
        """Add the gradient of the step's loss to the parameters; return its metrics over all ranks. Collective."""
        self.policy.train()
        shares: list[dict[str, torch.Tensor]] = []
        for units, batch in self._micro_batches(groups, [step_plan], old):
            scores = self.policy(batch, temperature, entropy_gradient)
            if units:
                output = loss_of(batch, scores)
                loss = output.loss
                shares.append(output.metrics)
            else:
                loss = scores.logprobs_N.sum() * 0.0
            # FSDP averages gradients over ranks; the shares of the loss add up.
            (loss * self.world_size).backward()
        return self._total(shares)

    def losses(
        self, groups: Sequence[TrainGroup], step_plan: Plan, loss_of: LossOf, *, temperature: float
    ) -> dict[str, float]:
        """Return the step's metrics over all ranks without gradients. Collective."""
        self.policy.eval()
        shares: list[dict[str, torch.Tensor]] = []
        with torch.no_grad():
            for units, batch in self._micro_batches(groups, [step_plan], None):
                scores = self.policy(batch, temperature, False)
                if units:
                    shares.append(loss_of(batch, scores).metrics)
        return self._total(shares)

    def gather(self, logprobs: Logprobs) -> Logprobs:
        """Return the union of all ranks' log-probabilities, on every rank."""
        return {key: value for one in self._gathered(logprobs) for key, value in one.items()}

    def _micro_batches(
        self, groups: Sequence[TrainGroup], plans: Sequence[Plan], old: Logprobs | None
    ) -> Iterator[tuple[list[Unit], MicroBatch]]:
        for step_plan in plans:
            for units in step_plan[self.rank]:
                rows = [
                    (self.prompts.get(unit.group), [groups[unit.group].samples[sample] for sample in unit.samples])
                    for unit in units
                ]
                before = None if old is None else [[old[unit.group, s] for s in unit.samples] for unit in units]
                batch = build_micro_batch(rows, before) if units else self._filler(groups)
                yield units, move(batch, self.device)

    def _filler(self, groups: Sequence[TrainGroup]) -> MicroBatch:
        """Return a row of two tokens that teaches nothing: it keeps this rank in step with the others."""
        num_terms = groups[0].samples[0].scope_KT.shape[0]
        token = np.array([self._filler_token_id])
        prompt = EncodedPrompt(torch.from_numpy(token), torch.zeros(3, 1, dtype=torch.int64))
        sample = Sample(token, np.zeros((num_terms, 1), dtype=bool), np.zeros((num_terms, 1), dtype=np.float32))
        return build_micro_batch([(prompt, [sample])])

    def work(self) -> dict[str, float]:
        """Return what encoding prompts cost all ranks since the last call (docs/metrics.md). Collective."""
        prompts, cache = self.prompts, self.prompts.cache
        counts = {
            "time/encode_wait": prompts.wait_s,
            "perf/prompts_encoded": float(prompts.num_encoded),
            "perf/images_encoded": float(cache.misses - cache.read),
            "perf/features_reused": float(cache.hits),
        }
        if cache.folder is not None:
            counts |= {
                "perf/features_read": float(cache.read),
                "perf/features_evicted": float(cache.folder.evicted),
                "perf/features_failed": float(cache.folder.failures),
            }
        mine = {key: count - self._counted.get(key, 0.0) for key, count in counts.items()}
        self._counted = counts
        everyone = self._gathered(mine)
        return {key: (max if key.startswith("time/") else sum)(each[key] for each in everyone) for key in mine}

    def _gathered(self, mine: Any) -> list[Any]:
        """Return what every rank has, in the order of ranks."""
        if self.world_size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, mine)
        return everyone

    def _total(self, shares: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Add shares of micro-batches and ranks; a key that ends in `_max` takes the maximum."""
        keys = sorted({key for share in shares for key in share})
        mine = {key: [float(share[key]) for share in shares if key in share] for key in keys}
        everyone = self._gathered(mine)
        values = {key: [v for one in everyone for v in one.get(key, [])] for one in everyone for key in one}
        return {key: max(v) if key.endswith("_max") else sum(v) for key, v in sorted(values.items())}


def check_groups(groups: Sequence[TrainGroup], banned_token_ids: Sequence[int]) -> None:
    """Refuse groups that the loss cannot be computed on.

    Raises:
        RsgrpoError: no group, a group without samples, an empty response, or one with a token that is never sampled.
    """
    if not groups:
        raise RsgrpoError("the learner was given no group; a step needs at least one")
    for group in groups:
        if not group.samples:
            raise RsgrpoError(f"group {group.prompt.id} has no sample; leave it out")
        for index, sample in enumerate(group.samples):
            shape = (sample.scope_KT.shape[0], len(sample.token_ids_T))
            if shape[1] == 0:
                raise RsgrpoError(f"group {group.prompt.id}, sample {index}: the response has no token")
            if sample.scope_KT.shape != shape or sample.advantages_KT.shape != shape:
                raise RsgrpoError(
                    f"group {group.prompt.id}, sample {index}: scope {sample.scope_KT.shape} and advantages "
                    f"{sample.advantages_KT.shape} must both be (terms, tokens) = {shape}"
                )
            banned = np.intersect1d(sample.token_ids_T, banned_token_ids)
            if len(banned):
                raise RsgrpoError(
                    f"group {group.prompt.id}, sample {index}: the response holds vision token(s) {banned.tolist()}, "
                    "which have no probability"
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
    return CostModel(
        per_token=2.0 * layer_weights,
        per_pair=4.0 * config.num_hidden_layers * config.num_attention_heads * head_dim,
        per_response_token=2.0 * config.hidden_size * config.vocab_size,
    )
