"""Bounds that metrics of training must keep to: how the rules are written and read."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from rsgrpo.config.limits import at_least, nearest, one_of, require

_RULE = re.compile(r"(?P<metric>[\w./-]+)\s*(?P<sign>>=|<=)\s*(?P<bound>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)")
_KEEPS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class GuardsConfig:
    """What must stay true while a run trains (docs/reference/metrics.md).

    rules: name -> "metric >= number" or "metric <= number", of what a step logs: "monitor/marked_rate/mean >= 0.1".
    patience: steps in a row that break a rule before it counts as broken.
    action: "stop" (a checkpoint is written, the exit code is 3) or "warn".
    """

    rules: dict[str, str] = field(default_factory=dict)
    patience: int = 5
    action: str = "stop"

    def __post_init__(self) -> None:
        at_least(1, guards__patience=self.patience)
        one_of("guards.action", self.action, ("stop", "warn"))
        for name, rule in self.rules.items():
            parse_rule(name, rule)


@dataclass(frozen=True, slots=True)
class Rule:
    """One bound. text: as it was written."""

    name: str
    metric: str
    sign: str
    bound: float
    text: str

    def holds(self, value: float) -> bool:
        """Whether a value keeps to the bound; NaN does not."""
        return bool(_KEEPS[self.sign](value, self.bound))


def parse_rule(name: str, text: str) -> Rule:
    """Read "metric >= number" or "metric <= number".

    Raises:
        ConfigError: it is neither, or the metric is one of validation.
    """
    found = _RULE.fullmatch(text.strip())
    require(
        found is not None,
        f'guards.rules.{name} must be "metric >= number" or "metric <= number", such as '
        f'"monitor/marked_rate/mean >= 0.1"; got {text!r}',
    )
    assert found is not None
    require(
        not found["metric"].startswith("val/"),
        f"guards.rules.{name}: {found['metric']} is measured by validation only; take what every step measures, "
        "such as reward/<name>/mean or monitor/<name>/mean",
    )
    return Rule(name, found["metric"], found["sign"], float(found["bound"]), text.strip())


def check_names(config: GuardsConfig, rewards: Iterable[str], monitors: Iterable[str]) -> None:
    """Refuse rules on rewards and monitors that the run does not have.

    Raises:
        ConfigError: names the nearest.
    """
    known = {"reward": list(rewards), "monitor": list(monitors)}
    for name, text in config.rules.items():
        rule = parse_rule(name, text)
        scored = scored_name(rule.metric)
        if scored is not None:
            kind = rule.metric.partition("/")[0]
            require(
                scored in known[kind],
                f"guards.rules.{name}: the run has no {kind} {scored!r}{nearest(scored, known[kind])}; it has "
                f"{', '.join(known[kind]) or 'none'} ({kind}s)",
            )


def scored_name(metric: str) -> str | None:
    """Return the reward or monitor of a metric such as "monitor/marked_rate/mean", None for other metrics."""
    kind, _, rest = metric.partition("/")
    return rest.partition("/")[0] if kind in ("reward", "monitor") else None
