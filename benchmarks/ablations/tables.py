"""What the trial of credit rules compares, and its tables, recomputed from the metrics of its finished runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rsgrpo.lab.compare import interval


@dataclass(frozen=True, slots=True)
class Arm:
    """One rule: what tables call it, and what it sets."""

    title: str
    overrides: tuple[str, ...]


ARMS = {
    "grpo": Arm("plain GRPO", ("algorithm=grpo",)),
    "causal": Arm("causal", ("algorithm=causal",)),
    "rs_grpo": Arm("RS-GRPO, own scope", ("algorithm=rs_grpo",)),
    "causal_sum": Arm(
        "causal, centred, by response", ("algorithm=causal", "algorithm.scale=none", "algorithm.average=response")
    ),
    "gdpo": Arm("GDPO", ("algorithm=gdpo",)),
    "per_scope": Arm("per scope (paper)", ("algorithm=per_scope",)),
    "grpo_clip": Arm("plain GRPO, gradient norm 0.1", ("algorithm=grpo", "learner.max_grad_norm=0.1")),
    "causal_clip": Arm("causal, gradient norm 0.1", ("algorithm=causal", "learner.max_grad_norm=0.1")),
}
BASELINE = "grpo"
LEVELS = ("easy", "two_hop", "yes_no")
STEPS, LAST = 40, 10
SETTINGS = (
    "recipe=demo",
    f"total_steps={STEPS}",
    "algorithm.prompts_per_step=6",
    "validation.at_start=false",
    f"validation.every={STEPS}",
    "checkpoint.every=10",
    "checkpoint.keep_best=0",
    "checkpoint.export=false",
    "tracking.store_rollouts=false",
    "validation.samples=2",
    "gate.every=0",
    "guards.action=warn",
)
"""What all runs share, beside the recipe's own settings: half its batch, for twice the seeds."""
RATES = (1.0, 2.0, 0.5)
TUNED_ON, TUNING_SEEDS = "easy", (101, 102)
"""Rates are chosen per arm on one level, on seeds that are not used afterwards."""

Run = dict[str, Any]


