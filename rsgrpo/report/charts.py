"""Own which curves the report draws and in what order. Knows metric names, nothing of files or pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Curve = list[tuple[int, float]]
"""(step, value) by step, finite values only."""

ACTOR_ORDER = (
    "actor/entropy", "actor/grad_norm", "actor/loss", "actor/kl", "actor/clip_frac", "actor/mismatch_mean",
    "actor/mismatch_k3", "actor/mismatch_max", "actor/lr",
)  # fmt: skip
VALIDATION_COUNTS = ("num_prompts", "prompt_errors")
"""Names under `val/<mode>/` that are no scores."""

TITLES = {
    "actor/entropy": "Entropy",
    "actor/grad_norm": "Gradient norm",
    "actor/loss": "Loss",
    "actor/kl": "KL to the reference",
    "actor/clip_frac": "Clipped tokens",
    "actor/lr": "Learning rate",
    "actor/mismatch_mean": "Engine and trainer: mean |Δ log p|",
    "actor/mismatch_max": "Engine and trainer: max |Δ log p|",
    "actor/mismatch_k3": "Engine and trainer: k3",
    "rollout/truncated_frac": "Truncated responses",
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

    def take(keys: Sequence[str], section: str, title: str, name: Callable[[str], str]) -> None:
        keys = [key for key in keys if key in left]
        if keys:
            charts.append(_chart(section, title, [{"name": name(key), "points": left.pop(key)} for key in keys]))

    _validation_charts(left, take)
    _reward_charts(left, charts)
    for suffix, title in (("hit_rate", "Scope found (share of responses)"), ("token_frac", "Tokens in scope (share)")):
        keys = [key for key in left if key.startswith("scope/") and key.endswith(f"/{suffix}")]
        take(keys, "scopes", title, lambda key: key.split("/")[1])
    _length_chart(left, charts)
    for key in ACTOR_ORDER:
        take([key], "learning", TITLES[key], str)
    time_keys = sorted(key for key in left if key.startswith("time/"))
    take(time_keys, "speed", "Seconds a step", lambda key: key.removeprefix("time/"))
    sections = {
        "monitor/": "monitors",
        "rollout/": "responses",
        "actor/": "learning",
        "scope/": "scopes",
        "perf/": "speed",
    }
    for key in sorted(left):
        section = next((name for prefix, name in sections.items() if key.startswith(prefix)), "other")
        take([key], section, TITLES.get(key, key), str)
    return charts


def _chart(section: str, title: str, series: list[dict[str, Any]]) -> dict[str, Any]:
    return {"section": section, "title": title, "series": series}


def _validation_charts(left: dict[str, Curve], take: Callable[..., None]) -> None:
    """One chart per score, with its greedy and sampled curves."""
    found = {key: place for key in left if (place := split_validation(key))}
    for wanted in dict.fromkeys(name for _, name in found.values()):
        keys = [key for key, (_, name) in found.items() if name == wanted]
        take(keys, "validation", wanted, lambda key: found[key][0] or "validation")


def _reward_charts(left: dict[str, Curve], charts: list[dict[str, Any]]) -> None:
    """One chart per reward: its mean with a band of one standard deviation."""
    for key in [key for key in left if key.startswith("reward/") and key.endswith("/mean")]:
        name = key.split("/")[1]
        mean, std = left.pop(key), dict(left.pop(f"reward/{name}/std", []))
        series: dict[str, Any] = {"name": "mean", "points": mean}
        if std:
            series["low"] = [(step, value - std.get(step, 0.0)) for step, value in mean]
            series["high"] = [(step, value + std.get(step, 0.0)) for step, value in mean]
        charts.append(_chart("rewards", name, [series]))


def _length_chart(left: dict[str, Curve], charts: list[dict[str, Any]]) -> None:
    """Response lengths: the mean and the longest."""
    mean = left.pop("rollout/num_tokens_mean", None)
    if mean is None:
        return
    series = [{"name": "mean", "points": mean}]
    longest = left.pop("rollout/num_tokens_max", None)
    if longest is not None:
        series.append({"name": "longest", "points": longest})
    charts.append(_chart("responses", "Response tokens", series))
