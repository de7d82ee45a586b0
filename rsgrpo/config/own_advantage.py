"""An advantage of the user's own: `algorithm.advantage=my_module:function`.

The function takes the scores of one group, `scores_GK`, (G, K) float64: a row per rollout, a column per reward (per key
where a reward gives several credits), NaN where it did not apply. It returns an advantage for each, in the same shape;
a vector (G,) counts for every column. Each advantage is on the tokens that `algorithm.credit` says, and rewards stay
separate loss terms, as in `per_reward`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from rewards.api import RewardError
from rewards.loading import import_user_module
from rsgrpo.errors import InputError
from rsgrpo.types import ScoredGroup

OwnAdvantage = Callable[[np.ndarray], np.ndarray]


@cache
def load_advantage(target: str) -> OwnAdvantage:
    """Import the function that `module:function` names, from the Python path or the current directory.

    Raises:
        InputError: there is no such module or function.
    """
    module_name, _, name = target.partition(":")
    try:
        function: OwnAdvantage | None = getattr(import_user_module(module_name, name), name, None)
    except RewardError as error:
        raise InputError(f"algorithm.advantage: {error}") from error
    if not callable(function):
        raise InputError(f"algorithm.advantage={target}: the module '{module_name}' has no function '{name}'")
    return function


def own_advantages(scored: ScoredGroup, target: str) -> list[list[dict[str, float]]]:
    """Return, per reward and rollout, key -> advantage, as the user's function computes it.

    Raises:
        InputError: the function failed, or returned another shape or a number that is not finite.
    """
    num_rewards = len(scored.reward_names_K)
    columns = sorted(
        {(k, credit.key) for row_K in scored.credits_GK for k in range(num_rewards) for credit in row_K[k]}
    )
    place = {column: index for index, column in enumerate(columns)}
    scores_GK = np.full((len(scored.credits_GK), len(columns)), np.nan)
    for g, row_K in enumerate(scored.credits_GK):
        for k, credits in enumerate(row_K):
            for credit in credits:
                scores_GK[g, place[k, credit.key]] = credit.score
    advantages_GK = _checked(target, scores_GK)
    return [
        [
            {credit.key: float(advantages_GK[g, place[k, credit.key]]) for credit in row_K[k]}
            for g, row_K in enumerate(scored.credits_GK)
        ]
        for k in range(num_rewards)
    ]


def _checked(target: str, scores_GK: np.ndarray) -> np.ndarray:
    """Call the function on a copy; return its advantages in the shape of the scores."""
    try:
        found = np.asarray(load_advantage(target)(scores_GK.copy()), dtype=float)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"algorithm.advantage={target} failed on scores of shape {scores_GK.shape}: {type(error).__name__}: {error}"
        ) from error
    if found.shape == scores_GK.shape[:1]:
        found = np.repeat(found[:, None], scores_GK.shape[1], axis=1)
    if found.shape != scores_GK.shape:
        raise InputError(
            f"algorithm.advantage={target} returned the shape {found.shape} for scores of shape {scores_GK.shape}. "
            "Return the same shape, or one advantage per rollout."
        )
    if not np.isfinite(found[np.isfinite(scores_GK)]).all():
        raise InputError(
            f"algorithm.advantage={target} returned NaN or infinity where there is a score. Add a small number to the "
            "divisor, and use numpy's nan functions: a missing score is NaN."
        )
    return found
