"""Several runs in one table: mean and standard deviation over seeds, and differences paired by seed."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rsgrpo.errors import InputError
from rsgrpo.records.tracking import METRICS_FILE, read_metrics

SEED = re.compile(r"[-_.]?seed[-_=]?(\d+)")
COUNTS = ("num_prompts", "num_tokens", "prompt_errors")
STEM = "(run)"


@dataclass(frozen=True, slots=True)
class RunScores:
    """The scores of one run. arm: its name without the seed. seed: "" without one. last: metric -> last value."""

    arm: str
    seed: str
    last: Mapping[str, float]


def read_scores(run_dir: Path) -> RunScores:
    """Return the last validation scores of a run.

    Raises:
        InputError: it is not a run folder, or has not been validated.
    """
    if not (run_dir / METRICS_FILE).is_file():
        raise InputError(f"{run_dir} is not a run folder (no {METRICS_FILE})")
    last: dict[str, float] = {}
    for row in read_metrics(run_dir):
        last |= {
            key: value
            for key, value in row.items()
            if key.startswith("val/") and value is not None and not key.endswith((*COUNTS, "_errors"))
        }
    if not last:
        raise InputError(f"{run_dir} has no validation scores")
    return RunScores(*_arm_and_seed(run_dir.resolve()), last)


def _arm_and_seed(run_dir: Path) -> tuple[str, str]:
    """Return a run's name without its seed, and the seed: as the name has it, else the settings'; "" for none."""
    name = run_dir.name
    if found := SEED.search(name):
        return SEED.sub("", name) or STEM, found[1]
    settings = run_dir / "config.yaml"
    found = (
        re.search(r"^seed: (\d+)$", settings.read_text(encoding="utf-8"), re.MULTILINE) if settings.is_file() else None
    )
    seed = found[1] if found else ""
    return (re.sub(rf"[-_.]{seed}$", "", name) if seed else name), seed


def table(runs: Sequence[RunScores]) -> str:
    """Return a line per arm and metric, and one per pair of arms that share two seeds or more.

    Example: "val/sampled/accuracy  demo  0.750 ± 0.050 (n = 3)".
    """
    arms: dict[str, list[RunScores]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    metrics = sorted({key for run in runs for key in run.last})
    rows = [
        (metric, arm, spread(values))
        for metric in metrics
        for arm, members in arms.items()
        if (values := [run.last[metric] for run in members if metric in run.last])
    ]
    names = list(arms)
    rows += [
        (metric, f"{second} - {first}", spread(differences, signed=True))
        for metric in metrics
        for first, second in itertools.combinations(names, 2)
        if (differences := paired(arms[first], arms[second], metric))
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{metric:<{widths[0]}}  {arm:<{widths[1]}}  {text}" for metric, arm, text in rows)


def paired(first: Sequence[RunScores], second: Sequence[RunScores], metric: str) -> list[float]:
    """Return second minus first for every seed that both have; [] for fewer than two."""
    by_seed = {run.seed: run.last[metric] for run in first if run.seed and metric in run.last}
    found = [run.last[metric] - by_seed[run.seed] for run in second if run.seed in by_seed and metric in run.last]
    return found if len(found) > 1 else []


def spread(values: Sequence[float], *, signed: bool = False) -> str:
    """Return mean and standard deviation (unbiased), with the standard error of the mean for a difference.

    >>> spread([0.7, 0.8])
    '0.750 ± 0.071 (n = 2)'
    """
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.3f}"
    if len(values) < 2:
        return f"{mean} (n = 1)"
    deviation = statistics.stdev(values)
    error = f", standard error {deviation / math.sqrt(len(values)):.3f}" if signed else ""
    return f"{mean} ± {deviation:.3f} (n = {len(values)}{', paired by seed' if signed else ''}{error})"
