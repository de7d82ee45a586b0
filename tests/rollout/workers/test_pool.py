"""What a pool does when a worker, or the node under it, is lost: on real Ray nodes, with scripted workers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rollout.engine import EngineFailed
from rollout.types import Prompt, RolloutGroup, SamplingParams
from rollout.workers import pool as pool_module
from rollout.workers.crew import Supervision
from rollout.workers.pool import RolloutPool
from rollout.workers.worker import WorkerError, WorkerHandle
from tests.rsgrpo.cluster.nodes import RayNodes

NODE: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 80 << 20}
PROMPTS = [Prompt(f"p{n}", "?") for n in range(6)]
SAMPLING = SamplingParams(group_size=1)


class Scripted:
    """A worker that fails in the method that its file `fails` names, once."""

    def __init__(self, index: int, fails: str) -> None:
        self.index, self.fails = index, Path(fails)

    def ping(self) -> dict[str, Any]:
        self._fail_in("ping")
        return {"index": self.index, "pid": os.getpid(), "rss_mb": 1.0, "backend": "load"}

    def generate(self, prompts, sampling, ticket) -> Iterator[RolloutGroup]:
        self._fail_in("generate")
        for prompt in prompts:
            yield RolloutGroup(prompt, (), self.index, error="scripted")

    def call(self, method: str, args: tuple) -> Any:
        self._fail_in(method)
        return {"tokens_per_s": 1.0} if method == "stats" else [method, self.index]

    def abandon(self, ticket: int) -> None:
        pass

    def close(self) -> None:
        pass

    def _fail_in(self, method: str) -> None:
        try:
            kind = (self.fails / f"{self.index} {method}").read_text()
            (self.fails / f"{self.index} {method}").unlink()
        except FileNotFoundError:
            return
        if kind == "hang":
            time.sleep(600)
        if kind == "broken":
            raise EngineFailed(f"engine {self.index}: {method}: out of memory")
        os._exit(1)


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    cluster = RayNodes(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def start_scripted(folder: Path, index: int, **options: Any) -> WorkerHandle:
    actor: Any = ray.remote(Scripted).options(num_cpus=0, **options).remote(index, str(folder))
    return WorkerHandle(index, actor, 8)


def start_pool(folder: Path, *, max_restarts: int = 2, **limits: Any) -> tuple[RolloutPool, list[list[int]]]:
    """Return a pool of two workers, and the indices of those that were sent weights, once per sending."""
    sent: list[list[int]] = []
    start = partial(start_scripted, folder)
    supervision = Supervision(
        start, lambda workers: sent.append([worker.index for worker in workers]), max_restarts, **limits
    )
    return RolloutPool([start(0), start(1)], timeout_s=60, supervision=supervision), sent


def test_a_worker_that_dies_while_it_starts_is_started_again(nodes, tmp_path):
    (tmp_path / "1 ping").write_text("die")
    pool, sent = start_pool(tmp_path)
    assert pool.start(60)["backend"] == "load"
    assert (pool.num_restarts, sent) == (1, [])
    assert [state["index"] for state in pool.ping()] == [0, 1]
    pool.close()


def test_a_worker_that_never_starts_is_named(nodes, tmp_path):
    (tmp_path / "1 ping").write_text("hang")
    pool, _ = start_pool(tmp_path)
    assert ray.get(pool.workers[0].actor.ping.remote())["index"] == 0
    with pytest.raises(TimeoutError, match=r"^rollout worker 1$"):
        pool.start(1)
    pool.close()


def test_a_restart_has_a_limit_of_its_own(nodes, tmp_path):
    pool, _ = start_pool(tmp_path, max_restarts=1, start_timeout_s=1.0)
    pool.start(60)
    (tmp_path / "0 generate").write_text("die")
    (tmp_path / "0 ping").write_text("hang")
    with pytest.raises(WorkerError, match=r"rollout worker 0 was not up within 1 s\nThis is consecutive failure 2"):
        list(pool.generate(PROMPTS, SAMPLING))
    pool.close()


@pytest.mark.parametrize("kind", ["die", "broken"])
def test_an_engine_that_fails_in_any_call_is_restarted_and_called_again(nodes, tmp_path, kind):
    pool, sent = start_pool(tmp_path)
    pool.start(60)
    (tmp_path / "1 sleep").write_text(kind)
    pool.sleep()
    assert (pool.num_restarts, sent) == (1, [[1]])
    (tmp_path / "0 count_vision").write_text(kind)
    assert pool.count_vision(PROMPTS) == [["count_vision", 0], ["count_vision", 1]]
    assert (pool.num_restarts, sent) == (2, [[1], [0]])
    (tmp_path / "1 wake").write_text(kind)
    with pytest.raises(WorkerError, match=r"rollout worker 1 .* in wake(.|\n)*consecutive failure 3"):
        pool.wake("weights")
    pool.close()


def test_failures_are_forgotten_after_a_step_without_one(nodes, tmp_path):
    pool, _ = start_pool(tmp_path, max_restarts=1)
    pool.start(60)
    fails = tmp_path / "0 sleep"
    for ends in (2, 1):  # a step with the failure, one without; and then a step with the failure alone
        fails.write_text("broken")
        pool.sleep()
        for _ in range(ends):
            pool.step_ended()
    fails.write_text("broken")
    with pytest.raises(WorkerError, match="consecutive failure 2"):
        pool.sleep()
    pool.close()


def test_a_closed_pool_starts_nothing_again(nodes, tmp_path):
    pool, _ = start_pool(tmp_path)
    pool.start(60)
    pool.close()
    with pytest.raises(WorkerError, match="died in sampling"):
        list(pool.generate(PROMPTS, SAMPLING))
    assert pool.num_restarts == 0


def test_counts_and_memory_are_those_of_the_workers_that_answer(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "ANSWER_TIMEOUT_S", 2.0)
    pool, _ = start_pool(tmp_path)
    pool.start(60)
    (tmp_path / "0 stats").write_text("hang")
    (tmp_path / "1 ping").write_text("die")
    assert len(pool.stats()) == 1
    assert pool.memory_mb() == 0.0, "one hangs, the other dies"
    pool.close()


def test_a_pool_goes_on_without_a_lost_node_and_takes_it_back(nodes, tmp_path):
    second = nodes.add_node(**NODE, resources={"second": 1})
    group = placement_group([{"CPU": 1}, {"CPU": 1, "second": 1}], strategy="STRICT_SPREAD")
    assert group.wait(60)
    sent: list[list[int]] = []

    def start(index: int) -> WorkerHandle:
        return start_scripted(tmp_path, index, scheduling_strategy=PlacementGroupSchedulingStrategy(group, index))

    def has_room(index: int) -> bool:
        return placement_group_table(group)["bundles_to_node_id"][index] != ""

    supervision = Supervision(
        start,
        lambda workers: sent.append([w.index for w in workers]),
        max_restarts=1,
        has_room=has_room,
        start_timeout_s=60.0,
    )
    pool = RolloutPool([start(0), start(1)], timeout_s=60, supervision=supervision)
    pool.start(60)

    def sampled_by() -> set[int]:
        groups = list(pool.generate(PROMPTS, SAMPLING))
        assert sorted(group.prompt.id for group in groups) == [prompt.id for prompt in PROMPTS]
        return {group.num_prompt_tokens for group in groups}

    assert sampled_by() == {0, 1}
    process = pool.ping()[1]["pid"]
    nodes.remove_node(second, allow_graceful=False)
    os.kill(process, signal.SIGKILL)  # where the whole machine is lost, no process outlives its raylet
    assert sampled_by() == {0}
    assert sampled_by() == {0}
    assert pool.take_back() == []
    assert ([worker.index for worker in pool.workers], pool.num_restarts, sent) == ([0], 0, [])
    nodes.add_node(**NODE, resources={"second": 1})
    end = time.monotonic() + 60
    while not (joined := pool.take_back()) and time.monotonic() < end:
        time.sleep(0.1)
    assert joined == [1]
    assert sampled_by() == {0, 1}
    assert (pool.num_restarts, sent) == (1, []), "the next sync sends it weights"
    pool.close()
    remove_placement_group(group)
