"""Scores the policy on held-out prompts, greedily and by sampling."""

from __future__ import annotations

from collections.abc import Sequence

from rollout.types import Prompt, RolloutGroup, SamplingParams
from rsgrpo.algorithm.metrics import validation_metrics
from rsgrpo.config.train import ValidationConfig
from rsgrpo.errors import RsgrpoError
from rsgrpo.running.batches import SampleAndScore, derive_seed
from rsgrpo.types import ScoredGroup


def validation_modes(config: ValidationConfig, max_tokens: int, seed: int) -> dict[str, SamplingParams]:
    """Return the sampling of each mode that is switched on: "greedy" and "sampled". The seed never changes."""
    seed = derive_seed(seed, "val")
    modes = {}
    if config.greedy:
        modes["greedy"] = SamplingParams(group_size=1, temperature=0.0, max_tokens=max_tokens, seed=seed)
    if config.samples:
        modes["sampled"] = SamplingParams(
            group_size=config.samples,
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=max_tokens,
            seed=seed,
        )
    return modes


def validate_policy(
    prompts: Sequence[Prompt], modes: dict[str, SamplingParams], sample_and_score: SampleAndScore
) -> tuple[dict[str, float], dict[str, list[ScoredGroup]]]:
    """Sample and score every prompt in every mode.

    Returns:
        `val/<mode>/<reward or monitor>` and the scored groups of each mode, in the order of the prompts.
    """
    metrics: dict[str, float] = {}
    scored_by_mode = {}
    for mode, sampling in modes.items():
        scored: dict[str, ScoredGroup] = {}
        num_errors = 0
        for group in sample_and_score(prompts, sampling):
            if isinstance(group, RolloutGroup):
                num_errors += 1
            else:
                scored[group.group.prompt.id] = group
        if not scored:
            raise RsgrpoError(f"validation: none of the {len(prompts)} prompts could be sampled")
        scored_by_mode[mode] = [scored[prompt.id] for prompt in prompts if prompt.id in scored]
        metrics |= validation_metrics(scored_by_mode[mode], mode)
        if num_errors:
            metrics[f"val/{mode}/prompt_errors"] = float(num_errors)
    return metrics, scored_by_mode
