"""The loss as arithmetic: pure functions of tensors whose denominators are arguments.

Formulas: docs/reference/algorithm.md.

Axes: N response tokens of a micro-batch, one response after the other; K loss terms. Every function returns a share of
the step's loss. The shares of micro-batches and ranks add up, because their denominators belong to the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import get_args

import numpy as np
import torch

from rsgrpo.config.learner import Average, KlEstimator, Ratio
from rsgrpo.types import LossOutput, MicroBatch, RsgrpoError, Sample, StepTotals, TokenScores

LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True, slots=True)
class SurrogateConfig:
    """The keys of `algorithm` that the loss reads.

    ratio: of new to old probabilities, per token, per response ("gspo"), or as a detached weight ("cispo").
    clip_low, clip_high: the ratio is clipped to [1 - low, 1 + high].
    dual_clip: the most that a token with a negative advantage costs, in units of |A|; 0 is off.
    importance_cap: cap of the detached weight exp(old - engine logprob) per token; 0 is off.
    kl_coef, kl_estimator: weight and form of the KL term to the reference; 0 is off.
    distill_coef: weight of the distillation from a teacher; 0 is off. reward_coef: of the terms of the rewards.
    entropy_coef: weight of an entropy bonus.
    average: what a term's sum over tokens is divided by: the tokens of its scope, or all response tokens.
    """

    ratio: Ratio = "token"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    importance_cap: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    distill_coef: float = 0.0
    reward_coef: float = 1.0
    entropy_coef: float = 0.0
    average: Average = "scope"

    def __post_init__(self) -> None:
        for key, kinds in (("ratio", Ratio), ("kl_estimator", KlEstimator)):
            if getattr(self, key) not in get_args(kinds):
                raise RsgrpoError(f"algorithm.{key} must be one of {get_args(kinds)}, got {getattr(self, key)!r}")

    @classmethod
    def of(cls, keys: object) -> SurrogateConfig:
        """Return the part of an AlgorithmConfig that the loss reads."""
        return cls(**{field.name: getattr(keys, field.name) for field in fields(cls)})


def step_totals(
    samples: Sequence[Sample], loss_weights_K: Sequence[float], device: torch.device | str = "cpu"
) -> StepTotals:
    """Count the denominators of one optimiser step's loss.

    Every rank counts the same full list, so that no rank has to ask another.
    """
    scope_tokens_K = sum(sample.scope_KT.sum(1) for sample in samples)
    active_K = np.any([((sample.advantages_KT != 0) & sample.scope_KT).any(1) for sample in samples], 0)
    return StepTotals(
        loss_weights_K=torch.tensor(loss_weights_K, dtype=torch.float32, device=device),
        scope_tokens_K=torch.tensor(scope_tokens_K, dtype=torch.float32, device=device),
        active_K=torch.tensor(active_K, device=device),
        response_tokens=sum(len(sample.token_ids_T) for sample in samples),
    )


def token_log_ratio(logprobs_N: torch.Tensor, old_logprobs_N: torch.Tensor) -> torch.Tensor:
    """Return new - old, clamped to ±20."""
    return (logprobs_N - old_logprobs_N).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def sequence_log_ratio(
    logprobs_N: torch.Tensor, old_logprobs_N: torch.Tensor, sample_index_N: torch.Tensor
) -> torch.Tensor:
    """Return for each token the mean of new - old over all tokens of its response (GSPO), clamped to ±20."""
    num_samples = int(sample_index_N[-1]) + 1
    sums = logprobs_N.new_zeros(num_samples).index_add(0, sample_index_N, logprobs_N - old_logprobs_N)
    means = sums / torch.bincount(sample_index_N, minlength=num_samples)
    return means.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)[sample_index_N]


def clipped_surrogate(
    log_ratio_N: torch.Tensor, advantages_KN: torch.Tensor, *, clip_low: float, clip_high: float, dual_clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return max(-A rho, -A clip(rho, 1 - low, 1 + high)), for A < 0 at most -dual_clip A; and where a clip decided.

    >>> l, clipped = clipped_surrogate(torch.tensor([1.5]).log(), torch.tensor([[1.0]]), clip_low=0.2, clip_high=0.28,
    ...                                dual_clip=3.0)
    >>> round(l.item(), 4), clipped.item()
    (-1.28, True)
    """
    ratio_N = log_ratio_N.exp()
    unclipped_KN = -advantages_KN * ratio_N
    clipped_KN = -advantages_KN * ratio_N.clamp(1 - clip_low, 1 + clip_high)
    loss_KN = torch.maximum(unclipped_KN, clipped_KN)
    was_clipped_KN = clipped_KN > unclipped_KN
    if dual_clip:
        bound_KN = -dual_clip * advantages_KN
        over_KN = (advantages_KN < 0) & (loss_KN > bound_KN)
        loss_KN = torch.where(over_KN, bound_KN, loss_KN)
        was_clipped_KN = was_clipped_KN | over_KN
    return loss_KN, was_clipped_KN


