"""From scores to per-token advantages within one group, as pure functions. Formulas: docs/reference/algorithm.md.

A missing score (the reward did not apply) is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.api import Credit
from rsgrpo.algorithm.scopes import token_mask
from rsgrpo.types import Sample, ScoredGroup, TrainGroup

STD_EPS = 1e-6
WHOLE_RESPONSE_KINDS = ("grpo", "dr_grpo", "rloo")


def standardise(scores_G: np.ndarray) -> np.ndarray:
    """Return (s - mean) / (unbiased std + 1e-6) over the scores that are present; 0 for the others.

    Also 0 where fewer than two scores are present, and where all of them are equal.

    >>> standardise(np.array([0.0, 1.0, np.nan])).round(3).tolist()
    [-0.707, 0.707, 0.0]
    """
    return _centre(scores_G, divide_by_std=True)


def centre(scores_G: np.ndarray) -> np.ndarray:
    """Return s - mean over the scores that are present (Dr. GRPO); 0 for the others."""
    return _centre(scores_G, divide_by_std=False)


def leave_one_out(scores_G: np.ndarray) -> np.ndarray:
    """Return s_i - mean of the other scores (RLOO); 0 for missing ones."""
    num_present = int(np.isfinite(scores_G).sum())
    return centre(scores_G) * (num_present / max(num_present - 1, 1))


def _centre(scores_G: np.ndarray, *, divide_by_std: bool) -> np.ndarray:
    advantages_G = np.zeros(len(scores_G))
    present_G = np.isfinite(scores_G)
    present = scores_G[present_G].astype(np.float64)
    if len(present) < 2 or present.min() == present.max():
        return advantages_G
    centred = present - present.mean()
    advantages_G[present_G] = centred / (present.std(ddof=1) + STD_EPS) if divide_by_std else centred
    return advantages_G


def term_names(kind: str, reward_names_K: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the loss terms of an advantage kind: one per reward, or a single one."""
    return tuple(reward_names_K) if kind == "per_reward" else (kind,)


def term_weights(kind: str, weights_K: Sequence[float]) -> tuple[float, ...]:
    """Return the loss weights of those terms; a single term has the reward weights inside its advantages already."""
    return tuple(weights_K) if kind == "per_reward" else (1.0,)


def credit_group(scored: ScoredGroup, kind: str, weights_K: Sequence[float]) -> TrainGroup:
    """Return what the learner trains on: the group with a scope and an advantage for every loss term and token.

    Args:
        scored: a group whose rollouts have scores and character spans.
        kind: "per_reward", "per_scope", "grpo", "dr_grpo" or "rloo".
        weights_K: weight of each reward, in the order of `scored.reward_names_K`.
    """
    masks_GK = _credit_masks(scored)
    if kind == "per_reward":
        terms_G = _per_reward(scored, masks_GK)
    elif kind == "per_scope":
        terms_G = _per_scope(scored, masks_GK, weights_K)
    else:
        terms_G = _whole_response(scored, kind, weights_K)
    samples = []
    for rollout, (scope_KT, advantages_KT) in zip(scored.group.rollouts, terms_G, strict=True):
        samples.append(
            Sample(
                token_ids_T=np.asarray(rollout.token_ids_T, dtype=np.int64),
                scope_KT=scope_KT,
                advantages_KT=np.where(scope_KT, advantages_KT, 0.0).astype(np.float32),
                rollout_logprobs_T=np.asarray(rollout.logprobs_T, dtype=np.float32),
            )
        )
    return TrainGroup(prompt=scored.group.prompt, samples=tuple(samples))


MaskedCredits = list[tuple[Credit, np.ndarray]]
Terms = tuple[np.ndarray, np.ndarray]
"""(K, T) scope and advantages of one rollout."""
CreditSet = frozenset[tuple[int, str]]
"""The (reward, key) of every credit that covers a token."""


def _credit_masks(scored: ScoredGroup) -> list[list[MaskedCredits]]:
    """Return, for every rollout and reward, its credits and the (T,) tokens that each of them covers."""
    return [
        [
            [(credit, token_mask(rollout.token_spans_T, credit.span, len(rollout.text))) for credit in credits]
            for credits in credits_K
        ]
        for rollout, credits_K in zip(scored.group.rollouts, scored.credits_GK, strict=True)
    ]


