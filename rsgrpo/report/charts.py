"""Choose the curves that the report draws, their order and their metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Curve = list[tuple[int, float]]
"""(step, value) by step, finite values only."""

VALIDATION_COUNTS = ("num_prompts", "prompt_errors")
"""Names under `val/<mode>/` that are not scores."""

ACTOR_TITLES = {
    "actor/entropy": "Entropy",
    "actor/grad_norm": "Gradient norm",
    "actor/loss": "Loss",
    "actor/kl": "KL to the reference",
    "actor/clip_frac": "Clipped tokens",
    "actor/mismatch_mean": "Engine and trainer: mean |Δ log p|",
    "actor/mismatch_k3": "Engine and trainer: k3",
    "actor/mismatch_max": "Engine and trainer: max |Δ log p|",
    "actor/lr": "Learning rate",
}
SECTIONS = {
    "monitor/": "monitors",
    "rollout/": "responses",
    "actor/": "learning",
    "scope/": "scopes",
    "perf/": "speed",
}


def collect_curves(lines: Iterable[dict[str, Any]]) -> dict[str, Curve]:
    """Return every metric as a curve; a key that is logged twice for a step keeps the later value."""
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        for key, value in line.items():
            if key not in ("step", "time") and isinstance(value, int | float):
                found.setdefault(key, {})[line["step"]] = float(value)
    return {key: sorted(points.items()) for key, points in found.items()}


def split_validation(key: str) -> tuple[str, str] | None:
    """Return (mode, name) of a validation score, or None for other metrics.

    Example: "val/greedy/accuracy" -> ("greedy", "accuracy"), "val/loss" -> ("", "loss"), "val/x/num_prompts" -> None.
    """
    if not key.startswith("val/"):
        return None
    _, *mode, name = key.split("/", 2)
    return None if name in VALIDATION_COUNTS else ("".join(mode), name)


def build_charts(curves: dict[str, Curve]) -> list[dict[str, Any]]:
    """Return the charts; every curve is in one of them.

    A chart is {"section", "title", "series": [{"name", "points", "low"?, "high"?}]}; low and high bound a band.
    """
    charts: list[dict[str, Any]] = []
    left = dict(curves)

    def take(section: str, title: str, names: Mapping[str, str]) -> None:
        """Move curves, key -> name in the legend, into a chart of their own."""
        series = [{"name": name, "points": left.pop(key)} for key, name in names.items() if key in left]
        if series:
            charts.append({"section": section, "title": title, "series": series})

    places = {key: place for key in left if (place := split_validation(key))}
    for wanted in dict.fromkeys(name for _, name in places.values()):
        take(
            "validation", wanted, {key: mode or "validation" for key, (mode, name) in places.items() if name == wanted}
        )
    for key in [key for key in left if key.startswith("reward/") and key.endswith("/mean")]:
        name = key.split("/")[1]
        std = dict(left.pop(f"reward/{name}/std", []))
        take("rewards", name, {key: "mean"})
        if std:
            low, high = _score_range(curves[key], std)
            charts[-1]["series"][0] |= {
                "low": [(step, max(low, value - std.get(step, 0.0))) for step, value in curves[key]],
                "high": [(step, min(high, value + std.get(step, 0.0))) for step, value in curves[key]],
            }
    for suffix, title in (("hit_rate", "Scope found (share of responses)"), ("token_frac", "Tokens in scope (share)")):
        found = [key for key in left if key.startswith("scope/") and key.endswith(f"/{suffix}")]
        take("scopes", title, {key: key.split("/")[1] for key in found})
    lengths = {"rollout/num_tokens_mean": "mean", "rollout/num_tokens_max": "longest"}
    take("responses", "Response tokens", lengths)
    for key, title in ACTOR_TITLES.items():
        take("learning", title, {key: key})
    times = sorted(key for key in left if key.startswith("time/"))
    take("speed", "Seconds per step", {key: key.removeprefix("time/") for key in times})
    for key in sorted(left):
        section = next((name for prefix, name in SECTIONS.items() if key.startswith(prefix)), "other")
        take(section, "Truncated responses" if key == "rollout/truncated_frac" else key, {key: key})
    return charts


def _score_range(means: Sequence[tuple[int, float]], std: Mapping[int, float]) -> tuple[float, float]:
    """Return the range that a score seems to have, so that its band stays inside: 0 to 1, -1 to 1, or unbounded.

    A quantity in [a, b] with mean m has a variance of at most (b - m)(m - a); a larger one shows that it is not.
    """
    for low, high in ((0.0, 1.0), (-1.0, 1.0)):
        if all(low <= m <= high and std.get(step, 0.0) ** 2 <= (high - m) * (m - low) + 1e-6 for step, m in means):
            return low, high
    return -math.inf, math.inf
