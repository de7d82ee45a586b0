"""What a score is compared with: baselines and scales within a group, as pure functions of score arrays.

A missing score (the reward did not apply) is NaN and gets the advantage 0. Sources: docs/reference/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STD_EPS = 1e-6
SHRINKAGE = 2.0
"""Rollouts of prior weight that a stratum's mean has from the whole group."""


def standardise(scores_G: np.ndarray) -> np.ndarray:
    """Return (s - mean) / (unbiased std + 1e-6) over the scores that are present; 0 for the others.

    Also 0 where fewer than two scores are present, and where all of them are equal.

    >>> standardise(np.array([0.0, 1.0, np.nan])).round(3).tolist()
    [-0.707, 0.707, 0.0]
    """
    return centre(scores_G) / (spread(scores_G) + STD_EPS)


def spread(scores_G: np.ndarray) -> float:
    """Return the unbiased standard deviation of the scores that are present; 0 of fewer than two."""
    present = scores_G[np.isfinite(scores_G)].astype(np.float64)
    return float(present.std(ddof=1)) if len(present) > 1 else 0.0


def centre(scores_G: np.ndarray) -> np.ndarray:
    """Return s - mean over the scores that are present (Dr. GRPO); 0 for the others, and where all are equal."""
    advantages_G = np.zeros(len(scores_G))
    present_G = np.isfinite(scores_G)
    present = scores_G[present_G].astype(np.float64)
    if len(present) > 1 and present.min() != present.max():
        advantages_G[present_G] = present - present.mean()
    return advantages_G


def leave_one_out(scores_G: np.ndarray) -> np.ndarray:
    """Return s_i - mean of the other scores (RLOO); 0 for missing ones."""
    num_present = int(np.isfinite(scores_G).sum())
    return centre(scores_G) * (num_present / max(num_present - 1, 1))


def stratum_centre(scores_G: np.ndarray, strata_G: Sequence[object], shrinkage: float) -> np.ndarray:
    """Return s - (mean of the rollouts of the same stratum, shrunk towards the group's mean); 0 for missing scores.

    The baseline of Blockwise Advantage Estimation (arXiv 2602.10231); shrinkage 0 is the stratum's own mean, which
    leaves nothing to a rollout that is alone in its stratum.
    """
    advantages_G = centre(scores_G)
    for stratum in set(strata_G):
        here_G = np.array([other == stratum for other in strata_G]) & np.isfinite(scores_G)
        if here_G.any():
            count = int(here_G.sum())
            advantages_G[here_G] -= advantages_G[here_G].mean() * count / (count + shrinkage)
    return advantages_G
