"""When a run goes on by itself, and when it gives up; what it then does is in tests/runs/test_train.py."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from rsgrpo.config.train import CheckpointConfig, ClusterConfig, TrainConfig
from rsgrpo.errors import InputError, WorkerError
from rsgrpo.running import recovery
from rsgrpo.running.recovery import recovering

DIED = WorkerError("learner 0 died in update", died=True)
CONFIG = TrainConfig(cluster=ClusterConfig(max_recoveries=2))


class Work:
    """Ends each attempt as it is told: raises an error, or returns; the step is that of the newest checkpoint then."""

    def __init__(self, monkeypatch, *attempts: tuple[Exception | None, int]) -> None:
        self.attempts = list(attempts)
        self.recoveries: list[int] = []
        self.step = 0
        monkeypatch.setattr(recovery, "RETRY_S", 0.0)
        monkeypatch.setattr(
            recovery,
            "checkpoint_to_resume",
            lambda config: (None, SimpleNamespace(step=self.step) if self.step else None),
        )

    def __call__(self, recoveries: int) -> None:
        self.recoveries.append(recoveries)
        error, self.step = self.attempts.pop(0)
        if error is not None:
            raise error


def test_deaths_with_a_checkpoint_between_them_are_not_limited(monkeypatch):
    work = Work(monkeypatch, (DIED, 2), (DIED, 2), (DIED, 4), (DIED, 6), (DIED, 6), (None, 8))
    recovering(CONFIG, work)
    assert work.recoveries == [0, 1, 2, 3, 4, 5]


def test_deaths_without_a_checkpoint_between_them_are(monkeypatch):
    work = Work(monkeypatch, (DIED, 2), (DIED, 2), (DIED, 2), (None, 8))
    with pytest.raises(WorkerError, match="learner 0 died"):
        recovering(CONFIG, work)
    assert work.recoveries == [0, 1, 2]


@pytest.mark.parametrize(
    ("error", "config"),
    [
        (WorkerError("learner 0 failed in update: CUDA out of memory"), CONFIG),
        (DIED, dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(resume="never"))),
        (DIED, dataclasses.replace(CONFIG, cluster=ClusterConfig(max_recoveries=0))),
        (InputError("8 learner ranks need 8 GPUs"), CONFIG),
    ],
)
def test_what_would_happen_again_ends_the_run(monkeypatch, error, config):
    work = Work(monkeypatch, (error, 2), (None, 8))
    with pytest.raises(type(error), match=str(error)):
        recovering(config, work)
    assert work.recoveries == [0]


def test_after_a_death_the_run_waits_for_the_node_but_not_for_ever(monkeypatch):
    few = InputError("8 learner ranks need 8 GPUs")
    work = Work(monkeypatch, (DIED, 2), (few, 2), (few, 2), (None, 8))
    recovering(CONFIG, work)
    assert work.recoveries == [0, 1, 1, 1]
    work = Work(monkeypatch, (DIED, 2), (few, 2), (None, 8))
    short = dataclasses.replace(CONFIG, cluster=ClusterConfig(startup_timeout_s=1e-9))
    with pytest.raises(InputError):
        recovering(short, work)