def _advantage_per_key(credits_G: Sequence[Sequence[Credit]]) -> list[dict[str, float]]:
    """Standardise each key over the rollouts that have it; return key -> advantage for every rollout."""
    advantages_G: list[dict[str, float]] = [{} for _ in credits_G]
    scores_by_key: dict[str, np.ndarray] = {}
    for index, credits in enumerate(credits_G):
        for credit in credits:
            scores_by_key.setdefault(credit.key, np.full(len(credits_G), np.nan))[index] = credit.score
    for key, scores_G in scores_by_key.items():
        for index, advantage in enumerate(standardise(scores_G)):
            if np.isfinite(scores_G[index]):
                advantages_G[index][key] = float(advantage)
    return advantages_G


def _per_reward(scored: ScoredGroup, masks_GK: list[list[MaskedCredits]]) -> list[Terms]:
    num_rewards = len(scored.reward_names_K)
    advantages_KG = [_advantage_per_key([credits_K[k] for credits_K in scored.credits_GK]) for k in range(num_rewards)]
    terms = []
    for index, rollout in enumerate(scored.group.rollouts):
        covers_KT = np.zeros((num_rewards, len(rollout.token_ids_T)))
        sum_KT = np.zeros_like(covers_KT)
        for k in range(num_rewards):
            for credit, mask_T in masks_GK[index][k]:
                covers_KT[k] += mask_T
                sum_KT[k] += mask_T * advantages_KG[k][index][credit.key]
        # A token that two spans of one reward share takes the mean of their advantages.
        terms.append((covers_KT > 0, sum_KT / np.maximum(covers_KT, 1)))
    return terms


def _per_scope(scored: ScoredGroup, masks_GK: list[list[MaskedCredits]], weights_K: Sequence[float]) -> list[Terms]:
    """Follow the paper: tokens covered by the same set of rewards share one standardised, weighted mean score."""
    num_rollouts = len(scored.group.rollouts)
    tokens_G: list[dict[CreditSet, np.ndarray]] = []
    scores_by_set: dict[CreditSet, np.ndarray] = {}
    for index, rollout in enumerate(scored.group.rollouts):
        covering = [(k, credit, mask_T) for k, masked in enumerate(masks_GK[index]) for credit, mask_T in masked]
        tokens: dict[CreditSet, np.ndarray] = {}
        for t in range(len(rollout.token_ids_T)):
            here = [(k, credit) for k, credit, mask_T in covering if mask_T[t]]
            if not here:
                continue
            members = frozenset((k, credit.key) for k, credit in here)
            if members not in tokens:
                tokens[members] = np.zeros(len(rollout.token_ids_T), dtype=bool)
                total_weight = sum(weights_K[k] for k, _ in here)
                score = sum(weights_K[k] * credit.score for k, credit in here) / total_weight
                scores_by_set.setdefault(members, np.full(num_rollouts, np.nan))[index] = score
            tokens[members][t] = True
        tokens_G.append(tokens)
    advantages_by_set = {members: standardise(scores_G) for members, scores_G in scores_by_set.items()}
    terms = []
    for index, tokens in enumerate(tokens_G):
        num_tokens = len(scored.group.rollouts[index].token_ids_T)
        scope_KT, advantages_KT = np.zeros((1, num_tokens), dtype=bool), np.zeros((1, num_tokens))
        for members, mask_T in tokens.items():
            scope_KT[0] |= mask_T
            advantages_KT[0, mask_T] = advantages_by_set[members][index]
        terms.append((scope_KT, advantages_KT))
    return terms


def _whole_response(scored: ScoredGroup, kind: str, weights_K: Sequence[float]) -> list[Terms]:
    """Follow the baselines: one weighted sum of all scores, on every token; a reward that did not apply adds 0."""
    sums_G = np.array([weighted_sum(scores_K, weights_K) for scores_K in scored.scores_GK])
    advantages_G = {"grpo": standardise, "dr_grpo": centre, "rloo": leave_one_out}[kind](sums_G)
    terms = []
    for rollout, advantage in zip(scored.group.rollouts, advantages_G, strict=True):
        shape = (1, len(rollout.token_ids_T))
        terms.append((np.ones(shape, dtype=bool), np.full(shape, advantage)))
    return terms


def weighted_sum(scores_K: Sequence[float | None], weights_K: Sequence[float]) -> float:
    """Return sum_k w_k s_k over the rewards that applied; NaN when none did."""
    applied = [w * s for s, w in zip(scores_K, weights_K, strict=True) if s is not None]
    return sum(applied) if applied else float("nan")
