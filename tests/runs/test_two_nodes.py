"""Two Ray nodes on this machine, started elsewhere, and a run that joins them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.cluster_utils import Cluster

from rollout.config import ConfigError
from rollout.workers.worker import enter_folder
from rsgrpo.config.train import ClusterConfig
from rsgrpo.records.tracking import read_metrics
from rsgrpo.running.checkpoint import CheckpointFolder
from tests.material import ROOT
from tests.material.training import tiny_run, write_rewards, write_rows


def test_a_node_without_the_runs_folder_says_which_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"node \S+ has no folder \S+nowhere .*Share it between the nodes"):
        enter_folder(str(tmp_path / "nowhere"))


@pytest.fixture
def two_nodes(tmp_path, monkeypatch):
    """A cluster of two one-CPU nodes whose processes start in another folder than the run's."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 150 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
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
    recipe = folder / "conf" / "recipe" / "mine.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("# @package _global_\n" + yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config)))))
    names = ("accuracy", "evidence", "well_formed", "no_early_index", "think_differs")
    command = [sys.executable, "-m", "rsgrpo.train", "--config-dir", str(folder / "conf"), "recipe=mine"]
    result = subprocess.run(
        [*command, *(f"~rewards.{name}" for name in names)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert [row["step"] for row in read_metrics(folder / "runs" / "run")] == [1, 2]
    newest = CheckpointFolder(folder / "runs" / "run" / "checkpoints", keep_last=2, keep_best=0).newest()
    assert newest is not None
    assert len(list(newest.learner_folder.glob("*.distcp"))) == 2  # one file per rank
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert not ray.is_initialized()
