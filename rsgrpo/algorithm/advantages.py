"""From scores to per-token advantages, as pure functions. Formulas and sources: docs/reference/algorithm.md.

A missing score (the reward did not apply) is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rewards.api import Credit, Span
from rsgrpo.algorithm.baselines import (
    SHRINKAGE,
    STD_EPS,
    centre,
    leave_one_out,
    spread,
    standardise,
    stratum_centre,
)
from rsgrpo.algorithm.scopes import token_mask
from rsgrpo.config.learner import AlgorithmConfig, Baseline, CreditRule, Scale
from rsgrpo.config.own_advantage import own_advantages
from rsgrpo.types import Sample, ScoredGroup, TrainGroup


@dataclass(frozen=True, slots=True)
class Rule:
    """How scores become advantages: the keys of `algorithm` that decide it.

    kind: which scores are compared and which tokens share an advantage; or "module:function" of the user's own.
    credit: which tokens a reward teaches: its own scope ("own"), everything before it is determined ("causal"), or the
        whole response ("whole").
    baseline, scale: of `per_reward`: what a score is compared with, and what the difference is divided by.
    """

    kind: str = "per_reward"
    credit: CreditRule = "own"
    baseline: Baseline = "group"
    scale: Scale = "std"

    @classmethod
    def of(cls, algorithm: AlgorithmConfig) -> Rule:
        """Return the rule that a run's configuration names."""
        return cls(algorithm.advantage, algorithm.credit, algorithm.baseline, algorithm.scale)


MaskedCredits = list[tuple[Credit, np.ndarray]]
Terms = tuple[np.ndarray, np.ndarray]
"""(K, T) scope and advantages of one rollout."""
CreditSet = frozenset[tuple[int, str]]
"""The (reward, key) of every credit that covers a token."""


def term_names(kind: str, reward_names_K: Sequence[str]) -> tuple[str, ...]:
    """Names of the loss terms that `kind` makes: one per reward, or a single one."""
    return tuple(reward_names_K) if _is_per_reward(kind) else (kind,)


def term_weights(kind: str, weights_K: Sequence[float]) -> tuple[float, ...]:
    """Loss weights of those terms. Where there is one term the reward weights are already inside its advantages."""
    return tuple(weights_K) if _is_per_reward(kind) else (1.0,)


def _is_per_reward(kind: str) -> bool:
    """Whether every reward is a loss term of its own, as it is with a function of the user's own."""
    return kind == "per_reward" or ":" in kind


def credit_group(scored: ScoredGroup, rule: Rule | str, weights_K: Sequence[float]) -> TrainGroup:
    """Turn one scored group into what the learner trains on, without looking at other groups."""
    return credit_groups([scored], rule, weights_K)[0]


def credit_groups(scored: Sequence[ScoredGroup], rule: Rule | str, weights_K: Sequence[float]) -> list[TrainGroup]:
    """Turn the scored groups of a step into what the learner trains on.

    Args:
        scored: groups whose rollouts have scores and character spans.
        rule: a kind alone means that kind with the defaults of the other fields.
        weights_K: weight of each reward, in the order of `reward_names_K`.
    """
    terms_PG = credit_terms(scored, rule if isinstance(rule, Rule) else Rule(rule), weights_K)
    return [_train_group(group, terms_G) for group, terms_G in zip(scored, terms_PG, strict=True)]


def credit_terms(scored: Sequence[ScoredGroup], rule: Rule, weights_K: Sequence[float]) -> list[list[Terms]]:
    """Return for every group and rollout the tokens that each loss term teaches, and their advantages in float64."""
    scored = [group if rule.credit == "own" else with_absent_credits(group) for group in scored]
    if rule.kind == "per_reward":
        return _per_reward(scored, rule)
    if _is_per_reward(rule.kind):
        return [_own(group, rule) for group in scored]
    if rule.kind == "per_scope":
        return [_per_scope(group, credit_masks(group, rule.credit), weights_K) for group in scored]
    return _whole_response(scored, rule.kind, weights_K)


