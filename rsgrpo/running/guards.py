"""A run that has left a bound of its metrics for several steps is stopped or warned about.

Rules are read by `rsgrpo.config.guards`. Where the run stands, and saving it, is `rsgrpo.running.run`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rsgrpo.config.guards import GuardsConfig, parse_rule, scored_name
from rsgrpo.config.limits import nearest
from rsgrpo.errors import InputError, RsgrpoError

GUARD_EXIT_CODE = 3


class GuardBroken(RsgrpoError):
    """A metric has been out of its bound for too long; the run is saved, and ends with an exit code of its own."""

    exit_code = GUARD_EXIT_CODE


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
            if rule.metric not in metrics and rule.metric not in self._seen and scored_name(rule.metric) is None:
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