def cispo_surrogate(
    log_ratio_N: torch.Tensor, logprobs_N: torch.Tensor, advantages_KN: torch.Tensor, *, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -sg(clip(rho, 0, 1 + high)) A new, and where the clip decided."""
    ratio_N = log_ratio_N.detach().exp()
    loss_KN = -ratio_N.clamp(0, 1 + clip_high) * advantages_KN * logprobs_N
    return loss_KN, (ratio_N > 1 + clip_high).expand_as(loss_KN)


def surrogate(
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    advantages_KN: torch.Tensor,
    sample_index_N: torch.Tensor,
    config: SurrogateConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the surrogate of every term and token by `config.ratio`, and where a clip decided."""
    if config.ratio == "gspo":
        log_ratio_N = sequence_log_ratio(logprobs_N, old_logprobs_N, sample_index_N)
    else:
        log_ratio_N = token_log_ratio(logprobs_N, old_logprobs_N)
    if config.ratio == "cispo":
        return cispo_surrogate(log_ratio_N, logprobs_N, advantages_KN, clip_high=config.clip_high)
    return clipped_surrogate(
        log_ratio_N,
        advantages_KN,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )


def importance_weights(old_logprobs_N: torch.Tensor, rollout_logprobs_N: torch.Tensor, cap: float) -> torch.Tensor:
    """Return min(exp(old - engine), cap), detached: what corrects for sampling under slightly other probabilities."""
    return (old_logprobs_N - rollout_logprobs_N).detach().clamp(max=LOG_RATIO_LIMIT).exp().clamp(max=cap)


def kl_estimate(logprobs_N: torch.Tensor, ref_logprobs_N: torch.Tensor, estimator: KlEstimator) -> torch.Tensor:
    """Return an estimate of KL(policy | reference) per token, with d = ref - new: k1 -d, k2 d²/2, k3 e^d - d - 1."""
    difference_N = ref_logprobs_N - logprobs_N
    if estimator == "k1":
        return -difference_N
    return 0.5 * difference_N**2 if estimator == "k2" else _k3(difference_N)


def _k3(difference_N: torch.Tensor) -> torch.Tensor:
    bounded_N = difference_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return bounded_N.exp() - bounded_N - 1


def scoped_means(loss_KN: torch.Tensor, scope_KN: torch.Tensor, scope_tokens_K: torch.Tensor) -> torch.Tensor:
    """Return L_k = sum over scope of l / (T_k + 1e-8), shape (K,), T_k counted over the whole step."""
    return torch.where(scope_KN, loss_KN, 0.0).sum(1) / (scope_tokens_K + 1e-8)


def weighted_mean(loss_K: torch.Tensor, loss_weights_K: torch.Tensor, active_K: torch.Tensor) -> torch.Tensor:
    """Return sum_k w_k L_k / sum over active k of w_k. A term that is not active has no gradient."""
    return (loss_weights_K * loss_K).sum() / loss_weights_K[active_K].sum()


def policy_loss(scores: TokenScores, batch: MicroBatch, *, totals: StepTotals, config: SurrogateConfig) -> LossOutput:
    """Return this micro-batch's share of the step's loss, and of the metrics of its tokens.

    scores: of the policy, with gradient. Where the batch has no old logprobs the step is on-policy: old = new.detach().

    Raises:
        RsgrpoError: the batch lacks engine or reference logprobs that the configuration needs.
    """
    old_N = scores.logprobs_N.detach() if batch.old_logprobs_N is None else batch.old_logprobs_N
    loss_KN, clipped_KN = surrogate(scores.logprobs_N, old_N, batch.advantages_KN, batch.sample_index_N, config)
    if config.importance_cap:
        if batch.rollout_logprobs_N is None:
            raise RsgrpoError("algorithm.importance_cap > 0 needs the engine's logprobs, and a sample has none")
        loss_KN = loss_KN * importance_weights(old_N, batch.rollout_logprobs_N, config.importance_cap)
    active_K, scope_tokens_K = totals.active_K, totals.scope_tokens_K
    counts_K = scope_tokens_K if config.average == "scope" else torch.full_like(scope_tokens_K, totals.response_tokens)
    terms_K = scoped_means(loss_KN, batch.scope_KN, counts_K)
    loss = config.reward_coef * weighted_mean(terms_K, totals.loss_weights_K, active_K)
    if config.distill_coef and not active_K.any():  # a step in which no reward has a signal learns from the teacher
        loss = scores.logprobs_N.sum() * 0.0
    metrics = {
        "actor/clip_frac": (clipped_KN & batch.scope_KN & active_K[:, None]).sum()
        / scope_tokens_K[active_K].sum().clamp_min(1),
        "actor/old_kl": (old_N - scores.logprobs_N).detach().sum() / totals.response_tokens,
    }
    if config.kl_coef:
        if batch.ref_logprobs_N is None:
            raise RsgrpoError("algorithm.kl_coef > 0 needs reference logprobs, and a sample has none")
        kl_N = kl_estimate(scores.logprobs_N, batch.ref_logprobs_N, config.kl_estimator)
        kl = kl_N.sum() / totals.response_tokens
        loss = loss + config.kl_coef * kl
        metrics["actor/kl"] = kl.detach()
    if config.distill_coef:
        if batch.ref_logprobs_N is None:
            raise RsgrpoError("algorithm.distill_coef > 0 needs the teacher's logprobs, and a sample has none")
        # On tokens that the policy sampled, k2's gradient is in expectation that of the reverse KL to the teacher.
        distilled_N = kl_estimate(scores.logprobs_N, batch.ref_logprobs_N, "k2")
        loss = loss + config.distill_coef * distilled_N.sum() / totals.response_tokens
        metrics["actor/teacher_kl"] = (scores.logprobs_N - batch.ref_logprobs_N).detach().sum() / totals.response_tokens
    if config.entropy_coef:
        loss = loss - config.entropy_coef * scores.entropy_N.sum() / totals.response_tokens
    if batch.rollout_logprobs_N is not None:
        metrics |= mismatch(old_N, batch.rollout_logprobs_N, response_tokens=totals.response_tokens)
    metrics |= token_metrics(scores, response_tokens=totals.response_tokens)
    return LossOutput(loss, {**metrics, "actor/loss": loss.detach()})


def supervised_loss(scores: TokenScores, *, response_tokens: int) -> LossOutput:
    """Return this micro-batch's share of the mean negative log-likelihood per response token of the step."""
    loss = -scores.logprobs_N.sum() / response_tokens
    return LossOutput(loss, {**token_metrics(scores, response_tokens=response_tokens), "actor/loss": loss.detach()})


def token_metrics(scores: TokenScores, *, response_tokens: int) -> dict[str, torch.Tensor]:
    """Return shares of the means over the step's response tokens: entropy, top probability, top tokens sampled."""
    return {
        "actor/entropy": scores.entropy_N.detach().sum() / response_tokens,
        "actor/top1_prob": scores.top_probs_N.sum() / response_tokens,
        "actor/top1_frac": scores.is_top_N.sum() / response_tokens,
    }


def mismatch(
    old_logprobs_N: torch.Tensor, rollout_logprobs_N: torch.Tensor, *, response_tokens: int
) -> dict[str, torch.Tensor]:
    """Compare the trainer's logprobs with the engine's: `mean` and `k3` are shares that add up, `max` is a maximum."""
    difference_N = (old_logprobs_N - rollout_logprobs_N).detach()
    return {
        "actor/mismatch_mean": difference_N.abs().sum() / response_tokens,
        "actor/mismatch_k3": _k3(difference_N).sum() / response_tokens,
        "actor/mismatch_max": difference_N.abs().max(),
    }
