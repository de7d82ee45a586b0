"""Stop a run, or warn, when a metric has been out of its bounds for several steps.

Rules are read by `rsgrpo.config.guards`; `rsgrpo.running.run` saves the run and ends it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rollout.keys import nearest
from rsgrpo.config.guards import GuardsConfig, Rule, scored_name
from rsgrpo.errors import InputError, RsgrpoError

GUARD_EXIT_CODE = 3


class GuardBroken(RsgrpoError):
    """A metric has been out of its bounds for too long; the run is saved and ends with an exit code of its own."""

    exit_code = GUARD_EXIT_CODE


class Guards:
    """Counts, per rule, the consecutive steps that broke it; steps that did not measure its metric do not count."""

    def __init__(self, config: GuardsConfig, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        """Start counting.

        earlier: rows of metrics.jsonl of a run that is resumed.
        """
        self._stops = config.action == "stop"
        self._streaks = dict.fromkeys(config.parsed(), 0)
        self._seen: set[str] = set()
        for row in earlier:
            self._count({key: math.nan if value is None else value for key, value in row.items()})

    def check(self, step: int, metrics: Mapping[str, float]) -> str:
        """Count a step; return the message about broken rules, "" if there is none.

        Raises:
            InputError: no step so far has measured a rule's metric, and it does not belong to a reward or monitor
                (which may apply to no response of a step).
        """
        for rule in self._streaks:
            if rule.metric not in metrics and rule.metric not in self._seen and scored_name(rule.metric) is None:
                raise InputError(
                    f"guards.rules={{{rule.metric}: ...}}: step {step} does not measure {rule.metric}"
                    f"{nearest(rule.metric, metrics)}"
                )
        self._count(metrics)
        return "; ".join(
            f"{rule} (guards.rules) has not held for {streak} steps: at step {step} {rule.metric} is "
            f"{metrics[rule.metric]:.4g}"
            for rule, streak in self._streaks.items()
            if rule.metric in metrics and self._is_broken(rule, streak)
        )

    def _is_broken(self, rule: Rule, streak: int) -> bool:
        """Whether to report: once when it warns; when it stops, also right after a restart of the stopped run."""
        return streak >= rule.patience if self._stops else streak == rule.patience

    def _count(self, metrics: Mapping[str, float]) -> None:
        for rule, streak in self._streaks.items():
            if rule.metric in metrics:
                self._seen.add(rule.metric)
                self._streaks[rule] = 0 if rule.holds(metrics[rule.metric]) else streak + 1
