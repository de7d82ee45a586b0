"""RS-GRPO, read as the algorithm: `python -m rsgrpo.train recipe=demo`.

Where its parts run, and how a run starts, stops and resumes, is in `rsgrpo.running.run`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rsgrpo.running.stopping import leave_on_signals

if __name__ == "__main__":
    leave_on_signals()  # before the imports that take their time

import numpy as np

from rsgrpo import cli
from rsgrpo.algorithm.advantages import Rule, credit_groups, term_names, term_weights
from rsgrpo.algorithm.metrics import rollout_metrics, scope_metrics, score_metrics, turn_metrics
from rsgrpo.config.checks import require_inputs, validate
from rsgrpo.config.train import TrainConfig
from rsgrpo.records.summary import next_commands
from rsgrpo.types import TrainGroup

if TYPE_CHECKING:
    from rsgrpo.running.run import Run


def train(config: TrainConfig) -> None:
    """Train one run to its last step.

    Raises:
        StopRequested: a signal asked it to stop; its progress is in a checkpoint.
    """
    validate(config)
    require_inputs(config)
    from rsgrpo.running.recovery import recovering  # loads torch: after the configuration has been checked
    from rsgrpo.running.run import Run

    def run_to_the_end(recoveries: int) -> None:
        with Run.open(config) as run:
            run.recoveries = recoveries
            run.check_engines_if_due()
            run.validate_if_due()
            for step in run.steps_left:
                take_step(run, step)
                run.check_engines_if_due()
            run.finish()
            if not {"-m", "--multirun"} & set(sys.argv):
                reward = next(iter(config.rewards.values()))
                run.console.summary("next", next_commands(run.folder, sys.argv[1:], reward))

    recovering(config, run_to_the_end)


def take_step(run: Run, step: int) -> None:
    """Sample, score, credit, learn, sync."""
    algorithm = run.config.algorithm
    weights_K = [run.config.reward_weights.get(name, 1.0) for name in run.config.rewards]

    # Every prompt is sampled into a group of G responses; every reward scores each of them and names its scope.
    with run.timed("sample"):
        scored, metrics = run.batches.take(step)
        run.cluster.rest_engines()

    # Inside a group each reward becomes an advantage; inside a response each scope becomes a mask over its tokens.
    groups = credit_groups(scored, Rule.of(algorithm), weights_K)
    terms = term_names(algorithm.advantage, list(run.config.rewards))

    if algorithm.needs_reference:
        with run.timed("reference"):
            groups = with_ref_logprobs(groups, run.cluster.ref_logprobs(groups))

    # Off-policy by at most `max_staleness` steps: engines sample ahead with the weights from before this step.
    if algorithm.max_staleness:
        run.batches.start(min(step + algorithm.max_staleness, run.total_steps))

    # One clipped surrogate per reward, averaged over that reward's tokens in the whole step.
    with run.timed("learn"):
        learned = run.cluster.learn(groups, term_weights(algorithm.advantage, weights_K), step)

    # The engines sample with the new weights from here on.
    with run.timed("sync"):
        if not run.config.changes_weights_in_flight:
            run.batches.settle()
        run.cluster.sync_weights(step)
    if run.config.changes_weights_in_flight:  # one more step may begin before the last one's tail is over
        run.batches.start(min(step + 1 + algorithm.max_staleness, run.total_steps))

    metrics |= (
        run.cluster.engine_metrics()
        | rollout_metrics(scored)
        | (turn_metrics(scored) if run.config.rollout.turns.environment else {})
        | score_metrics(scored)
        | scope_metrics(scored, groups, terms)
        | learned
    )
    run.end_step(step, scored, groups, terms, metrics)


def with_ref_logprobs(
    groups: Sequence[TrainGroup], ref_logprobs_PG: Sequence[Sequence[np.ndarray]]
) -> list[TrainGroup]:
    """Return the groups with the reference's, or the teacher's, log-probabilities beside each response."""
    return [
        replace(
            group,
            samples=tuple(
                replace(sample, ref_logprobs_T=logprobs_T)
                for sample, logprobs_T in zip(group.samples, logprobs_G, strict=True)
            ),
        )
        for group, logprobs_G in zip(groups, ref_logprobs_PG, strict=True)
    ]


if __name__ == "__main__":
    cli.run(train, TrainConfig)
