"""Compute the metrics of one batch of rollouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from rsgrpo.types import ScoredGroup, TrainGroup


def rollout_metrics(scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """Return lengths, truncation and weight versions of a batch (`rollout/*`)."""
    rollouts = [rollout for group in scored for rollout in group.group.rollouts]
    lengths = np.array([len(rollout.token_ids_T) for rollout in rollouts])
    mixed = np.mean([bool(rollout.version_ends) for rollout in rollouts])
    return {
        "rollout/num_tokens_mean": float(lengths.mean()),
        "rollout/num_tokens_max": float(lengths.max()),
        "rollout/num_prompt_tokens_mean": float(np.mean([group.group.num_prompt_tokens for group in scored])),
        "rollout/truncated_frac": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
        "rollout/oldest_weights_version": float(min(rollout.weights_version for rollout in rollouts)),
        **({"rollout/mixed_weights_frac": float(mixed)} if mixed else {}),
    }


def turn_metrics(scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """Return turns, observations and their faults of a batch that had an environment (`rollout/turns*`)."""
    rollouts = [rollout for group in scored for rollout in group.group.rollouts]
    read = [observation for rollout in rollouts for observation in rollout.observations]
    turns = np.array([1 + sum(o.at < len(rollout.token_ids_T) for o in rollout.observations) for rollout in rollouts])
    return {
        "rollout/turns_mean": float(turns.mean()),
        "rollout/turns_max": float(turns.max()),
        "rollout/turns_called_frac": float(
            np.mean([any(o.token_ids_S for o in each.observations) for each in rollouts])
        ),
        "rollout/turns_stopped_frac": float(np.mean([rollout.finish_reason == "stop" for rollout in rollouts])),
        "rollout/turns_limit_frac": float(np.mean([rollout.finish_reason == "turns" for rollout in rollouts])),
        "rollout/turns_faulty_frac": sum(bool(o.fault) for o in read) / max(1, len(read)),
        "rollout/observation_tokens_mean": sum(len(o.token_ids_S) for o in read) / len(rollouts),
        "rollout/observation_images_mean": sum(len(o.images) for o in read) / len(rollouts),
        **{
            f"rollout/turns/{fault}": float(count)
            for fault, count in sorted(Counter(o.fault for o in read).items())
            if fault
        },
    }


def score_metrics(scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """Return mean and std of every reward, and the mean of every monitor, over the rollouts where it applied."""
    metrics = {}
    for name, scores in _reward_values(scored).items():
        metrics[f"reward/{name}/mean"] = float(scores.mean())
        metrics[f"reward/{name}/std"] = float(scores.std())
    for name, values in _monitor_values(scored).items():
        metrics[f"monitor/{name}/mean"] = float(values.mean())
    return metrics | {f"reward/{name}/errors": float(count) for name, count in _num_errors(scored).items()}


def scope_metrics(
    scored: Sequence[ScoredGroup], groups: Sequence[TrainGroup], terms: Sequence[str]
) -> dict[str, float]:
    """Return, per reward, how often its markers were found, and, per loss term, the share of tokens it may teach."""
    metrics = {}
    for k, name in enumerate(scored[0].reward_names_K):
        found = [
            not missed_K[k]
            for group in scored
            for missed_K, scores_K in zip(group.missed_GK, group.scores_GK, strict=True)
            if scores_K[k] is not None
        ]
        if found:
            metrics[f"scope/{name}/hit_rate"] = float(np.mean(found))
    samples = [sample for group in groups for sample in group.samples]
    num_tokens = sum(len(sample.token_ids_T) for sample in samples)
    for k, name in enumerate(terms):
        metrics[f"scope/{name}/token_frac"] = float(sum(sample.scope_KT[k].sum() for sample in samples) / num_tokens)
    return metrics


def validation_metrics(scored: Sequence[ScoredGroup], mode: str) -> dict[str, float]:
    """Return the mean of every reward and monitor of one validation mode as `val/<mode>/<name>`."""
    values = {**_reward_values(scored), **_monitor_values(scored)}
    metrics = {f"val/{mode}/{name}": float(scores.mean()) for name, scores in values.items()}
    metrics[f"val/{mode}/num_tokens"] = rollout_metrics(scored)["rollout/num_tokens_mean"]
    metrics[f"val/{mode}/num_prompts"] = float(len(scored))
    errors = _num_errors(scored)
    return metrics | {f"val/{mode}/{name}_errors": float(count) for name, count in errors.items()}


def _num_errors(scored: Sequence[ScoredGroup]) -> dict[str, int]:
    """Return how often each reward failed and was skipped; one that never failed is left out."""
    counts = {name: sum(group.num_errors_K[k] for group in scored) for k, name in enumerate(scored[0].reward_names_K)}
    return {name: count for name, count in counts.items() if count}


def _reward_values(scored: Sequence[ScoredGroup]) -> dict[str, np.ndarray]:
    """Return all scores of each reward, over the rollouts where it applied; one that never applied is left out."""
    return _columns(scored[0].reward_names_K, (scores_K for group in scored for scores_K in group.scores_GK))


def _monitor_values(scored: Sequence[ScoredGroup]) -> dict[str, np.ndarray]:
    return _columns(scored[0].monitor_names_M, (values_M for group in scored for values_M in group.monitors_GM))


def _columns(names: Sequence[str], rows: Iterable[Sequence[float | None]]) -> dict[str, np.ndarray]:
    columns: dict[str, list[float]] = {name: [] for name in names}
    for row in rows:
        for name, value in zip(names, row, strict=True):
            if value is not None:
                columns[name].append(value)
    return {name: np.array(values) for name, values in columns.items() if values}
