"""The loss as arithmetic: pure functions of tensors, every denominator an argument; no model, no configuration.

Axes: N response tokens of a micro-batch, one after the other; K loss terms. Every function returns a share of the
step's loss: shares of micro-batches and ranks add up, because what they are divided by belongs to the whole step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from rsgrpo.types import LossOutput, RsgrpoError, Sample, StepTotals, TokenScores

LOG_RATIO_LIMIT = 20.0
RATIOS = ("token", "gspo", "cispo")
KL_ESTIMATORS = ("k1", "k2", "k3")


def step_totals(samples: list[Sample]) -> StepTotals:
    """Count what the loss of one optimiser step is divided by.

    Every rank counts the same full list, so that no rank has to ask another.
    """
    num_terms = samples[0].scope_KT.shape[0]
    scope_tokens_K = np.zeros(num_terms, dtype=np.float64)
    active_K = np.zeros(num_terms, dtype=bool)
    for sample in samples:
        scope_tokens_K += sample.scope_KT.sum(1)
        active_K |= ((sample.advantages_KT != 0) & sample.scope_KT).any(1)
    return StepTotals(scope_tokens_K, active_K, sum(len(sample.token_ids_T) for sample in samples))


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
    *,
    ratio: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 3.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the surrogate of every term and token by `algorithm.ratio`, and where a clip decided."""
    if ratio not in RATIOS:
        raise RsgrpoError(f"algorithm.ratio must be one of {RATIOS}, got {ratio!r}")
    if ratio == "gspo":
        log_ratio_N = sequence_log_ratio(logprobs_N, old_logprobs_N, sample_index_N)
    else:
        log_ratio_N = token_log_ratio(logprobs_N, old_logprobs_N)
    if ratio == "cispo":
        return cispo_surrogate(log_ratio_N, logprobs_N, advantages_KN, clip_high=clip_high)
    return clipped_surrogate(log_ratio_N, advantages_KN, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def importance_weights(old_logprobs_N: torch.Tensor, rollout_logprobs_N: torch.Tensor, cap: float) -> torch.Tensor:
    """Return min(exp(old - engine), cap), detached: what corrects for sampling under slightly other probabilities."""
    return (old_logprobs_N - rollout_logprobs_N).detach().clamp(max=LOG_RATIO_LIMIT).exp().clamp(max=cap)


def kl_estimate(logprobs_N: torch.Tensor, ref_logprobs_N: torch.Tensor, estimator: str) -> torch.Tensor:
    """Return an estimate of KL(policy | reference) per token, with d = ref - new: k1 -d, k2 d²/2, k3 e^d - d - 1."""
    difference_N = ref_logprobs_N - logprobs_N
    if estimator == "k1":
        return -difference_N
    if estimator == "k2":
        return 0.5 * difference_N**2
    if estimator == "k3":
        bounded_N = difference_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return bounded_N.exp() - bounded_N - 1
    raise RsgrpoError(f"algorithm.kl_estimator must be one of {KL_ESTIMATORS}, got {estimator!r}")


def scoped_means(loss_KN: torch.Tensor, scope_KN: torch.Tensor, scope_tokens_K: torch.Tensor) -> torch.Tensor:
    """Return L_k = sum over scope of l / (T_k + 1e-8), shape (K,), T_k counted over the whole step."""
    return torch.where(scope_KN, loss_KN, 0.0).sum(1) / (scope_tokens_K + 1e-8)


def weighted_mean(loss_K: torch.Tensor, loss_weights_K: torch.Tensor, active_K: torch.Tensor) -> torch.Tensor:
    """Return sum_k w_k L_k / sum over active k of w_k. A term that is not active has no gradient."""
    return (loss_weights_K * loss_K).sum() / loss_weights_K[active_K].sum()


def policy_loss(
    logprobs_N: torch.Tensor,
    entropy_N: torch.Tensor,
    *,
    old_logprobs_N: torch.Tensor | None,
    advantages_KN: torch.Tensor,
    scope_KN: torch.Tensor,
    sample_index_N: torch.Tensor,
    rollout_logprobs_N: torch.Tensor | None,
    ref_logprobs_N: torch.Tensor | None,
    loss_weights_K: torch.Tensor,
    scope_tokens_K: torch.Tensor,
    active_K: torch.Tensor,
    response_tokens: int,
    importance_cap: float = 0.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    **surrogate_options: Any,
) -> LossOutput:
    """Return this micro-batch's share of the step's loss.

    Args:
        logprobs_N, entropy_N: of the policy, with gradient.
        old_logprobs_N: of the policy that the step started from; None on an on-policy step: old = new.detach().
        rollout_logprobs_N: of the engine; needed when importance_cap > 0.
        ref_logprobs_N: of the reference; needed when kl_coef > 0.
        loss_weights_K, scope_tokens_K, active_K, response_tokens: of the whole step.
        surrogate_options: ratio, clip_low, clip_high and dual_clip of `surrogate`.

    Raises:
        RsgrpoError: an unknown ratio or estimator, or logprobs that a term needs are missing.
    """
    old_N = logprobs_N.detach() if old_logprobs_N is None else old_logprobs_N
    loss_KN, clipped_KN = surrogate(logprobs_N, old_N, advantages_KN, sample_index_N, **surrogate_options)
    if importance_cap:
        if rollout_logprobs_N is None:
            raise RsgrpoError("algorithm.importance_cap > 0 needs the engine's logprobs, and a sample has none")
        loss_KN = loss_KN * importance_weights(old_N, rollout_logprobs_N, importance_cap)
    loss = weighted_mean(scoped_means(loss_KN, scope_KN, scope_tokens_K), loss_weights_K, active_K)
    metrics = {
        "actor/clip_frac": (clipped_KN & scope_KN & active_K[:, None]).sum() / scope_tokens_K[active_K].sum(),
        "actor/old_kl": (old_N - logprobs_N).detach().sum() / response_tokens,
    }
    if kl_coef:
        if ref_logprobs_N is None:
            raise RsgrpoError("algorithm.kl_coef > 0 needs reference logprobs, and a sample has none")
        kl = kl_estimate(logprobs_N, ref_logprobs_N, kl_estimator).sum() / response_tokens
        loss = loss + kl_coef * kl
        metrics["actor/kl"] = kl.detach()
    if entropy_coef:
        loss = loss - entropy_coef * entropy_N.sum() / response_tokens
    metrics["actor/loss"] = loss.detach()
    return LossOutput(loss, metrics)


def token_metrics(scores: TokenScores, *, response_tokens: int) -> dict[str, torch.Tensor]:
    """Return shares of the means over the step's response tokens: entropy, top probability, top tokens sampled."""
    return {
        "actor/entropy": scores.entropy_N.detach().sum() / response_tokens,
        "actor/top1_prob": scores.top_probs_N.sum() / response_tokens,
        "actor/top1_frac": scores.is_top_N.sum() / response_tokens,
    }


def mismatch(
    old_logprobs_N: torch.Tensor, rollout_logprobs_N: torch.Tensor, *, response_tokens: int
) -> Mapping[str, torch.Tensor]:
    """Compare the trainer's logprobs with the engine's: `mean` and `k3` are shares that add up, `max` is a maximum."""
    difference_N = (old_logprobs_N - rollout_logprobs_N).detach()
    bounded_N = difference_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return {
        "actor/mismatch_mean": difference_N.abs().sum() / response_tokens,
        "actor/mismatch_k3": (bounded_N.exp() - bounded_N - 1).sum() / response_tokens,
        "actor/mismatch_max": difference_N.abs().max(),
    }


def supervised_loss(logprobs_N: torch.Tensor, *, response_tokens: int) -> LossOutput:
    """Return this micro-batch's share of the mean negative log-likelihood per response token of the step."""
    loss = -logprobs_N.sum() / response_tokens
    return LossOutput(loss, {"actor/loss": loss.detach()})
