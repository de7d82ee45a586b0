"""The whole loop on a tiny model: engines, rewards, learner and driver as real processes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import yaml

from rollout.config import InputsConfig, RolloutConfig
from rsgrpo.config.train import (
    AlgorithmConfig,
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    FilterConfig,
    LearnerConfig,
    ModelConfig,
    TrainConfig,
    ValidationConfig,
)
from rsgrpo.errors import RsgrpoError
from rsgrpo.records.tracking import read_metrics
from rsgrpo.running.checkpoint import CheckpointFolder
from rsgrpo.train import train
from tests.material import ROOT
from tests.material.training import write_rows


@pytest.fixture(scope="module")
def ray_cluster():
    """One local Ray for all runs of this module: a run that finds Ray connected uses it."""
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def rows(tmp_path_factory, page_images) -> Path:
    """Six questions over two or three pages, in EVisRAG's layout."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", page_images)


@pytest.fixture
def config(tmp_path, rows, tiny_model_path) -> TrainConfig:
    """Two steps of two prompts with four rollouts; `length` has signal even on a random model."""
    return TrainConfig(
        name="run",
        output_dir=str(tmp_path),
        total_steps=2,
        rewards={
            "accuracy": "rewards.evisrag:accuracy",
            "overlong": "rewards.evisrag:overlong",
            "vowels": "tests_rewards_for_train:vowels",
        },
        reward_args={"overlong": {"min_tokens": 4, "max_tokens": 24, "buffer_tokens": 8}},
        monitors={"marked": "rewards.evisrag:marked_rate"},
        model=ModelConfig(path=tiny_model_path),
        data=DataConfig(train=str(rows), val=str(rows)),
        inputs=InputsConfig(min_pixels=784, max_pixels=50_176, max_prompt_tokens=400),
        rollout=RolloutConfig(group_size=4, max_response_tokens=24, num_threads=1),
        algorithm=AlgorithmConfig(prompts_per_step=2),
        learner=LearnerConfig(
            device="cpu", precision="float32", lr=1e-3, num_threads=1, gradient_checkpointing="none",
            max_tokens_per_micro_batch=1024,
        ),
        validation=ValidationConfig(every=2, max_prompts=3, greedy=True, samples=2, temperature=1.0, top_p=1.0),
        checkpoint=CheckpointConfig(every=1, keep_last=2, metric="val/sampled/vowels", export=False),
        cluster=ClusterConfig(num_cpus=2, cpus={"rollout": 0.5, "learner": 0.4, "reward": 0.1}),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def own_reward(tmp_path_factory, monkeypatch):
    """A user's reward in a module of its own, with signal on random text."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "tests_rewards_for_train.py").write_text(
        "from rewards.api import Response, reward\n\n\n@reward\ndef vowels(response: Response) -> float:\n"
        "    return sum(c in 'aeiou' for c in response.text) / 10\n\n\n@reward\n"
        "def fails(response: Response) -> float:\n    raise LookupError('no such page')\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")


def metrics_of(config: TrainConfig) -> list[dict]:
    """All rows without what depends on the clock or the machine."""
    rows = read_metrics(Path(config.output_dir) / config.name)
    return [
        {key: value for key, value in row.items() if key != "time" and not key.startswith(("time/", "perf/"))}
        for row in rows
    ]


def variant(config: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(config, **changes)


def as_command(config: TrainConfig, tmp_path: Path) -> list[str]:
    """The same run as a user's command line, its recipe a yaml file of the user's own."""
    recipe = tmp_path / "conf" / "recipe" / "mine.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    recipe.write_text("# @package _global_\n" + yaml.safe_dump(plain))
    only = [f"~rewards.{name}" for name in ("evidence", "well_formed", "no_early_index", "think_differs")]
    return [sys.executable, "-m", "rsgrpo.train", "--config-dir", str(recipe.parent.parent), "recipe=mine", *only]


def test_a_run_leaves_metrics_rollouts_checkpoints_export_and_report(ray_cluster, config):
    config = variant(config, checkpoint=dataclasses.replace(config.checkpoint, export=True))
    train(config)
    folder = Path(config.output_dir) / "run"
    steps = [row["step"] for row in metrics_of(config)]
    assert steps == [0, 1, 2, 2]
    rows = metrics_of(config)
    assert {"val/greedy/accuracy", "val/sampled/vowels", "val/sampled/marked"} - set(rows[0]) <= {"val/sampled/marked"}
    for key in (
        "actor/loss",
        "actor/grad_norm",
        "reward/vowels/mean",
        "scope/accuracy/hit_rate",
        "scope/vowels/token_frac",
    ):
        assert key in rows[1], key
    assert rows[1]["actor/mismatch_max"] < 1e-4
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", "step_000001", "step_000002"]
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "rollouts" / "step_000002.parquet").exists()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    exported = AutoModelForImageTextToText.from_pretrained(folder / "export").state_dict()
    started = AutoModelForImageTextToText.from_pretrained(config.model.path).state_dict()
    changed = [name for name in started if not np.array_equal(started[name].numpy(), exported[name].numpy())]
    assert any("layers.0" in name for name in changed)
    assert not any("visual" in name for name in changed)
    AutoProcessor.from_pretrained(folder / "export")


def test_stopping_and_resuming_gives_the_same_metrics_bit_for_bit(ray_cluster, config):
    # A filter that refuses some groups makes surplus, which must survive too.
    filtered = dataclasses.replace(
        config.algorithm, filter=FilterConfig(enabled=True, low=-0.9, high=9.0, drop_without_signal=True)
    )
    config = variant(config, algorithm=filtered, total_steps=4)
    whole, parts = variant(config, name="whole"), variant(config, name="parts")
    train(whole)
    train(variant(parts, total_steps=2))
    train(parts)
    # The run of two steps validated at its last step, as the other did: 2 is a multiple of validation.every.
    assert metrics_of(parts) == metrics_of(whole)
    assert len(metrics_of(whole)) == 7


def test_sampling_ahead_uses_weights_one_step_old_and_resumes_bit_for_bit(ray_cluster, config):
    filtered = FilterConfig(enabled=True, low=-0.9, high=9.0, drop_without_signal=True)
    algorithm = dataclasses.replace(config.algorithm, filter=filtered, max_staleness=1, importance_cap=2.0)
    validation = ValidationConfig(every=0, at_start=False)
    checkpoint = dataclasses.replace(config.checkpoint, keep_last=9, keep_best=0)
    config = variant(config, algorithm=algorithm, total_steps=4, validation=validation, checkpoint=checkpoint)
    train(config)
    whole = metrics_of(config)
    # Step t learns from rollouts of version t - 2; the first from version 0.
    assert [row["rollout/oldest_weights_version"] for row in whole] == [0, 0, 1, 2]
    assert whole[0]["actor/mismatch_max"] < 1e-4 < whole[1]["actor/mismatch_max"]
    # Taken up after step 2: the batch of step 3 was sampled with version 1, which is gone; the checkpoint holds it.
    for step in (3, 4):
        shutil.rmtree(Path(config.output_dir) / "run" / "checkpoints" / f"step_{step:06d}")
    (Path(config.output_dir) / "run" / "checkpoints" / "latest").unlink()
    train(config)
    assert metrics_of(config) == whole


def test_a_finished_run_is_not_trained_again(ray_cluster, config, capsys):
    train(variant(config, total_steps=1))
    before = metrics_of(config)
    train(variant(config, total_steps=1))
    assert metrics_of(config) == before


def test_resume_never_refuses_a_folder_that_holds_a_run(ray_cluster, config):
    train(variant(config, total_steps=1))
    never = dataclasses.replace(config.checkpoint, resume="never")
    with pytest.raises(RsgrpoError, match=r"already holds a run, and checkpoint.resume=never"):
        train(variant(config, checkpoint=never))


def test_two_learner_ranks_take_the_same_first_step_as_one(ray_cluster, config):
    one = variant(config, name="one", total_steps=1)
    two = variant(
        config, name="two", total_steps=1, learner=dataclasses.replace(config.learner, num_ranks=2),
    )  # fmt: skip
    train(one)
    train(two)
    for row_one, row_two in zip(metrics_of(one), metrics_of(two), strict=True):
        assert row_one.keys() == row_two.keys()
        for key, value in row_one.items():
            assert row_two[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_a_run_resumes_on_another_number_of_ranks(ray_cluster, config):
    whole = variant(config, name="whole")
    train(whole)
    train(variant(config, name="parts", total_steps=1))
    train(variant(config, name="parts", learner=dataclasses.replace(config.learner, num_ranks=2)))
    steps_whole, steps_parts = (
        [row for row in metrics_of(variant(config, name=name)) if "actor/loss" in row] for name in ("whole", "parts")
    )
    assert len(steps_whole) == len(steps_parts) == 2
    for row_whole, row_parts in zip(steps_whole, steps_parts, strict=True):
        assert row_whole.keys() == row_parts.keys()
        for key, value in row_whole.items():
            assert row_parts[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_a_kl_term_brings_a_reference(ray_cluster, config):
    config = variant(config, algorithm=dataclasses.replace(config.algorithm, kl_coef=0.1))
    train(config)
    first, second = metrics_of(config)[1:3]
    assert first["actor/kl"] == pytest.approx(0, abs=1e-6)  # measured before the first update
    assert second["actor/kl"] > 1e-5


def test_a_failing_reward_ends_the_run_with_its_name_and_the_response(ray_cluster, config):
    failing = {**config.rewards, "bad": "tests_rewards_for_train:fails"}
    with pytest.raises(RsgrpoError, match=r"(?s)reward 'bad' failed on sample row\d#\d: LookupError: no such page"):
        train(variant(config, rewards=failing))


def test_missing_demo_data_names_the_command_to_run(config):
    data = DataConfig(train="demo/data/no.jsonl", val="demo/data/val.jsonl")
    with pytest.raises(RsgrpoError, match=r"data.train=demo/data/no.jsonl.*make demo"):
        train(variant(config, data=data, made_by={"demo/": "make demo"}))


def test_too_few_cpus_are_refused_with_the_arithmetic(ray_cluster, config):
    greedy = dataclasses.replace(config.cluster, num_cpus=0, cpus={"learner": 7.0})
    with pytest.raises(RsgrpoError, match=r"need 7.35 CPUs and 0 GPUs.*the cluster has 2 and 0"):
        train(variant(config, cluster=greedy))


def wait_for_step(folder: Path, step: int, process: subprocess.Popen, timeout_s: float = 180) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and process.poll() is None:
        if any(row["step"] >= step and "actor/loss" in row for row in read_metrics(folder)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached; exit code {process.poll()}")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_from_outside_goes_on_bit_for_bit(config, tmp_path, how):
    config = variant(config, total_steps=5, checkpoint=dataclasses.replace(config.checkpoint, every=2))
    stopped, whole = variant(config, name="stopped"), variant(config, name="whole")
    command = as_command(stopped, tmp_path / "a")
    with subprocess.Popen(
        command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        wait_for_step(tmp_path / "stopped", 3, process)
        process.send_signal(how)
        output = process.communicate(timeout=120)[0]
    newest = CheckpointFolder(tmp_path / "stopped" / "checkpoints", keep_last=2, keep_best=1).newest()
    assert newest is not None
    if how is signal.SIGTERM:
        assert process.returncode == 0, output
        assert "Stopped by SIGTERM after step" in output
        assert newest.step >= 3
    else:
        assert newest.step in (2, 4)
    for run, folder in ((stopped, "a"), (whole, "b")):
        subprocess.run(as_command(run, tmp_path / folder), cwd=tmp_path, check=True, capture_output=True, timeout=300)
    assert metrics_of(stopped) == metrics_of(whole)


def test_a_learner_that_dies_ends_the_program_at_once_and_says_which(config, tmp_path):
    config = variant(config, total_steps=50)
    command = as_command(config, tmp_path / "a")
    with subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_step(tmp_path / "run", 1, process)
        killed = subprocess.run(["pkill", "-KILL", "-P", str(raylet_of(process.pid)), "-f", "LearnerWorker"])
        assert killed.returncode == 0
        start = time.monotonic()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert time.monotonic() - start < 60
    assert errors.count("learner 0 died in ") == 1, errors
    assert re.search(r"error: step \d+: learner 0 died in \w+: ", errors), errors
    assert "run the same command to " in errors


def raylet_of(driver_pid: int) -> int:
    """Process id of the local Ray node that a driver started."""
    found = subprocess.run(["pgrep", "-P", str(driver_pid), "-f", "raylet/raylet"], capture_output=True, text=True)
    return int(found.stdout.split()[0])
