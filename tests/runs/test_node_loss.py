"""A run on two Ray nodes that loses the one with engines only, goes on, and takes it back when it returns."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout.config import RolloutConfig
from rsgrpo.config.train import ClusterConfig
from rsgrpo.records.tracking import read_metrics
from tests.material.training import tiny_run, write_recipe, write_rewards, write_rows
from tests.rsgrpo.cluster.nodes import RayNodes, program, wait_for_row

MIN_STEPS = 20
GOOD = "<evidence>\n[1]: 7\n[2]: no relevant information\n</evidence>\n<think>page 1</think>\n<answer>7</answer>"
STORE: dict[str, Any] = {"object_store_memory": 150 << 20}


@pytest.fixture
def cluster() -> Iterator[Callable[..., RayNodes]]:
    """Starts a cluster of one node with the given resources; more can join it."""
    started = []

    def start(**node: Any) -> RayNodes:
        started.append(RayNodes(**node))
        return started[0]

    yield start
    started[0].shutdown()


def lose_a_node_and_take_it_back(
    cluster: RayNodes, node: dict[str, Any], command: list[str], folder: Path, num_engines: int
) -> list[dict[str, Any]]:
    """Start a run, remove and return a node while it trains, end the run by SIGTERM; return its metrics."""
    second, run_folder = cluster.add_node(**node), folder / "runs" / "run"
    with program(command, folder, cluster.address) as run:
        seen = wait_for_row(run_folder, run, lambda row: row["step"] >= 2)
        assert seen["rollout/engines"] == num_engines
        cluster.remove_node(second, allow_graceful=False)
        fewer = wait_for_row(run_folder, run, lambda row: row["rollout/engines"] < num_engines)
        wait_for_row(run_folder, run, lambda row: row["step"] >= fewer["step"] + 2)
        cluster.add_node(**node)
        again = wait_for_row(run_folder, run, lambda row: row["rollout/engines"] == num_engines)
        wait_for_row(run_folder, run, lambda row: row["step"] >= max(MIN_STEPS, again["step"] + 2))
        run.send_signal(signal.SIGTERM)
        run.wait()
    console = (folder / "console.log").read_text()
    assert run.returncode == 0, console
    assert "Traceback" not in console
    rows = read_metrics(run_folder)
    assert len(rows) >= MIN_STEPS
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[-1]["rollout/engine_restarts"] >= num_engines - fewer["rollout/engines"]
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "num_engines", "head_cpus", "node_cpus"),
    [pytest.param(2, 4, 3, 1, id="few"), pytest.param(4, 12, 6, 4, id="all 16 GPUs")],
)
def test_the_evisrag_recipe_on_two_nodes_of_eight_counted_gpus(
    cluster, tmp_path, page_images, tiny_model_path, num_ranks, num_engines, head_cpus, node_cpus
):
    """Placement, filter, rewards and supervision of the published recipe; a tiny model, and scripted answers."""
    write_rows(tmp_path / "rows.jsonl", page_images, num_rows=24)
    with open(tmp_path / "script.jsonl", "w") as script:
        for index in range(24):  # every third prompt has equal answers, which the filter drops
            responses = [GOOD] if index % 3 == 0 else [GOOD, "<answer>8</answer>", "<think>?</think>"]
            script.write(json.dumps({"id": f"row{index}", "responses": responses}) + "\n")
    # CPUs decide who sits where: a rank takes 1, and fits on the head only; an engine takes 0.4.
    head, node = {"num_cpus": head_cpus, "num_gpus": 8}, {"num_cpus": node_cpus, "num_gpus": 8}
    settings = [
        f"model.path={tiny_model_path}", "data.train=rows.jsonl", "data.val=", "name=run",
        "rollout=fake", "rollout.script=script.jsonl", f"rollout.num_workers={num_engines}",
        "cluster=join", "cluster.placement=disaggregated",
        "cluster.cpus={learner: 1.0, rollout: 0.4, reward: 0.1}",
        f"learner.num_ranks={num_ranks}", "learner.device=cpu", "learner.precision=float32", "learner.num_threads=1",
        "inputs.min_pixels=784", "inputs.max_pixels=50176", "inputs.max_prompt_tokens=400",
        "rollout.max_response_tokens=64", "rollout.group_size=3", "learner.max_tokens_per_micro_batch=1024",
        "algorithm.prompts_per_step=8", "algorithm.filter.drop_without_signal=true", "total_steps=500",
        "validation.every=0", "validation.at_start=false",
        "checkpoint.keep_best=0", "checkpoint.export=false", "guards.rules={}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "rsgrpo.train", "recipe=evisrag_7b", *settings]
    rows = lose_a_node_and_take_it_back(cluster(**head, **STORE), node | STORE, command, tmp_path, num_engines)
    assert sum(row["rollout/groups_filtered"] for row in rows) > 0
    assert all(row["rollout/prompt_errors"] == 0 for row in rows)


@pytest.mark.slow
def test_a_run_with_the_embedded_engine_on_two_nodes(cluster, tmp_path, page_images, tiny_model_path):
    write_rewards(tmp_path)
    # The learner fits on the head only, and leaves room for one engine there.
    config = tiny_run(
        Path("runs"),
        write_rows(tmp_path / "rows.jsonl", page_images),
        tiny_model_path,
        total_steps=500,
        rollout=RolloutConfig(group_size=4, max_response_tokens=24, num_threads=1, num_workers=2),
        cluster=ClusterConfig(
            address="auto", placement="disaggregated", cpus={"rollout": 0.4, "learner": 1.5, "reward": 0.1}
        ),
    )
    command = write_recipe(tmp_path, config)
    rows = lose_a_node_and_take_it_back(cluster(num_cpus=2, **STORE), {"num_cpus": 1, **STORE}, command, tmp_path, 2)
    assert [row["rollout/oldest_weights_version"] for row in rows] == [row["step"] - 1 for row in rows]
