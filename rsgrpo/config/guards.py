"""Rules that bound the metrics of training: how they are written and parsed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from rollout.errors import ConfigError
from rollout.keys import check, key, nearest, require

DEFAULT_PATIENCE = 5
_OLD_RULE = re.compile(r"\s*([\w./-]+)\s*(>=|<=)\s*(\S+)\s*")


@dataclass(frozen=True, slots=True)
class Rule:
    """One metric and its bounds; the rule is broken after `patience` consecutive steps outside them."""

    metric: str
    min: float | None = None
    max: float | None = None
    patience: int = DEFAULT_PATIENCE

    def holds(self, value: float) -> bool:
        """Return whether a value is within the bounds; NaN is not."""
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max) and value == value

    def __str__(self) -> str:
        pairs = [(">=", self.min), ("<=", self.max)]
        return f"{self.metric} {' and '.join(f'{sign} {bound:g}' for sign, bound in pairs if bound is not None)}"


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
        """Return the rules; raises ConfigError for one that is malformed."""
        return [_parsed(metric, bounds) for metric, bounds in self.rules.items() if bounds is not None]


def _parsed(metric: str, bounds: Any) -> Rule:
    where = f"guards.rules={{{metric}: ...}}"
    if isinstance(bounds, str):
        old = _OLD_RULE.fullmatch(bounds)
        name, sign, number = old.groups() if old else ("METRIC", ">=", "0.1")
        new = f"{{{name}: {{{'min' if sign == '>=' else 'max'}: {number}}}}}"
        raise ConfigError(f'guards.rules.{metric}="{bounds}": rules are no longer text. Write guards.rules={new}.')
    form = "bounds such as {min: 0.1, patience: 5}"
    require(isinstance(bounds, dict), f"{where} must have {form}, got {bounds!r}")
    for name, value in bounds.items():
        require(name in ("min", "max", "patience"), f"{where} takes min, max and patience, got {name!r}")
        require(
            isinstance(value, int | float) and not isinstance(value, bool),
            f"{where} must have {form}: {name} must be a number, got {value!r}",
        )
    rule = Rule(metric, **bounds)
    require(rule.min is not None or rule.max is not None, f"{where} has no bound. Give it min or max.")
    require(
        rule.patience == int(rule.patience) >= 1,
        f"{where}: patience must be a whole number >= 1, got {rule.patience:g}",
    )
    require(
        not metric.startswith("val/"),
        f"{where}: only validation measures this metric. Use one that every step measures, such as "
        "reward/<name>/mean or monitor/<name>/mean.",
    )
    return rule


def check_names(config: GuardsConfig, rewards: Iterable[str], monitors: Iterable[str]) -> None:
    """Raise ConfigError for rules on rewards and monitors that the run does not have."""
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
