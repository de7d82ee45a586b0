"""Gradients of credit rules on equal rollouts, and what they have in common with the reference.

Only sums and inner products are kept: two vectors for the reference and one per rule, each as long as the trained
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from rsgrpo.algorithm.advantages import Rule, credit_groups, term_names, term_weights
from rsgrpo.config.train import AlgorithmConfig
from rsgrpo.lab.compare import block_masks, block_shares, token_weights
from rsgrpo.learning.learner import Learner
from rsgrpo.types import Sample, ScoredGroup, TrainGroup


@dataclass(frozen=True, slots=True)
class Reference:
    """The mean gradient of the weighted sum of scores over held-out batches.

    agreement: cosine between the means of its two halves; what noise is left in it lowers every cosine alike.
    """

    direction: torch.Tensor
    agreement: float
    norm: float


@dataclass
class Direction:
    """Gradients of one rule, or of one reward under it, over batches."""

    cosines: list[float] = field(default_factory=list)
    squared_norms: list[float] = field(default_factory=list)
    total: torch.Tensor | None = None

    def add(self, gradient: torch.Tensor, reference: Reference) -> None:
        """Take one batch's gradient; one that is zero is orthogonal to everything."""
        squared = float(gradient @ gradient)
        self.squared_norms.append(squared)
        self.cosines.append(float(gradient @ reference.direction) / math.sqrt(squared) if squared else 0.0)
        self.total = gradient if self.total is None else self.total + gradient

    @property
    def squared_norm_of_mean(self) -> float:
        """Return |mean gradient|²."""
        return 0.0 if self.total is None else float(self.total @ self.total) / len(self.squared_norms) ** 2


@dataclass
class Measured:
    """What one rule did to the measured batches.

    by_reward: of rules with a term per reward, on the first batches. shares, reward_shares: of |token weight| by block,
    one entry per batch.
    """

    whole: Direction = field(default_factory=Direction)
    by_reward: dict[str, Direction] = field(default_factory=dict)
    shares: list[dict[str, float]] = field(default_factory=list)
    reward_shares: dict[str, list[dict[str, float]]] = field(default_factory=dict)


def reference_gradient(
    learner: Learner,
    batches: Sequence[Sequence[ScoredGroup]],
    weights_K: Sequence[float],
    algorithm: AlgorithmConfig,
    advance: Callable[[], None],
) -> Reference:
    """Average the leave-one-out gradient of the weighted sum of scores, on whole responses."""
    plain = replace(algorithm, advantage="rloo", credit="own", baseline="group", scale="std", average="scope")
    halves: list[torch.Tensor | None] = [None, None]
    for index, scored in enumerate(batches):
        gradient = learner.gradient(credit_groups(scored, Rule.of(plain), weights_K), (1.0,), plain)
        before = halves[index % 2]
        halves[index % 2] = gradient if before is None else before + gradient
        advance()
    even, odd = halves
    assert even is not None
    assert odd is not None
    total = even + odd
    norm = float(total.norm())
    lengths = float(even.norm() * odd.norm())
    agreement = float(even @ odd) / lengths if lengths else 0.0
    return Reference(total / norm if norm else total, agreement, norm / len(batches))


def measure_batch(
    learner: Learner,
    scored: Sequence[ScoredGroup],
    weights_K: Sequence[float],
    algorithm: AlgorithmConfig,
    reference: Reference,
    measured: Measured,
    *,
    split: bool,
) -> list[TrainGroup]:
    """Add one batch's gradient under one rule to what is `measured`; return the credited groups.

    split: also take the gradient of every reward's term by itself. Rewards that teach nothing cost nothing.
    """
    groups = credit_groups(scored, Rule.of(algorithm), weights_K)
    loss_weights_K = term_weights(algorithm.advantage, weights_K)
    terms_K = term_names(algorithm.advantage, scored[0].reward_names_K)
    weights_PG = token_weights(groups, loss_weights_K, algorithm.average)
    blocks_PG = [[block_masks(group, g) for g in range(len(group.group.rollouts))] for group in scored]
    measured.shares.append(block_shares([[w_KT.sum(0) for w_KT in weights_G] for weights_G in weights_PG], blocks_PG))
    measured.whole.add(learner.gradient(groups, loss_weights_K, algorithm), reference)
    if split and algorithm.advantage == "per_reward":
        samples = [sample for group in groups for sample in group.samples]
        active_K = np.any([(sample.advantages_KT != 0).any(1) for sample in samples], axis=0)
        total_weight = sum(weight for weight, active in zip(loss_weights_K, active_K, strict=True) if active)
        for k, name in enumerate(terms_K):
            alone = learner.gradient(only_term(groups, k), loss_weights_K, algorithm)
            share = loss_weights_K[k] / total_weight if active_K[k] else 0.0
            measured.by_reward.setdefault(name, Direction()).add(share * alone, reference)
            mine_PG = [[w_KT[k] for w_KT in weights_G] for weights_G in weights_PG]
            measured.reward_shares.setdefault(name, []).append(block_shares(mine_PG, blocks_PG))
    return groups


def only_term(groups: Sequence[TrainGroup], term: int) -> list[TrainGroup]:
    """Return the groups with advantages of one loss term alone."""

    def kept(sample: Sample) -> Sample:
        advantages_KT = np.zeros_like(sample.advantages_KT)
        advantages_KT[term] = sample.advantages_KT[term]
        return replace(sample, advantages_KT=advantages_KT)

    return [replace(group, samples=tuple(map(kept, group.samples))) for group in groups]
