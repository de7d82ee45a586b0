"""What is said of gradients and credits, as pure functions: intervals, signal and noise, and shares of a response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewards.api import Span
from rsgrpo.algorithm.scopes import token_mask
from rsgrpo.types import ScoredGroup, TrainGroup

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Two-sided 95% quantile of Student's t for 1, 2, … degrees of freedom."""
REST = "no scope"


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over batches and half the width of its 95% interval."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half_width:.3f}"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values with its 95% t interval; of a single value the half-width is NaN.

    >>> print(interval([1.0, 2.0, 3.0]))
    +2.000 ± 2.484
    """
    count = len(values)
    mean = float(np.mean(values))
    if count < 2:
        return Interval(mean, math.nan)
    free = count - 1
    quantile = T_95[free - 1] if free <= len(T_95) else 1.96 + 2.37 / free + 2.82 / free**2  # Cornish-Fisher
    return Interval(mean, quantile * float(np.std(values, ddof=1)) / math.sqrt(count))


def signal_to_noise(squared_norms: Sequence[float], squared_norm_of_mean: float) -> float:
    """Return |E g|² / E|g - E g|² of one batch's gradient g, both estimated without bias from B batches.

    The signal is below zero, by chance, where there is next to none.

    >>> round(signal_to_noise([1.0, 4.0], 2.25), 3)  # gradients 1 and 2: mean 1.5, variance 0.5
    4.0
    """
    count = len(squared_norms)
    noise = (float(np.mean(squared_norms)) - squared_norm_of_mean) * count / (count - 1)
    signal = squared_norm_of_mean - noise / count
    return signal / noise if noise > 0 else math.inf


def token_weights(
    groups: Sequence[TrainGroup], loss_weights_K: Sequence[float], average: str
) -> list[list[np.ndarray]]:
    """Return what the loss multiplies each token's log-probability with, (K, T) per group and sample.

    In units of an advantage that teaches every token: w_k A_kt / T_k times all response tokens, over the sum of active
    w_k. T_k: tokens of the term's scope, or all of them where `average` is "response".
    """
    samples = [sample for group in groups for sample in group.samples]
    num_tokens = sum(len(sample.token_ids_T) for sample in samples)
    scope_tokens_K = np.sum([sample.scope_KT.sum(1) for sample in samples], axis=0)
    active_K = np.any([((sample.advantages_KT != 0) & sample.scope_KT).any(1) for sample in samples], axis=0)
    weights_K = np.asarray(loss_weights_K, dtype=float)
    per_token_K = weights_K / max(float(weights_K[active_K].sum()), 1e-12)
    if average == "scope":
        per_token_K = per_token_K * num_tokens / np.maximum(scope_tokens_K, 1)
    return [[sample.advantages_KT * per_token_K[:, None] for sample in group.samples] for group in groups]


def block_masks(scored: ScoredGroup, index: int) -> dict[str, np.ndarray]:
    """Return the blocks of one response, (T,) bool each: its tokens by which rewards' own scopes cover them.

    Boundaries are those of the scopes; a scope of the whole response makes none.

    >>> block_masks(scored, 0)  # accuracy on "<answer>…", evidence on what comes before
    {'evidence': array([ True,  True, False]), 'accuracy': array([False, False,  True])}
    """
    rollout = scored.group.rollouts[index]
    num_chars, num_tokens = len(rollout.text), len(rollout.token_ids_T)
    covered: dict[str, np.ndarray] = {}
    for name, credits in zip(scored.reward_names_K, scored.credits_GK[index], strict=True):
        for credit in credits:
            if credit.span is not None and credit.span != Span(0, num_chars):
                mask_T = token_mask(rollout.token_spans_T, credit.span, num_chars)
                covered[name] = covered.get(name, np.zeros(num_tokens, dtype=bool)) | mask_T
    labels_T = [" + ".join(name for name, mask_T in covered.items() if mask_T[t]) or REST for t in range(num_tokens)]
    return {label: np.array([each == label for each in labels_T]) for label in dict.fromkeys(labels_T)}


def block_shares(
    weights_PG: Sequence[Sequence[np.ndarray]], blocks_PG: Sequence[Sequence[dict[str, np.ndarray]]]
) -> dict[str, float]:
    """Return the share of the sum of |token weight| that falls on each block; zeros where every weight is 0.

    weights_PG: (T,) per group and sample.
    """
    sums: dict[str, float] = {}
    for weights_G, blocks_G in zip(weights_PG, blocks_PG, strict=True):
        for weights_T, blocks in zip(weights_G, blocks_G, strict=True):
            for label, mask_T in blocks.items():
                sums[label] = sums.get(label, 0.0) + float(np.abs(weights_T[mask_T]).sum())
    total = sum(sums.values())
    return {label: value / total if total else 0.0 for label, value in sums.items()}