def _train_group(scored: ScoredGroup, terms_G: Sequence[Terms]) -> TrainGroup:
    samples = tuple(
        Sample(
            token_ids_T=np.asarray(rollout.token_ids_T, dtype=np.int64),
            scope_KT=scope_KT,
            advantages_KT=np.where(scope_KT, advantages_KT, 0.0).astype(np.float32),
            rollout_logprobs_T=np.asarray(rollout.logprobs_T, dtype=np.float32),
            observations=rollout.observations,
            experts_RLk=rollout.experts_RLk,
        )
        for rollout, (scope_KT, advantages_KT) in zip(scored.group.rollouts, terms_G, strict=True)
    )
    return TrainGroup(scored.group.prompt, samples, scored.group.prompt_experts_TLk)


def determined_at(credit: Credit, num_chars: int) -> int:
    """Return the character after which a credit's score cannot change."""
    if credit.determined is not None:
        return credit.determined
    return num_chars if credit.span is None else credit.span.end


def with_absent_credits(scored: ScoredGroup) -> ScoredGroup:
    """Give every rollout a credit for each key of its group: 0, determined at the end, where it wrote none.

    The policy decides whether such a credit exists (a slot written, a turn taken), so that leaving it out of the
    baseline would bias the gradient. A reward that did not apply to a rollout at all stays as it is: the row decides.
    """
    keys_K = [
        sorted({credit.key for credits_K in scored.credits_GK for credit in credits_K[k]})
        for k in range(len(scored.reward_names_K))
    ]
    credits_GK = []
    for rollout, credits_K in zip(scored.group.rollouts, scored.credits_GK, strict=True):
        row = []
        for credits, keys in zip(credits_K, keys_K, strict=True):
            absent = set(keys) - {credit.key for credit in credits} if credits else ()
            row.append((*credits, *(Credit(key, 0.0, None, len(rollout.text)) for key in sorted(absent))))
        credits_GK.append(row)
    return replace(scored, credits_GK=credits_GK)


def credit_masks(scored: ScoredGroup, credit_rule: CreditRule) -> list[list[MaskedCredits]]:
    """For every rollout and reward, its credits and the (T,) tokens that each of them teaches."""

    def taught(credit: Credit, num_chars: int) -> Span | None:
        if credit_rule == "own":
            return credit.span
        return Span(0, num_chars if credit_rule == "whole" else determined_at(credit, num_chars))

    return [
        [
            [
                (credit, token_mask(rollout.token_spans_T, taught(credit, len(rollout.text)), len(rollout.text)))
                for credit in credits
            ]
            for credits in credits_K
        ]
        for rollout, credits_K in zip(scored.group.rollouts, scored.credits_GK, strict=True)
    ]


def _per_reward(scored: Sequence[ScoredGroup], rule: Rule) -> list[list[Terms]]:
    terms_PG = []
    for group in scored:
        masks_GK = credit_masks(group, rule.credit)
        advantages_KG = [_advantage_per_key(group, k, rule) for k in range(len(group.reward_names_K))]
        terms_PG.append([_on_tokens(group, g, masks_GK[g], advantages_KG, rule) for g in range(len(masks_GK))])
    return terms_PG


def _own(scored: ScoredGroup, rule: Rule) -> list[Terms]:
    masks_GK, advantages_KG = credit_masks(scored, rule.credit), own_advantages(scored, rule.kind)
    return [_on_tokens(scored, g, masks_K, advantages_KG, rule) for g, masks_K in enumerate(masks_GK)]


def _on_tokens(
    scored: ScoredGroup,
    g: int,
    masks_K: Sequence[MaskedCredits],
    advantages_KG: Sequence[Sequence[dict[str, float]]],
    rule: Rule,
) -> Terms:
    """Return one rollout's terms.

    Where several credits of one reward teach a token, it takes their sum: what is maximised is the sum of all credits.
    With `own` credit it takes their mean, as published: spans hardly overlap there but in tokens that fuse two of them.
    """
    covers_KT = np.zeros((len(masks_K), len(scored.group.rollouts[g].token_ids_T)))
    sum_KT = np.zeros_like(covers_KT)
    for k, masked in enumerate(masks_K):
        for credit, mask_T in masked:
            covers_KT[k] += mask_T
            sum_KT[k] += mask_T * advantages_KG[k][g][credit.key]
    return covers_KT > 0, sum_KT / np.maximum(covers_KT, 1) if rule.credit == "own" else sum_KT


