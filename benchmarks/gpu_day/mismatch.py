"""How far the learner's log-probabilities are from those under which responses were sampled, by precision of each."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from benchmarks.gpu_day.day import Day
from benchmarks.gpu_day.rl import on_device, warm_start
from rsgrpo.records.tracking import read_metrics

MEASURED = ("actor/mismatch_mean", "actor/mismatch_max", "actor/mismatch_k3")


def run(day: Day) -> None:
    """Take one step of the demo under every pair of precisions; the difference is measured before the update."""
    from rsgrpo import cli
    from rsgrpo.config.train import TrainConfig
    from rsgrpo.running.run import Run
    from rsgrpo.train import take_step

    export = warm_start(day).resolve()
    few = ["algorithm.prompts_per_step=2", "rollout.group_size=2"]
    table = day.record.table(
        "|log-probability of the learner - of the sampler| per token, the demo after its warm start",
        ["sampler", "learner", "mean", "largest", "k3"],
    )
    started = Path.cwd()
    os.chdir(day.work)  # the recipe names its files from there
    try:
        for sampler in ("float32", "bfloat16"):
            for learner in ("float32", "bfloat16"):
                name = f"mismatch_{sampler}_{learner}"
                shutil.rmtree(Path("runs") / name, ignore_errors=True)
                overrides = [
                    "recipe=demo",
                    "cluster=inline",
                    f"name={name}",
                    f"model.path={export}",
                    "validation.every=0",
                    "validation.at_start=false",
                    "checkpoint.keep_best=0",
                    "gate.every=0",
                    f"rollout.dtype={sampler}",
                    f"learner.precision={learner}",
                    *on_device(day),
                    *day.pick([], few),
                ]
                with Run.open(cli.compose(TrainConfig, overrides=overrides)) as run:
                    take_step(run, 1)
                    row = read_metrics(run.folder)[-1]
                day.record.row(table, sampler, learner, *(row.get(key) for key in MEASURED))
    finally:
        os.chdir(started)
