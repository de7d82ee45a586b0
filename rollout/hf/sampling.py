"""Choosing the next token: seeded draws, truncation, log-probabilities. Pure functions that know no model."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def rollout_uniforms(seed: int, prompt_id: str, rollout_index: int, num_draws: int) -> np.ndarray:
    """Return the draws of one rollout, (num_draws,) float64 in [0, 1).

    They depend on nothing but the arguments: not on the batch, its order, or how many draws are asked for (a longer
    row begins with the shorter one).
    """
    digest = hashlib.sha256(f"{seed}\0{rollout_index}\0{prompt_id}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big"))).random(num_draws)


def sample_tokens(
    logits_BV: torch.Tensor,
    uniforms_B: torch.Tensor | None,
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the distribution function, or take the best one.

    Args:
        logits_BV: (B, V) float32, -inf where a token is banned.
        uniforms_B: (B,) float64 in [0, 1); None for greedy.
        temperature: 0 is greedy.
        top_p: keep the smallest set of most likely tokens that holds this probability; 1.0 is off.
        top_k: keep the k most likely tokens; 0 is off. Applied before top_p.

    Returns:
        tokens_B: (B,) int64.
        logprobs_B: (B,) float32, log_softmax(logits / temperature) of the drawn token over the whole vocabulary,
        whatever top_p and top_k kept; at temperature 1 for greedy.
    """
    logprobs_BV = torch.log_softmax(logits_BV / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens_B = logprobs_BV.argmax(dim=-1)
    else:
        assert uniforms_B is not None
        weights_BV = logprobs_BV.double().exp()
        if top_k or top_p < 1:
            weights_BV = _truncated(weights_BV, top_p, top_k)
        mass_BV = weights_BV.cumsum(dim=-1)
        # Scaling by the row's own total keeps rounding from reaching past the last token that has any weight.
        target_B1 = uniforms_B[:, None] * mass_BV[:, -1:]
        tokens_B = torch.searchsorted(mass_BV, target_B1, right=True)[:, 0]
    return tokens_B, logprobs_BV.gather(-1, tokens_B[:, None])[:, 0]


def _truncated(weights_BV: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """Zero the tokens outside the k most likely, then those outside the nucleus of what is left."""
    sorted_BV, order_BV = weights_BV.sort(dim=-1, descending=True, stable=True)
    if top_k:
        sorted_BV[:, top_k:] = 0
    before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    sorted_BV[before_BV >= top_p * sorted_BV.sum(dim=-1, keepdim=True)] = 0
    return torch.zeros_like(weights_BV).scatter(-1, order_BV, sorted_BV)
