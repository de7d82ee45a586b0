"""How certain a score is: bootstrap intervals of ratios, and permutation tests of paired differences.

Every metric is a ratio of two sums over the items of a benchmark (the denominators of a mean are ones), so one
resampling serves all of them and keeps them paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
MAX_DRAWN_VALUES = 4_000_000  # random numbers held at once


@dataclass(frozen=True, slots=True)
class Ratio:
    """A metric before summing: above_N.sum() / below_N.sum(), both (N,) float64, one pair per item."""

    above_N: np.ndarray
    below_N: np.ndarray

    def value(self) -> float | None:
        """Return the metric; None if nothing is counted below."""
        below = float(self.below_N.sum())
        return float(self.above_N.sum()) / below if below else None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric and its 95% interval; all None if nothing is counted below.

    count: what is counted below: items for a mean, predicted positives for a precision.
    """

    value: float | None
    low: float | None
    high: float | None
    count: float


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of a prediction file minus another's on the same items, with its 95% bootstrap interval.

    p_value: two-sided, of a sign-flip permutation test. All None if nothing is counted below.
    """

    value: float | None
    low: float | None
    high: float | None
    p_value: float | None


def mean_of(values_N: np.ndarray, where_N: np.ndarray | None = None) -> Ratio:
    """Return the mean over all items, or over those `where_N`, as a ratio."""
    ones_N = np.ones(len(values_N)) if where_N is None else where_N.astype(float)
    return Ratio(values_N.astype(float) * ones_N, ones_N)


def estimate(ratios: Mapping[str, Ratio], num_samples: int, seed: int) -> dict[str, Estimate]:
    """Return each ratio's value and percentile-bootstrap interval, from the same resampled items.

    num_samples: bootstrap samples; 0 gives values without intervals.
    """
    samples_MS = _resample(ratios, num_samples, seed).T
    return {
        name: Estimate(ratio.value(), *_interval(samples_S), float(ratio.below_N.sum()))
        for (name, ratio), samples_S in zip(ratios.items(), samples_MS, strict=True)
    }


def compare(
    first: Mapping[str, Ratio], second: Mapping[str, Ratio], num_samples: int, num_permutations: int, seed: int
) -> dict[str, Difference]:
    """Return first minus second of each metric; both have the same items in the same order, and metrics are means.

    The p-value is that of the mean difference under random swaps of the two predictions of each item.
    """
    samples_MS = (_resample(first, num_samples, seed) - _resample(second, num_samples, seed)).T
    differences_MN = np.stack([first[name].above_N - second[name].above_N for name in first])
    p_values = _sign_flip(differences_MN, num_permutations, seed)
    result = {}
    for name, samples_S, p_value in zip(first, samples_MS, p_values, strict=True):
        left, right = first[name].value(), second[name].value()
        if left is None or right is None:
            result[name] = Difference(None, None, None, None)
        else:
            result[name] = Difference(left - right, *_interval(samples_S), p_value)
    return result


def _chunks(num_rows: int, num_items: int) -> Iterator[int]:
    """Yield row counts that add up to `num_rows`, each with a bounded number of values."""
    at_once = max(1, MAX_DRAWN_VALUES // max(1, num_items))
    while num_rows > 0:
        yield min(at_once, num_rows)
        num_rows -= at_once


def _resample(ratios: Mapping[str, Ratio], num_samples: int, seed: int) -> np.ndarray:
    """Return (S, M): each metric on each bootstrap sample; NaN where nothing was counted."""
    above_NM = np.stack([ratio.above_N for ratio in ratios.values()], axis=1)
    below_NM = np.stack([ratio.below_N for ratio in ratios.values()], axis=1)
    num_items, num_metrics = above_NM.shape
    if not num_items or not num_samples:
        return np.full((num_samples, num_metrics), np.nan)
    rng = np.random.default_rng(seed)
    parts = []
    for rows in _chunks(num_samples, num_items):
        counts_SN = rng.multinomial(num_items, np.full(num_items, 1 / num_items), size=rows).astype(float)
        below_SM = counts_SN @ below_NM
        parts.append(np.where(below_SM > 0, (counts_SN @ above_NM) / np.where(below_SM > 0, below_SM, 1), np.nan))
    return np.concatenate(parts)


def _interval(samples_S: np.ndarray) -> tuple[float | None, float | None]:
    known = samples_S[~np.isnan(samples_S)]
    if not len(known):
        return None, None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _sign_flip(differences_MN: np.ndarray, num_permutations: int, seed: int) -> list[float]:
    """Return p-values: the share of sign flips (the observed one included) whose sum is as far from zero."""
    observed_M = np.abs(differences_MN.sum(axis=1))
    as_far_M = np.ones(len(differences_MN))
    rng = np.random.default_rng(seed)
    for rows in _chunks(num_permutations, differences_MN.shape[1]):
        signs_SN = rng.integers(0, 2, (rows, differences_MN.shape[1])) * 2.0 - 1.0
        as_far_M += (np.abs(signs_SN @ differences_MN.T) >= observed_M - 1e-9).sum(axis=0)
    return (as_far_M / (1 + num_permutations)).tolist()
