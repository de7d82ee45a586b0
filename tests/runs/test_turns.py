"""Whole runs with an environment: tools that fail and hang, kill -9 and resume, in one process and on Ray."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from rollout.config import RolloutConfig, TurnsConfig
from rsgrpo.config.guards import GuardsConfig
from rsgrpo.config.train import AlgorithmConfig, CheckpointConfig, ClusterConfig, TrainConfig
from rsgrpo.records.rollouts import read_rollouts, rollout_files
from rsgrpo.records.tracking import read_metrics
from rsgrpo.report.page import collect_report
from rsgrpo.running.checkpoint import CheckpointFolder
from rsgrpo.running.guards import GuardBroken
from rsgrpo.train import train
from tests.material.training import steps_of, tiny_run, write_rewards, write_rows

LOOK, AGAIN, END = "page one", "it is 7", "end"  # `Pages` shows two images at each of the first two; the third ends
INLINE = ClusterConfig(kind="inline")


def exact(config: TrainConfig) -> list[dict]:
    """Return what a run measured, but for clocks, memory and workers."""
    rows = read_metrics(Path(config.output_dir) / config.name)
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith(("time/", "perf/"))} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, page_images, tiny_model_path) -> Iterator[TrainConfig]:
    """A finished run of three steps in one process, whose tool fails on a fifth of the turns."""
    folder = tmp_path_factory.mktemp("turns")
    write_rewards(folder)
    arguments = {"pages": list(page_images), "stop": ["e", "a", "o", "1"]}
    turns = TurnsConfig("tests.material.environments:Moody", arguments, max_turns=4, max_observation_tokens=200)
    config = tiny_run(
        folder / "whole",
        write_rows(folder / "rows.jsonl", page_images),
        tiny_model_path,
        total_steps=3,
        rewards={"vowels": "tests_rewards_for_train:vowels", "faults": "tests_turn_rewards:faults"},
        reward_args={},
        rollout=RolloutConfig(group_size=4, max_response_tokens=40, num_threads=1, turns=turns),
        algorithm=AlgorithmConfig(prompts_per_step=2, credit="causal", updates_per_step=2, kl_coef=0.01),
        checkpoint=CheckpointConfig(every=1, keep_last=5, keep_best=0, export=False),
        cluster=INLINE,
    )
    (folder / "tests_turn_rewards.py").write_text(
        "from rewards.api import reward\nfrom rewards.turns import per_turn, turns_of\n\n\n@reward\n"
        "def faults(response):\n    return per_turn(response, [-float(bool(t.fault)) for t in turns_of(response)])\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", ""), os.getcwd()]))
        train(config)
        yield config


def test_a_tool_that_fails_is_counted_and_the_run_learns_on(whole):
    steps = steps_of(whole)
    assert len(steps) == 3
    for row in steps:
        assert 1 < row["rollout/turns_mean"] <= row["rollout/turns_max"] <= 4
        assert row["rollout/turns/exception"] >= 1
        assert row["rollout/observation_tokens_mean"] > 5
        assert row["rollout/observation_images_mean"] > 0
        assert 0 <= row["rollout/turns_limit_frac"] <= 1
        assert row["actor/mismatch_max"] < 1e-4  # of a batch's first update: what was sampled is what is scored
        assert row["actor/grad_norm"] > 0
    stored = read_rollouts(rollout_files(Path(whole.output_dir) / "run")[3])
    read = [observation for rollout in stored for observation in rollout.observations]
    assert {"exception", ""} <= {observation.fault for observation in read}
    assert any(observation.images for observation in read)
    view = collect_report(Path(whole.output_dir) / "run", step=3)["views"][0]
    assert any(rollout["observations"] for group in view["groups"] for rollout in group["rollouts"])


def test_killed_in_the_middle_of_an_episode_it_resumes_bit_for_bit(whole, tmp_path):
    killed = dataclasses.replace(whole, output_dir=str(tmp_path))
    checkpoints = CheckpointFolder(tmp_path / "run" / "checkpoints", keep_last=5, keep_best=0)
    at = Path(whole.output_dir) / "run" / "checkpoints"
    first = min(path.name for path in at.iterdir() if path.is_dir())
    imports = "from rsgrpo.config.train import *; from rollout.config import *; from rsgrpo.train import train"
    statement = f"{imports}; train({killed!r})"
    environment = {**os.environ, "KILL_AT_PATH": str(tmp_path / "run" / "checkpoints" / first)}
    ended = subprocess.run([sys.executable, "-c", statement], env=environment, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 1
    train(killed)
    assert exact(killed) == exact(whole)


def test_a_tool_that_hangs_costs_its_time_limit_and_nothing_else(whole, tmp_path):
    turns = dataclasses.replace(whole.rollout.turns, environment="tests.material.environments:Hanging", timeout_s=0.5)
    rollout = dataclasses.replace(whole.rollout, turns=turns)
    config = dataclasses.replace(whole, output_dir=str(tmp_path), rollout=rollout, total_steps=1)
    train(config)
    [row] = steps_of(config)
    assert row["rollout/turns/timeout"] >= 1
    assert row["actor/mismatch_max"] < 1e-4


def scripted(whole: TrainConfig, folder: Path, responses: list, **changes: Any) -> TrainConfig:
    """Return the run with the scripted engine, which gives every prompt these responses."""
    lines = [json.dumps({"id": f"row{index}", "responses": responses}) for index in range(6)]
    (folder / "script.jsonl").write_text("\n".join(lines))
    turns = dataclasses.replace(whole.rollout.turns, environment="tests.material.environments:Pages")
    rollout = dataclasses.replace(whole.rollout, engine="fake", script=str(folder / "script.jsonl"), turns=turns)
    return dataclasses.replace(whole, output_dir=str(folder), rollout=rollout, **changes)


def test_scripted_conversations_are_scored_and_trained_on(whole, tmp_path):
    config = scripted(whole, tmp_path, [[LOOK, AGAIN, END], [LOOK, END], [END], ["look"]], total_steps=1)
    train(config)
    [row] = steps_of(config)
    assert row["rollout/turns_mean"] == (3 + 2 + 1 + 1) / 4
    assert row["rollout/turns_called_frac"] == 0.5
    assert row["rollout/observation_images_mean"] == (4 + 2 + 0 + 0) / 4
    assert row["actor/grad_norm"] > 0


def test_a_policy_that_no_longer_calls_is_stopped_by_a_guard(whole, tmp_path):
    guards = GuardsConfig({"rollout/turns_called_frac": {"min": 0.2, "patience": 2}})
    config = scripted(whole, tmp_path, [[END], [END, LOOK]], guards=guards)
    with pytest.raises(GuardBroken, match=r"turns_called_frac >= 0\.2 .* has not held for 2 steps: at step 2"):
        train(config)


@pytest.mark.slow  # Ray starts for it; in one process the same run is above
def test_on_ray_it_has_the_numbers_of_one_process(whole, tmp_path):
    cluster = ClusterConfig(num_cpus=2, cpus={"rollout": 0.4, "learner": 0.4, "reward": 0.1})
    config = dataclasses.replace(whole, output_dir=str(tmp_path), cluster=cluster)
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, configure_logging=False)
    try:
        train(config)
    finally:
        ray.shutdown()
    roles = ("rollout/engine", "rollout/reward_restarts")  # what one process does not count
    for on_ray, alone in zip(exact(config), exact(whole), strict=True):
        assert {k: v for k, v in on_ray.items() if not k.startswith(roles)} == {
            k: v for k, v in alone.items() if not k.startswith(roles)
        }
