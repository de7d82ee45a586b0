"""Supervised fine-tuning on whole gold responses: `python -m recipes.sft recipe=sft_demo`.

The same data, learner, validation, checkpoints and export as `rsgrpo.train`; only the update differs. One rank runs in
this process, unless vLLM validates; several run under Ray.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rsgrpo.running.stopping import leave_on_signals

if __name__ == "__main__":
    leave_on_signals()  # before the slow imports

from rsgrpo import cli
from rsgrpo.config.checks import require_inputs, validate_sft
from rsgrpo.config.train import AlgorithmConfig, SftConfig, TrainConfig

if TYPE_CHECKING:
    from recipes.answers.gold_responses import GoldResponses
    from rsgrpo.running.run import Run
    from rsgrpo.types import TrainGroup

REWARDS = {name: f"rewards.evisrag:{name}" for name in ("accuracy", "evidence", "well_formed")}
MONITORS = {name: f"rewards.evisrag:{name}" for name in ("marked_rate", "abstained")}
STEPS_PER_LINE = 20


def sft(config: SftConfig) -> None:
    """Train one run to its last step.

    Raises:
        StopRequested: a signal asked it to stop; a checkpoint holds its progress.
    """
    validate_sft(config)
    require_inputs(config)
    # Read once, when torch is loaded: waiting threads must not occupy cores that others need.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from recipes.answers.gold_responses import GoldResponses
    from rsgrpo.cluster.build import build_cluster
    from rsgrpo.cluster.local import LocalCluster
    from rsgrpo.running.run import Run

    with Run.open(
        as_train_config(config),
        settings=dataclasses.asdict(config),
        start_cluster=LocalCluster
        if config.learner.num_ranks == 1 and config.rollout.engine != "vllm"
        else build_cluster,
        line_every=STEPS_PER_LINE,
    ) as run:
        gold = GoldResponses(config)
        if config.data.bad_rows == "error":
            gold.check(run.train_prompts)
        held_out, num_left_out = gold.groups(run.val_prompts)
        if num_left_out:
            run.console.warning(f"val/loss excludes {num_left_out} validation rows without a response to imitate")
        run.validate_if_due()
        run.cluster.rest_engines()
        for step in run.steps_left:
            take_step(run, step, gold, held_out)
        run.finish()
        if config.checkpoint.export:
            run.console.info(f"next: {next_command(sys.argv[1:], run.folder / 'export')}")


def next_command(arguments: Sequence[str], export: Path) -> str:
    """Return how to go on with training: the recipe whose name goes with the one that `arguments` chose."""
    recipe = next((argument.partition("=")[2] for argument in arguments if argument.startswith("recipe=")), "")
    wanted = recipe.removeprefix("sft_")
    names = cli.groups(TrainConfig)["recipe"]
    chosen = wanted if wanted in names else f"NAME (one of {', '.join(names)})"
    return f"python -m rsgrpo.train recipe={chosen} model.path={export}"


def take_step(run: Run, step: int, gold: GoldResponses, held_out: Sequence[TrainGroup]) -> None:
    """Imitate one batch; where a validation follows, also measure the loss on held-out rows."""
    learner = run.cluster.learner
    groups, num_dropped = gold.groups(run.stream.next(gold.config.batch_size))
    with run.timed("learn"):
        metrics = learner.supervised_update(groups)
    if num_dropped:
        metrics["data/dropped"] = float(num_dropped)
    if run.validates_at(step):
        if held_out:
            with run.timed("held_out"):
                metrics["val/loss"] = learner.supervised_loss(held_out)["actor/loss"]
        run.cluster.sync_weights(step)
    run.end_step(step, [], groups, [], metrics)
    if run.validates_at(step):
        run.cluster.rest_engines()


def as_train_config(config: SftConfig) -> TrainConfig:
    """Return the run's settings as the parts that it shares with training read them."""
    shared = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(TrainConfig)
        if hasattr(config, field.name)
    }
    return TrainConfig(
        **shared,
        algorithm=AlgorithmConfig(prompts_per_step=config.batch_size),
        rewards=REWARDS,
        monitors=MONITORS,
    )


if __name__ == "__main__":
    cli.run(sft, SftConfig, "sft")