def _advantage_per_key(scored: ScoredGroup, k: int, rule: Rule) -> list[dict[str, float]]:
    """Compare each key of reward k over the rollouts that have it: for every rollout, key -> advantage."""
    credits_G = [credits_K[k] for credits_K in scored.credits_GK]
    scores_by_key: dict[str, np.ndarray] = {}
    for g, credits in enumerate(credits_G):
        for credit in credits:
            scores_by_key.setdefault(credit.key, np.full(len(credits_G), np.nan))[g] = credit.score
    advantages_G: list[dict[str, float]] = [{} for _ in credits_G]
    for key, scores_G in scores_by_key.items():
        if rule.baseline in ("strata", "shrunken"):
            shrinkage = SHRINKAGE if rule.baseline == "shrunken" else 0.0
            compared_G = stratum_centre(scores_G, _strata(scored, k), shrinkage)
        else:
            compared_G = leave_one_out(scores_G) if rule.baseline == "leave_one_out" else centre(scores_G)
        if rule.scale == "std":
            compared_G = compared_G / (spread(scores_G) + STD_EPS)
        for g, advantage in enumerate(compared_G):
            if np.isfinite(scores_G[g]):
                advantages_G[g][key] = float(advantage)
    return advantages_G


def _strata(scored: ScoredGroup, k: int) -> list[tuple[float | None, ...]]:
    """For every rollout the scores of the rewards that are determined before reward k's scope begins."""
    strata = []
    for credits_K, scores_K, rollout in zip(scored.credits_GK, scored.scores_GK, scored.group.rollouts, strict=True):
        starts = [credit.span.start for credit in credits_K[k] if credit.span is not None]
        begins = min(starts, default=0)
        known = [
            j
            for j, credits in enumerate(credits_K)
            if j != k and credits and max(determined_at(credit, len(rollout.text)) for credit in credits) <= begins
        ]
        strata.append(tuple(scores_K[j] for j in known))
    return strata


def _per_scope(scored: ScoredGroup, masks_GK: list[list[MaskedCredits]], weights_K: Sequence[float]) -> list[Terms]:
    """The paper's form: tokens covered by the same set of rewards share one standardised, weighted mean score."""
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


COMPARED = {"grpo": standardise, "dr_grpo": centre, "rloo": leave_one_out}
"""How the kinds with one sum of all scores compare it within the group."""


def _whole_response(scored: Sequence[ScoredGroup], kind: str, weights_K: Sequence[float]) -> list[list[Terms]]:
    """The baselines: one number per rollout, on every token. A reward that did not apply adds nothing."""
    if kind == "gdpo":
        advantages_PG = _whitened([_summed_advantages(group, weights_K) for group in scored])
    else:
        advantages_PG = [
            COMPARED[kind](np.array([weighted_sum(scores_K, weights_K) for scores_K in group.scores_GK]))
            for group in scored
        ]
    terms_PG = []
    for group, advantages_G in zip(scored, advantages_PG, strict=True):
        shapes_G = [(1, len(rollout.token_ids_T)) for rollout in group.group.rollouts]
        terms_PG.append(
            [(np.ones(shape, bool), np.full(shape, a)) for shape, a in zip(shapes_G, advantages_G, strict=True)]
        )
    return terms_PG


def _summed_advantages(scored: ScoredGroup, weights_K: Sequence[float]) -> np.ndarray:
    """GDPO's first half (arXiv 2601.05242): every reward standardised in its group, then the weighted sum."""
    scores_GK = np.array([[np.nan if s is None else s for s in scores_K] for scores_K in scored.scores_GK], dtype=float)
    advantages_KG = np.stack([standardise(scores_G) for scores_G in scores_GK.T])
    return np.asarray(np.asarray(weights_K, dtype=float) @ advantages_KG)


def _whitened(advantages_PG: Sequence[np.ndarray]) -> list[np.ndarray]:
    """GDPO's second half: zero mean and unit standard deviation over all rollouts of the step."""
    flat = np.concatenate(list(advantages_PG))
    return [(advantages_G - flat.mean()) / (spread(flat) + STD_EPS) for advantages_G in advantages_PG]


def weighted_sum(scores_K: Sequence[float | None], weights_K: Sequence[float]) -> float:
    """Return sum_k w_k s_k over the rewards that applied; NaN when none did."""
    applied = [w * s for s, w in zip(scores_K, weights_K, strict=True) if s is not None]
    return sum(applied) if applied else float("nan")
