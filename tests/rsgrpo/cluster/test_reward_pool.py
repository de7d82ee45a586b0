"""Reward workers that die: replaced, counted, and in the end named with the prompt."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from rollout.types import Prompt, RolloutGroup
from rollout.workers.worker import WorkerError
from rsgrpo.cluster import reward_pool
from rsgrpo.cluster.deadline import Deadline
from rsgrpo.cluster.reward_pool import MAX_RESTARTS, RewardPool
from rsgrpo.errors import RsgrpoError
from rsgrpo.types import ScoredGroup

GROUPS = [RolloutGroup(Prompt(f"p{n}", "?"), ()) for n in range(4)]


class Scripted:
    """A reward worker that has no rewards."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def build(self) -> None:
        if (self.folder / "build hangs").exists():
            time.sleep(600)

    def score(self, groups: list[RolloutGroup]) -> list[ScoredGroup]:
        (group,) = groups
        mark = self.folder / f"{group.prompt.id} kills"
        if mark.exists():
            if mark.read_text() == "once":
                mark.unlink()
            os._exit(1)
        while (self.folder / f"{group.prompt.id} hangs").exists():
            time.sleep(0.01)
        if (self.folder / f"{group.prompt.id} fails").exists():
            raise ValueError("no such page")
        return [ScoredGroup(RolloutGroup(Prompt(group.prompt.id, ""), ()), (), (), (), ())]

    def rss_mb(self) -> float:
        return 5.0

    def pid(self) -> int:
        return os.getpid()


@pytest.fixture(scope="module", autouse=True)
def own_ray() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def pool(tmp_path) -> RewardPool:
    def start(index: int) -> tuple[Any, Any]:
        actor: Any = ray.remote(Scripted).options(num_cpus=0).remote(str(tmp_path))
        return actor, actor.build.remote()

    return RewardPool(start, 2, start_timeout_s=60)


def scored(pool: RewardPool) -> list[str]:
    batch, found = pool.batch(), []
    for group in GROUPS:
        batch.add(group)
    while batch:
        groups = [one.group for one in batch.scored(timeout_s=60)]
        assert all(group in GROUPS for group in groups), "scores are put beside the group that was sent"
        found += [group.prompt.id for group in groups]
    return sorted(found)


def test_groups_of_a_worker_that_dies_are_scored_by_the_one_in_its_place(pool, tmp_path):
    pool.wait(Deadline(60))
    (tmp_path / "p0 kills").write_text("once")
    (tmp_path / "p1 kills").write_text("once")
    assert scored(pool) == ["p0", "p1", "p2", "p3"]
    assert pool.num_restarts == 2
    assert scored(pool) == ["p0", "p1", "p2", "p3"]


def test_one_that_died_while_nothing_was_scored_is_replaced_when_it_is_needed(pool):
    actor = pool.submit(GROUPS[0])[2]
    os.kill(ray.get(actor.pid.remote()), 9)
    assert pool.memory_mb() == 5.0, "of the one that lives"
    assert scored(pool) == ["p0", "p1", "p2", "p3"]
    assert pool.num_restarts == 1


def test_a_group_that_kills_every_worker_ends_the_run_and_is_named(pool, tmp_path):
    (tmp_path / "p2 kills").write_text("always")
    batch = pool.batch()
    batch.add(GROUPS[2])
    for _ in range(MAX_RESTARTS):
        assert list(batch.scored(timeout_s=60)) == []
    with pytest.raises(WorkerError, match=r"consecutive death 4 of a reward worker.*prompt 'p2'"):
        list(batch.scored(timeout_s=60))
    assert pool.num_restarts == MAX_RESTARTS


def test_a_reward_that_raises_is_not_tried_again(pool, tmp_path):
    (tmp_path / "p3 fails").touch()
    with pytest.raises(WorkerError, match=r"(?s)reward worker \d failed in score.*no such page"):
        scored(pool)
    assert pool.num_restarts == 0


def test_a_worker_that_never_loads_its_rewards_is_named(pool, tmp_path):
    (tmp_path / "build hangs").touch()
    pool._workers = [pool._start(0)]
    with pytest.raises(RsgrpoError, match=r"startup_timeout_s=0.1 s: reward worker 0 had not finished loading the rew"):
        pool.wait(Deadline(0.1))


def test_a_reward_that_does_not_return_is_named_in_the_log(pool, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(reward_pool, "REMIND_S", -1.0)
    stuck = tmp_path / "p1 hangs"
    stuck.touch()
    batch = pool.batch()
    for group in GROUPS[:2]:
        batch.add(group)
    ray.wait(batch.calls()[:1])
    assert [one.group for one in batch.scored(timeout_s=0)] == GROUPS[:1]
    assert list(batch.scored(timeout_s=0)) == []
    assert "reward worker 1 has the responses to prompt 'p1', and 0 more groups wait" in caplog.text
    stuck.unlink()
    assert [one.group for one in batch.scored(timeout_s=60)] == GROUPS[1:2]
    assert not batch
