"""A run that lost a learner rank resumes from its last checkpoint, in the same program and with the same numbers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from rsgrpo.config.train import TrainConfig
from rsgrpo.errors import InputError, WorkerError
from rsgrpo.running.run import checkpoint_to_resume

log = logging.getLogger(__name__)

RETRY_S = 10.0
"""Interval at which a run that lost a node looks whether the cluster has room for it again."""


def recovering(config: TrainConfig, work: Callable[[int], None]) -> None:
    """Do the work of a run; do it again, which resumes, when the process of a learner rank or its node is gone.

    Args:
        work: opens the run, trains and finishes it; is given how often it has recovered.

    Raises:
        WorkerError: a worker failed in a way that would repeat itself, or it died `cluster.max_recoveries` + 1 times
            without a checkpoint between two of these deaths.
        InputError: as `work`; after a death, if it still holds `cluster.startup_timeout_s` later.
    """
    recoveries = in_a_row = newest_step = 0
    late_at = 0.0
    while True:
        try:
            return work(recoveries)
        except WorkerError as error:
            if not error.died or config.checkpoint.resume == "never":
                raise
            checkpoint = checkpoint_to_resume(config)[1]
            step = checkpoint.step if checkpoint else 0
            in_a_row = 1 if step > newest_step else in_a_row + 1
            if in_a_row > config.cluster.max_recoveries:
                raise
            newest_step, recoveries = step, recoveries + 1
            late_at = time.monotonic() + config.cluster.startup_timeout_s
            log.warning(
                "%s\nThe run resumes from step %d by itself (recovery %d of %d without a new checkpoint).",
                str(error).partition("\nFix the cause")[0],
                step,
                in_a_row,
                config.cluster.max_recoveries,
            )
        except InputError as error:  # a lost node may take its time to come back
            if time.monotonic() > late_at:
                raise
            log.warning("%s. Trying again in %g s.", error, RETRY_S)
            time.sleep(RETRY_S)
