"""The trial of credit rules: the same runs under every rule, from one warm start per level of the demo's questions.

    python -m benchmarks.ablations [--levels easy two_hop yes_no] [--arms grpo causal rs_grpo] [--seeds 8]
    python -m benchmarks.ablations --table        # only the tables, from the committed runs

Makes data, model and warm start of a level where they are missing, then runs what is missing of the plan. A part of the
plan is of use already: all arms of seed 1 on every level at the recipe's learning rate come first, then the next seeds;
then every arm's own rate is chosen, and arms whose rate is another one run again with it. A finished run is one small
json in --results and is not run again. Stop it at any time: a run resumes from its last checkpoint. All is in one
process, without Ray; a run takes about half a minute of one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablations.tables import (
    ARMS,
    LEVELS,
    RATES,
    SETTINGS,
    TUNED_ON,
    TUNING_SEEDS,
    read_runs,
    tables,
    tuned_rate,
)
from rollout.files import write_text
from rsgrpo.config.train import TrainConfig

RESULTS = Path(__file__).parent / "runs"
EXPORTED = "preprocessor_config.json"  # the file that an export writes last
KEPT = ("reward/", "monitor/", "actor/entropy", "actor/grad_norm", "actor/skipped", "rollout/num_tokens_mean", "val/")
"""The metrics of a run that its json holds; of rewards and monitors the means."""
OPTIMIZER = ("lr", "lr_schedule", "warmup_steps", "betas", "eps", "weight_decay", "max_grad_norm")


@dataclasses.dataclass(frozen=True, slots=True)
class Planned:
    """One run of the plan. rate: factor on the recipe's learning rate; None is the best of its arm's tuning runs."""

    level: str
    arm: str
    rate: float | None
    seed: int


def plan(levels: Sequence[str], arms: Sequence[str], num_seeds: int) -> Iterator[Planned]:
    """Yield every run of the trial, the most useful ones first."""
    for seed in range(1, num_seeds + 1):
        yield from (Planned(level, arm, 1.0, seed) for level in levels for arm in arms)
    for seed in TUNING_SEEDS:
        yield from (Planned(TUNED_ON, arm, rate, seed) for rate in RATES for arm in arms)
    for seed in range(1, num_seeds + 1):
        yield from (Planned(level, arm, None, seed) for level in levels for arm in arms)


def warm_start(folder: Path, level: str) -> Path:
    """Make a level's data, model and warm start where they are missing; return the exported policy."""
    home = folder / level
    home.mkdir(parents=True, exist_ok=True)
    for made, command in (
        ("demo/model", ["recipes.prepare", "demo", "--level", level]),
        ("demo/sft/export", ["recipes.sft", "recipe=sft_demo", "validation.every=0", "checkpoint.every=100"]),
    ):
        if not (home / made / EXPORTED).exists():
            print(f"{home}: python -m {' '.join(command)}", flush=True)
            subprocess.run([sys.executable, "-m", *command], cwd=home, check=True)
    return home / "demo/sft/export"


def run_once(home: Path, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """Train one arm from the warm start in `home`; return its metrics and what they were made with."""
    from rsgrpo import cli
    from rsgrpo.cluster.local import LocalCluster
    from rsgrpo.records.tracking import read_metrics
    from rsgrpo.running.run import Run, run_folder
    from rsgrpo.train import take_step

    shared = cli.compose(TrainConfig, overrides=list(SETTINGS))
    overrides = [
        *SETTINGS,
        *ARMS[arm].overrides,
        f"learner.lr={rate * shared.learner.lr}",
        f"seed={seed}",
        f"name={arm}-x{rate:g}-seed{seed}",
    ]
    config = cli.compose(TrainConfig, overrides=overrides)
    started = time.process_time()
    os.chdir(home)  # the recipe names data and model from here
    with Run.open(config, start_cluster=LocalCluster, line_every=config.total_steps) as run:
        run.validate_if_due()
        for step in run.steps_left:
            take_step(run, step)
    rows = read_metrics(run_folder(config))
    shutil.rmtree(run_folder(config))
    return {
        "commit": commit(),
        "settings": settings_digest(shared),
        "warm_start": digest((home / shared.model.path / "model.safetensors").read_bytes()),
        "lr": config.learner.lr,
        "cpu_seconds": round(time.process_time() - started),
        "metrics": kept_metrics(rows),
    }


def settings_digest(config: TrainConfig) -> str:
    """Return a short name of what all runs of a trial share, whatever keys a later version adds."""
    shared = {
        "overrides": SETTINGS,
        "rewards": [config.rewards, config.reward_args, config.reward_weights],
        "rollout": [config.rollout.group_size, config.rollout.temperature, config.rollout.max_response_tokens],
        "optimizer": [getattr(config.learner, name) for name in OPTIMIZER],
    }
    return digest(json.dumps(shared, sort_keys=True).encode())


def kept_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return metric -> its steps and values, rounded to five digits."""
    kept: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(KEPT) and not name.endswith("/std"):
                column = kept.setdefault(name, {"step": [], "value": []})
                column["step"].append(row["step"])
                column["value"].append(float(f"{value:.5g}"))
    return kept


def digest(content: bytes) -> str:
    """Return a short name of some bytes."""
    return hashlib.sha256(content).hexdigest()[:12]


def commit() -> str:
    """Return the commit of this code; "unknown" outside a clone."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def sweep(wanted: Iterable[Planned], folder: Path, results: Path) -> None:
    """Run what is missing of a plan."""
    for planned in wanted:
        rate = planned.rate or tuned_rate(read_runs(results), planned.arm)
        assert rate is not None  # the plan has all tuning runs before
        path = results / planned.level / planned.arm / f"x{rate:g}-seed{planned.seed}.json"
        if path.exists():
            continue
        home = warm_start(folder, planned.level).parent.parent.parent
        made = run_once(home, planned.arm, rate, planned.seed)
        named = {"level": planned.level, "arm": planned.arm, "rate": rate, "seed": planned.seed}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({**named, **made}) + "\n")
        print(f"{path}: {made['cpu_seconds']} s of CPU", flush=True)


def main() -> None:
    """Run what is missing; print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS), help="of the demo's questions")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="rules to run")
    parser.add_argument("--seeds", type=int, default=8, help="fresh seeds of every arm and level, from 1")
    parser.add_argument("--folder", type=Path, default=Path("ablations"), help="where levels and unfinished runs are")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the metrics of finished runs are")
    parser.add_argument("--table", action="store_true", help="run nothing; print the tables of finished runs")
    arguments = parser.parse_args()
    results = arguments.results.absolute()
    if not arguments.table:
        sweep(plan(arguments.levels, arguments.arms, arguments.seeds), arguments.folder.absolute(), results)
    print("\n\n".join(tables(read_runs(results))))
