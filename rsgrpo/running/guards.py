"""Bounds that metrics of training must keep to: a run that has left one for several steps is stopped or warned about.

Knows metrics by name and nothing of what they measure. Where the run stands, and saving it, is `rsgrpo.running.run`.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rsgrpo.config.limits import at_least, nearest, one_of, require
from rsgrpo.errors import InputError, RsgrpoError

GUARD_EXIT_CODE = 3
_RULE = re.compile(r"(?P<metric>[\w./-]+)\s*(?P<sign>>=|<=)\s*(?P<bound>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)")
_KEEPS = {">=": operator.ge, "<=": operator.le}


class GuardBroken(RsgrpoError):
    """A metric has been out of its bound for too long; the run is saved, and ends with an exit code of its own."""

    exit_code = GUARD_EXIT_CODE


@dataclass(frozen=True)
class GuardsConfig:
    """What must stay true while a run trains (docs/metrics.md).

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
        scored = _scored_name(rule.metric)
        if scored is not None:
            kind = rule.metric.partition("/")[0]
            require(
                scored in known[kind],
                f"guards.rules.{name}: the run has no {kind} {scored!r}{nearest(scored, known[kind])}; it has "
                f"{', '.join(known[kind]) or 'none'} ({kind}s)",
            )


def _scored_name(metric: str) -> str | None:
    """Return the reward or monitor of a metric such as "monitor/marked_rate/mean", None for other metrics."""
    kind, _, rest = metric.partition("/")
    return rest.partition("/")[0] if kind in ("reward", "monitor") else None


class Guards:
    """Counts, for each rule, the steps in a row that broke it; steps that did not measure its metric do not count."""

    def __init__(self, config: GuardsConfig, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        """Begin to count.

        earlier: the rows of metrics.jsonl of a run that is resumed.
        """
        self._config = config
        self._rules = [parse_rule(name, rule) for name, rule in config.rules.items()]
        self._streaks = dict.fromkeys(config.rules, 0)
        self._seen: set[str] = set()
        for row in earlier:
            self._count({key: math.nan if value is None else value for key, value in row.items()})

    def check(self, step: int, metrics: Mapping[str, float]) -> str:
        """Count a step; return what to say of rules that are broken, "" if there is nothing.

        Raises:
            InputError: no step so far has measured a rule's metric, and it is none of a reward or monitor, which may
                apply to no response of a step.
        """
        for rule in self._rules:
            if rule.metric not in metrics and rule.metric not in self._seen and _scored_name(rule.metric) is None:
                raise InputError(
                    f"guards.rules.{rule.name}: step {step} measures no {rule.metric}{nearest(rule.metric, metrics)}"
                )
        self._count(metrics)
        return "; ".join(
            f"{rule.text} (guards.rules.{rule.name}) has not held for {self._streaks[rule.name]} steps: at step {step} "
            f"{rule.metric} is {metrics[rule.metric]:.4g}"
            for rule in self._rules
            if rule.metric in metrics and self._is_broken(self._streaks[rule.name])
        )

    def _is_broken(self, streak: int) -> bool:
        """Whether to speak up: once when it warns; when it stops also after a stop, if the run was started again."""
        patience = self._config.patience
        return streak >= patience if self._config.action == "stop" else streak == patience

    def _count(self, metrics: Mapping[str, float]) -> None:
        for rule in self._rules:
            if rule.metric in metrics:
                self._seen.add(rule.metric)
                self._streaks[rule.name] = 0 if rule.holds(metrics[rule.metric]) else self._streaks[rule.name] + 1
