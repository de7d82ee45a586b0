"""Waiting for all ranks of a role: the time limit of start-up, and which rank is blamed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from rsgrpo.cluster.deadline import Deadline
from rsgrpo.cluster.ranks import Ranks
from rsgrpo.errors import RsgrpoError, WorkerError


class Scripted:
    def works(self) -> int:
        return os.getpid()

    def hangs(self) -> None:
        time.sleep(600)

    def dies(self) -> None:
        time.sleep(0.5)  # the other rank notices first
        os._exit(1)

    def loses_its_peer(self) -> None:
        raise RuntimeError("connection closed by peer")


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    actors: list[Any] = [ray.remote(Scripted).options(num_cpus=0).remote() for _ in range(2)]
    yield Ranks("learner", actors, lambda: None)
    ray.shutdown()


def test_who_is_late_and_who_died_is_named(ranks):
    first, second = ranks.actors
    assert len(set(ranks.wait_for_all([actor.works.remote() for actor in ranks.actors], "working"))) == 2
    with pytest.raises(WorkerError, match="learner 1 died in update") as caught:
        ranks.wait([first.loses_its_peer.remote(), second.dies.remote()], "update")
    assert caught.value.died
    with pytest.raises(RsgrpoError, match=r"startup_timeout_s=0.2 s: learner 1 had not finished loading the model"):
        ranks.wait_for_all([first.works.remote(), first.hangs.remote()], "loading the model", deadline=Deadline(0.2))
