"""Two Ray nodes on this machine, started elsewhere, and a run that joins them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import ray

from rollout.config import ConfigError
from rollout.workers.worker import enter_folder
from rsgrpo.config.train import ClusterConfig
from rsgrpo.records.tracking import read_metrics
from rsgrpo.running.checkpoint import CheckpointFolder
from tests.material import ROOT
from tests.material.learner import learnt
from tests.material.training import tiny_run, write_recipe, write_rewards, write_rows
from tests.rsgrpo.cluster.nodes import NODE_WAIT_S, RayNodes, program, wait_for_row

STORE: dict[str, Any] = {"object_store_memory": 150 << 20}


def test_a_node_without_the_runs_folder_says_which_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"node \S+ has no folder \S+nowhere .*Share it between the nodes"):
        enter_folder(str(tmp_path / "nowhere"))


@pytest.fixture
def two_nodes(tmp_path, monkeypatch):
    """A cluster of two one-CPU nodes whose processes start in another folder than the run's."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    cluster = RayNodes(num_cpus=1, **STORE)
    cluster.add_node(num_cpus=1, **STORE)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_learner_ranks_on_two_nodes_train_from_relative_paths(tmp_path, two_nodes, page_images, tiny_model_path):
    folder = tmp_path / "work"
    folder.mkdir()
    write_rewards(folder)
    write_rows(folder / "rows.jsonl", page_images)
    (folder / "model").symlink_to(tiny_model_path)
    # 0.6 CPUs a rank: one node has no room for two.
    config = tiny_run(
        Path("runs"),
        Path("rows.jsonl"),
        "model",
        cluster=ClusterConfig(address=two_nodes.address, cpus={"rollout": 0.2, "learner": 0.6, "reward": 0.1}),
    )
    config = dataclasses.replace(config, learner=dataclasses.replace(config.learner, num_ranks=2))
    result = subprocess.run(
        write_recipe(folder, config),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert [row["step"] for row in read_metrics(folder / "runs" / "run")] == [1, 2]
    newest = CheckpointFolder(folder / "runs" / "run" / "checkpoints", keep_last=2, keep_best=0).newest()
    assert newest is not None
    assert len(list(newest.learner_folder.glob("*.distcp"))) == 2  # one file per rank
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert not ray.is_initialized()


HELD_REWARD = '''
import time
from itertools import count
from pathlib import Path

from rewards.api import Response, reward

calls = count()


@reward
def vowels(response: Response) -> float:
    """Waits in the middle of the run until the file `go` is there."""
    if next(calls) >= 24:  # three steps of two groups of four, in each process that scores
        while not Path("go").exists():
            time.sleep(0.05)
    return sum(c in "aeiou" for c in response.text) / 10
'''
TOTAL_STEPS = 8


class OneRun:
    """The demo's kind of run (embedded engine, learner, rewards) in a folder of its own; it holds after three steps."""

    def __init__(self, folder: Path, page_images: list[str], model: str, address: str) -> None:
        folder.mkdir()
        self.folder, self.run_folder, self.address = folder, folder / "runs" / "run", address
        (folder / "tests_rewards_for_train.py").write_text(HELD_REWARD)
        config = tiny_run(
            Path("runs"),
            write_rows(folder / "rows.jsonl", page_images),
            model,
            total_steps=TOTAL_STEPS,
            cluster=ClusterConfig(address="auto", cpus={"rollout": 0.4, "learner": 0.4, "reward": 0.1}),
        )
        checkpoint = dataclasses.replace(config.checkpoint, export=True)
        self.command = write_recipe(folder, dataclasses.replace(config, checkpoint=checkpoint))

    def start(self, exits: ExitStack) -> subprocess.Popen[bytes]:
        return exits.enter_context(program(self.command, self.folder, self.address))

    def hold(self, run: subprocess.Popen[bytes], step: int = 3) -> None:
        """Wait until the run has made its steps."""
        wait_for_row(self.run_folder, run, lambda row: row["step"] == step)

    def end(self, run: subprocess.Popen[bytes]) -> None:
        """Let the run go on to its end."""
        (self.folder / "go").touch()
        console = self.folder / "console.log"
        assert run.wait() == 0, console.read_text()
        assert "Traceback" not in console.read_text()

    def learned(self) -> tuple[list[dict[str, Any]], bytes]:
        """Return what the run wrote that does not depend on time: its metrics and its export."""
        rows = [
            {key: value for key, value in learnt(row).items() if key not in ("time", "rollout/engine_restarts")}
            for row in read_metrics(self.run_folder)
        ]
        return rows, (self.run_folder / "export" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, page_images, tiny_model_path) -> tuple[list[dict[str, Any]], bytes]:
    """What a run writes that has a cluster for itself."""
    cluster = RayNodes(num_cpus=1, num_gpus=1, **STORE)
    one = OneRun(tmp_path_factory.mktemp("alone") / "one", page_images, tiny_model_path, cluster.address)
    with ExitStack() as exits:
        one.end(one.start(exits))
    cluster.shutdown()
    return one.learned()


def wait_until_free(cluster: RayNodes, cpus: float, gpus: float) -> None:
    """Wait until these are what nobody uses in the cluster, and until as many workers are left as one run has."""
    untyped: Any = ray
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    late_at = time.monotonic() + NODE_WAIT_S
    try:
        while True:
            assert time.monotonic() < late_at
            free = untyped.available_resources()
            alive = [actor for actor in untyped._private.state.actors().values() if actor["State"] == "ALIVE"]
            if (round(free.get("CPU", 0), 3), free.get("GPU", 0)) == (cpus, gpus) and len(alive) == 3:
                return
            time.sleep(0.2)
    finally:
        ray.shutdown()


@pytest.mark.slow  # five starts of a run's workers: two minutes
def test_of_two_runs_on_two_nodes_one_loses_its_driver_and_its_node_and_the_other_nothing(
    alone, tmp_path, page_images, tiny_model_path
):
    node: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1, **STORE}
    cluster = RayNodes(**node)
    with ExitStack() as exits:
        exits.callback(cluster.shutdown)
        first, other = (OneRun(tmp_path / name, page_images, tiny_model_path, cluster.address) for name in ("a", "b"))
        undisturbed = first.start(exits)
        first.hold(undisturbed)  # with the head for itself: the other run finds room on the second node alone
        second = cluster.add_node(**node)

        struck = other.start(exits)
        other.hold(struck)
        struck.kill()
        struck.wait()
        saved = CheckpointFolder(other.run_folder / "checkpoints", keep_last=2, keep_best=0).newest()
        assert saved is not None
        wait_until_free(cluster, cpus=1.1, gpus=1)

        struck = other.start(exits)
        other.hold(struck, saved.step + 3)
        cluster.remove_node(second, allow_graceful=False)
        first.end(undisturbed)
        assert first.learned() == alone

        assert struck.poll() is None, "it waits for its node"
        cluster.add_node(**node)
        other.end(struck)
        assert other.learned() == alone
