"""Workers that do not answer, and a Ray that does not: noticed in bounded time, never mistaken for busy ones."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from rollout.workers.worker import whereabouts
from rsgrpo.cluster import watch
from rsgrpo.cluster.ranks import Ranks
from rsgrpo.cluster.watch import Watch
from rsgrpo.errors import WorkerError

SILENCE_S = 1.5


class Scripted:
    @ray.method(concurrency_group="heartbeat")
    def alive(self) -> str:
        return whereabouts()

    def pid(self) -> int:
        return os.getpid()

    def computes_until(self, path: str) -> str:
        while not os.path.exists(path):
            sum(range(1000))
        return "done"


@pytest.fixture
def lost() -> dict[str, Any]:
    return {"event": threading.Event(), "what": ""}


@pytest.fixture
def watched(lost, monkeypatch) -> Iterator[Ranks]:
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    untyped: Any = ray
    kind = untyped.remote(concurrency_groups={"heartbeat": 1})(Scripted)
    ranks = Ranks("learner", [kind.options(num_cpus=0).remote() for _ in range(2)], lambda: None)
    monkeypatch.setattr(watch, "RAY_SILENCE_S", SILENCE_S)

    def tell(what: str) -> None:
        lost["what"] = what
        lost["event"].set()

    watching = Watch(ranks.named, tell, silence_s=SILENCE_S, owns_ray=True)
    yield ranks
    watching.stop()
    ray.shutdown()


def test_what_is_silent_is_handled_as_dead_and_what_is_busy_is_left_alone(watched, lost, tmp_path):
    busy, stopped = watched.actors
    pids = ray.get([actor.pid.remote() for actor in watched.actors])
    ray.get(stopped.alive.remote())
    computing = busy.computes_until.remote(str(tmp_path / "enough"))
    os.kill(pids[1], signal.SIGSTOP)
    message = rf"learner 1 died in update: process {pids[1]} on node \S+ had not answered for [23] s and was killed"
    with pytest.raises(WorkerError, match=message) as caught:
        watched.wait([computing, stopped.pid.remote()], "update")
    assert caught.value.died, "so that the run resumes by itself"
    assert psutil.pid_exists(pids[0])
    (tmp_path / "enough").touch()
    assert ray.get(computing) == "done"
    assert not lost["event"].is_set()

    head = next(process for process in psutil.Process().children() if process.name() == "gcs_server")
    head.suspend()
    try:
        assert lost["event"].wait(60)
    finally:
        head.resume()
    assert "Ray's head has not answered for" in lost["what"]


def test_the_end_of_a_daemon_that_this_process_has_started_is_noticed_at_once(lost, tmp_path, monkeypatch):
    class Silent:
        def get_node_id(self) -> str:
            return "node"

    monkeypatch.setattr(ray, "get_runtime_context", Silent)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "node", "Alive": True}])
    daemon = Path(shutil.copy(str(shutil.which("sleep")), tmp_path / "gcs_server"))
    process = subprocess.Popen([str(daemon), "600"])

    def tell(what: str) -> None:
        lost["what"] = what
        lost["event"].set()

    watching = Watch(dict, tell, silence_s=600, owns_ray=True)
    process.kill()
    assert lost["event"].wait(60)
    assert "gcs_server or raylet" in lost["what"]
    watching.stop()
    process.wait()
