"""Bounds that metrics of training must keep to: how the rules are written and read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from rollout.keys import check, key, nearest, require

DEFAULT_PATIENCE = 5
_OLD_RULE = re.compile(r"\s*([\w./-]+)\s*(>=|<=)\s*(\S+)\s*")


@dataclass(frozen=True, slots=True)
class Rule:
    """One metric and its bounds; it is broken after `patience` consecutive steps outside of them."""

    metric: str
    min: float | None = None
    max: float | None = None
    patience: int = DEFAULT_PATIENCE

    def holds(self, value: float) -> bool:
        """Whether a value keeps to the bounds; NaN does not."""
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max) and value == value

    def __str__(self) -> str:
        bounds = [
            f">= {self.min:g}" if self.min is not None else "",
            f"<= {self.max:g}" if self.max is not None else "",
        ]
        return f"{self.metric} {' and '.join(filter(None, bounds))}"


@dataclass(frozen=True)
class GuardsConfig:
    """What must stay true while a run trains."""

    rules: dict[str, Any] = key(
        {},
        "Metric of a step -> its bounds, such as {monitor/marked_rate/mean: {min: 0.1, patience: 5}}: min, max, and "
        "patience, the consecutive steps out of bounds that break the rule (default 5); null removes a rule.",
    )
    action: Literal["stop", "warn"] = key(
        "stop", "What a broken rule does: stop the run (with a checkpoint and exit code 3) or warn."
    )

    def __post_init__(self) -> None:
        check(self, "guards")
        self.parsed()

    def parsed(self) -> list[Rule]:
        """Return the rules.

        Raises:
            ConfigError: one cannot be read; names what is wrong with it.
        """
        return [_parsed(metric, bounds) for metric, bounds in self.rules.items() if bounds is not None]


def _parsed(metric: str, bounds: Any) -> Rule:
    where = f"guards.rules={{{metric}: ...}}"
    if isinstance(bounds, str):
        old = _OLD_RULE.fullmatch(bounds)
        name, sign, number = old.groups() if old else ("METRIC", ">=", "0.1")
        raise_as = f"{{{name}: {{{'min' if sign == '>=' else 'max'}: {number}}}}}"
        require(
            False, f'guards.rules.{metric}="{bounds}": rules are written as data now; write guards.rules={raise_as}'
        )
    form = "bounds such as {min: 0.1, patience: 5}"
    require(isinstance(bounds, dict), f"{where} must have {form}, got {bounds!r}")
    for name, value in bounds.items():
        require(name in ("min", "max", "patience"), f"{where} has no {name!r}; it takes min, max and patience")
        require(
            isinstance(value, int | float) and not isinstance(value, bool),
            f"{where} must have {form}: {name} is not a number, got {value!r}",
        )
    rule = Rule(metric, **bounds)
    require(rule.min is not None or rule.max is not None, f"{where} has no bound: give it min or max")
    require(
        rule.patience == int(rule.patience) >= 1,
        f"{where}: patience must be a whole number >= 1, got {rule.patience:g}",
    )
    require(
        not metric.startswith("val/"),
        f"{where}: this metric is measured by validation only; use one that every step measures, such as "
        "reward/<name>/mean or monitor/<name>/mean",
    )
    return rule


def check_names(config: GuardsConfig, rewards: Iterable[str], monitors: Iterable[str]) -> None:
    """Refuse rules on rewards and monitors that the run does not have.

    Raises:
        ConfigError: names the nearest.
    """
    known = {"reward": list(rewards), "monitor": list(monitors)}
    for rule in config.parsed():
        scored = scored_name(rule.metric)
        if scored is not None:
            kind = rule.metric.partition("/")[0]
            require(
                scored in known[kind],
                f"guards.rules={{{rule.metric}: ...}}: the run has no {kind} {scored!r}{nearest(scored, known[kind])}; "
                f"it has {', '.join(known[kind]) or 'none'} ({kind}s)",
            )


def scored_name(metric: str) -> str | None:
    """Return the reward or monitor of a metric such as "monitor/marked_rate/mean", None for other metrics."""
    kind, _, rest = metric.partition("/")
    return rest.partition("/")[0] if kind in ("reward", "monitor") else None