def read_runs(results: Path) -> list[Run]:
    """Return the finished runs.

    Raises:
        SystemExit: runs of one trial differ in settings, or those of one level in their warm start.
    """
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*/*/*.json"))]
    for what, kinds in (
        ("settings", {run["settings"] for run in runs}),
        *(
            (f"warm starts of {level}", {run["warm_start"] for run in runs if run["level"] == level})
            for level in LEVELS
        ),
    ):
        if len(kinds) > 1:
            raise SystemExit(
                f"{results}: its runs have {len(kinds)} different {what}; move those of one trial elsewhere"
            )
    return runs


def mean_over(name: str, first: int, last: int) -> Callable[[Run], float]:
    """Return the mean of a metric over steps from `first` to `last`."""

    def score(run: Run) -> float:
        column = run["metrics"][name]
        values = [value for step, value in zip(column["step"], column["value"], strict=True) if first <= step <= last]
        return float(np.mean(values))

    return score


SCORES: dict[str, Callable[[Run], float]] = {
    "sampled F1": mean_over("val/sampled/accuracy", STEPS, STEPS),
    "sampled evidence": mean_over("val/sampled/evidence", STEPS, STEPS),
    "greedy F1": mean_over("val/greedy/accuracy", STEPS, STEPS),
    "F1, area": mean_over("reward/accuracy/mean", 1, STEPS),
    "evidence, area": mean_over("reward/evidence/mean", 1, STEPS),
    f"F1, last {LAST}": mean_over("reward/accuracy/mean", STEPS - LAST + 1, STEPS),
    f"entropy, last {LAST}": mean_over("actor/entropy", STEPS - LAST + 1, STEPS),
}
"""Held-out scores after the run; means over the rollouts of all or of the last training steps, all of new prompts."""


TUNED_FOR = mean_over("reward/accuracy/mean", STEPS // 2 + 1, STEPS)
"""What rates are chosen by: F1 over the second half of the steps, which speed and plateau both raise."""


def tuned_rate(runs: Sequence[Run], arm: str) -> float | None:
    """Return the rate with which an arm's tuning runs scored best; None while some of them are missing."""
    found = {
        rate: [TUNED_FOR(run) for run in runs if is_tuning(run) and (run["arm"], run["rate"]) == (arm, rate)]
        for rate in RATES
    }
    if any(len(values) < len(TUNING_SEEDS) for values in found.values()):
        return None
    return max(RATES, key=lambda rate: float(np.mean(found[rate])))


def is_tuning(run: Run) -> bool:
    """Whether a run only serves to choose a rate."""
    return run["seed"] in TUNING_SEEDS


def tables(runs: Sequence[Run]) -> Iterator[str]:
    """Yield markdown: a table per level at equal rates, the tuning runs, then tables with the rate chosen per arm."""
    fresh = [run for run in runs if not is_tuning(run)]
    yield from level_tables([run for run in fresh if run["rate"] == 1], "the recipe's learning rate")
    tuning = [run for run in runs if is_tuning(run)]
    if tuning:
        yield tuning_table(tuning)
    tuned = {arm: rate for arm in ARMS if (rate := tuned_rate(tuning, arm)) is not None}
    if any(rate != 1 for rate in tuned.values()):
        yield from level_tables([run for run in fresh if run["rate"] == tuned.get(run["arm"])], "the rate of each arm")


def level_tables(runs: Sequence[Run], rates: str) -> Iterator[str]:
    """Yield a table for every level that has runs."""
    for level in LEVELS:
        here = [run for run in runs if run["level"] == level]
        if here:
            yield level_table(f"Level {level}, {rates}", here)


def tuning_table(runs: Sequence[Run]) -> str:
    """Return F1 over the second half of the tuning runs, by arm and rate."""
    rates, seeds = sorted(RATES), ", ".join(map(str, TUNING_SEEDS))
    lines = [f"Level {TUNED_ON}, F1 of training rollouts, steps {STEPS // 2 + 1} to {STEPS}, tuning seeds {seeds}", ""]
    lines += ["| rule | " + " | ".join(f"{rate:g} x" for rate in rates) + " |", "|---|" + "---|" * len(rates)]
    for arm, about in ARMS.items():
        cells = []
        for rate in rates:
            values = [TUNED_FOR(run) for run in runs if (run["arm"], run["rate"]) == (arm, rate)]
            cells.append(f"{np.mean(values):.3f} (n={len(values)})" if values else "")
        lines.append(f"| {about.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def level_table(title: str, runs: Sequence[Run]) -> str:
    """Return one level's scores by arm, with paired differences from plain GRPO over the seeds that both have run."""
    lines = [f"{title}: mean over n seeds; in brackets the paired difference from {ARMS[BASELINE].title}, 95%.", ""]
    lines += [f"| rule | rate | n | {' | '.join(SCORES)} |", "|---|---|---|" + "---|" * len(SCORES)]
    base = {run["seed"]: run for run in runs if run["arm"] == BASELINE}
    for arm, about in ARMS.items():
        mine = {run["seed"]: run for run in runs if run["arm"] == arm}
        if mine:
            rates = "/".join(sorted({f"{run['rate']:g}" for run in mine.values()}))
            cells = [cell(score, mine, {} if arm == BASELINE else base) for score in SCORES.values()]
            lines.append(f"| {about.title} | {rates} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(score: Callable[[Run], float], mine: dict[int, Run], base: dict[int, Run]) -> str:
    """Return a mean, and the paired difference from the runs of the same seeds in `base`."""
    mean = f"{np.mean([score(run) for run in mine.values()]):.3f}"
    pairs = [score(mine[seed]) - score(base[seed]) for seed in sorted(mine.keys() & base.keys())]
    if not pairs:
        return mean
    return f"{mean} [{interval(pairs)}]" if len(pairs) > 1 else f"{mean} [{pairs[0]:+.3f}]"
