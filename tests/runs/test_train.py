"""The whole loop on a tiny model: engines, rewards, learner and driver as real processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from tests.material.training import write_rewards, write_rows


@pytest.fixture(scope="module")
def ray_cluster():
    """One local Ray for all runs of this module: a run that finds Ray connected uses it."""
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def rows(tmp_path_factory, page_images) -> Path:
    """Six questions over two or three pages, in EVisRAG's layout."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", page_images)


def config_of(output_dir: Path, rows: Path, model_path: str) -> TrainConfig:
    """Two steps of two prompts with four rollouts; `length` has signal even on a random model."""
    return TrainConfig(
        name="run",
        output_dir=str(output_dir),
        total_steps=2,
        rewards={
            "accuracy": "rewards.evisrag:accuracy",
            "overlong": "rewards.evisrag:overlong",
            "vowels": "tests_rewards_for_train:vowels",
        },
        reward_args={"overlong": {"min_tokens": 4, "max_tokens": 24, "buffer_tokens": 8}},
        monitors={"marked": "rewards.evisrag:marked_rate"},
        model=ModelConfig(path=model_path),
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


@pytest.fixture
def config(tmp_path, rows, tiny_model_path) -> TrainConfig:
    return config_of(tmp_path, rows, tiny_model_path)


@pytest.fixture(scope="module")
def whole(ray_cluster, own_rewards, rows, tiny_model_path, tmp_path_factory) -> TrainConfig:
    """The undisturbed run that others are compared with: five steps, a checkpoint after every second, an export."""
    config = config_of(tmp_path_factory.mktemp("whole"), rows, tiny_model_path)
    config = variant(config, total_steps=5, checkpoint=dataclasses.replace(config.checkpoint, every=2, export=True))
    train(config)
    return config


def copied(whole: TrainConfig, output_dir: Path) -> TrainConfig:
    """Return the whole run in a folder of its own."""
    shutil.copytree(whole_folder(whole), output_dir / whole.name, symlinks=True)
    return variant(whole, output_dir=str(output_dir))


def whole_folder(config: TrainConfig) -> Path:
    return Path(config.output_dir) / config.name


@pytest.fixture(scope="module", autouse=True)
def own_rewards(tmp_path_factory):
    """A user's rewards in a module of its own, with signal on random text."""
    folder = tmp_path_factory.mktemp("rewards")
    write_rewards(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
        yield


def metrics_of(config: TrainConfig) -> list[dict]:
    """All rows without what depends on the clock or the machine."""
    rows = read_metrics(Path(config.output_dir) / config.name)
    return [
        {key: value for key, value in row.items() if key != "time" and not key.startswith(("time/", "perf/"))}
        for row in rows
    ]


def variant(config: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(config, **changes)


def in_one_process(config: TrainConfig, output_dir: Path) -> TrainConfig:
    """The same run without Ray (`cluster=inline`), in a folder of its own."""
    return variant(config, output_dir=str(output_dir), cluster=ClusterConfig(kind="inline"))


def as_command(config: TrainConfig, tmp_path: Path) -> list[str]:
    """The same run as a user's command line, its recipe a yaml file of the user's own."""
    recipe = tmp_path / "conf" / "recipe" / "mine.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    recipe.write_text("# @package _global_\n" + yaml.safe_dump(plain))
    only = [f"~rewards.{name}" for name in ("evidence", "well_formed", "no_early_index", "think_differs")]
    return [sys.executable, "-m", "rsgrpo.train", "--config-dir", str(recipe.parent.parent), "recipe=mine", *only]


def test_a_run_leaves_metrics_rollouts_checkpoints_export_and_report(whole):
    folder = whole_folder(whole)
    rows = metrics_of(whole)
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4, 5, 5]
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
    checkpoints = {path.name for path in (folder / "checkpoints").iterdir()}
    assert {"latest", "step_000004", "step_000005"} <= checkpoints  # the newest two, and the best of all
    assert len(checkpoints) <= 4
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "rollouts" / "step_000002.parquet").exists()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    exported = AutoModelForImageTextToText.from_pretrained(folder / "export").state_dict()
    started = AutoModelForImageTextToText.from_pretrained(whole.model.path).state_dict()
    changed = [name for name in started if not np.array_equal(started[name].numpy(), exported[name].numpy())]
    assert any("layers.0" in name for name in changed)
    assert not any("visual" in name for name in changed)
    AutoProcessor.from_pretrained(folder / "export")


def test_one_process_gives_the_numbers_of_many_bit_for_bit(whole, tmp_path):
    one = in_one_process(whole, tmp_path)
    train(one)
    assert metrics_of(one) == metrics_of(whole)


def test_resuming_with_a_filter_gives_the_same_metrics_bit_for_bit(config, tmp_path):
    # A filter that refuses some groups leaves prompts for the next step, which must survive too.
    filtered = FilterConfig(enabled=True, low=-0.9, high=9.0, drop_without_signal=True)
    checkpoint = dataclasses.replace(config.checkpoint, keep_last=9, keep_best=0)
    algorithm = dataclasses.replace(config.algorithm, filter=filtered)
    config = variant(in_one_process(config, tmp_path), algorithm=algorithm, total_steps=4, checkpoint=checkpoint)
    train(config)
    rows = metrics_of(config)
    assert len(rows) == 7
    forget_after(config, 2)
    train(config)
    assert metrics_of(config) == rows


def forget_after(config: TrainConfig, step: int) -> None:
    """Remove the checkpoints after a step, as if the run had been killed before it wrote them."""
    folder = whole_folder(config) / "checkpoints"
    for checkpoint in folder.glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    (folder / "latest").unlink()


@pytest.mark.parametrize(("staleness", "first_on_ray"), [(1, True), (3, False)])
def test_sampling_ahead_uses_older_weights_and_resumes_bit_for_bit(ray_cluster, config, staleness, first_on_ray):
    filtered = FilterConfig(enabled=True, low=-0.9, high=9.0, drop_without_signal=True)
    algorithm = dataclasses.replace(config.algorithm, filter=filtered, max_staleness=staleness)
    validation = ValidationConfig(every=0, at_start=False)
    checkpoint = dataclasses.replace(config.checkpoint, keep_last=9, keep_best=0)
    config = variant(config, algorithm=algorithm, total_steps=4, validation=validation, checkpoint=checkpoint)
    one_process = in_one_process(config, Path(config.output_dir))
    train(config if first_on_ray else one_process)
    whole = metrics_of(config)
    # Step t learns from rollouts of version t - 1 - staleness; the first ones from version 0.
    versions = [row["rollout/oldest_weights_version"] for row in whole]
    assert versions == [max(0, step - 1 - staleness) for step in (1, 2, 3, 4)]
    assert whole[0]["actor/mismatch_max"] < 1e-4 < whole[1]["actor/mismatch_max"]
    # Taken up after step 2, on the other layout: the batches ahead were sampled with versions that are gone; the
    # checkpoint holds them.
    forget_after(config, 2)
    train(one_process if first_on_ray else config)
    assert metrics_of(config) == whole


def test_a_finished_run_is_not_trained_again(whole, tmp_path):
    again = in_one_process(copied(whole, tmp_path), tmp_path)
    train(again)
    assert metrics_of(again) == metrics_of(whole)


def test_resume_never_refuses_a_folder_that_holds_a_run(whole):
    never = dataclasses.replace(whole.checkpoint, resume="never")
    with pytest.raises(RsgrpoError, match=r"already holds a run, and checkpoint.resume=never"):
        train(variant(whole, checkpoint=never))


def assert_close(row: dict, wanted: dict) -> None:
    assert row.keys() == wanted.keys()
    for key, value in wanted.items():
        assert row[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def learning_rows(config: TrainConfig) -> list[dict]:
    return [row for row in metrics_of(config) if "actor/loss" in row]


def test_a_run_resumes_on_two_ranks_which_take_the_same_step_as_one(whole, tmp_path):
    parts = copied(whole, tmp_path)
    newest = max(step for step in (2, 4) if (whole_folder(parts) / "checkpoints" / f"step_{step:06d}").exists())
    forget_after(parts, newest)
    parts = variant(parts, total_steps=newest + 1, learner=dataclasses.replace(parts.learner, num_ranks=2))
    train(parts)
    rows = learning_rows(parts)
    assert rows[:newest] == learning_rows(whole)[:newest]
    assert_close(rows[newest], learning_rows(whole)[newest])


def test_a_kl_term_brings_a_reference(ray_cluster, config, tmp_path):
    algorithm = dataclasses.replace(config.algorithm, kl_coef=0.1)
    checkpoint = dataclasses.replace(config.checkpoint, keep_best=0)
    nothing = ValidationConfig(every=0, at_start=False)
    config = variant(config, algorithm=algorithm, validation=nothing, checkpoint=checkpoint)
    train(config)
    first, second = metrics_of(config)
    assert first["actor/kl"] == pytest.approx(0, abs=1e-6)  # measured before the first update
    assert second["actor/kl"] > 1e-5
    one = in_one_process(config, tmp_path / "one")
    train(one)
    assert metrics_of(one) == metrics_of(config)


def test_a_failing_reward_ends_the_run_with_its_name_and_the_response(ray_cluster, config):
    failing = {**config.rewards, "bad": "tests_rewards_for_train:fails"}
    message = r"(?s)reward 'bad' failed on sample row\d#\d: LookupError: no such page.* in fails: raise LookupError"
    with pytest.raises(RsgrpoError, match=message):
        train(variant(config, rewards=failing, rollout=dataclasses.replace(config.rollout, engine="fake")))
    log = (Path(config.output_dir) / config.name / "run.log").read_text()
    assert re.search(r'File ".*tests_rewards_for_train.py", line \d+, in fails', log), log


def test_missing_demo_data_names_the_command_to_run(config):
    data = DataConfig(train="demo/data/no.jsonl", val="demo/data/val.jsonl")
    with pytest.raises(RsgrpoError, match=r"data.train=demo/data/no.jsonl.*make demo"):
        train(variant(config, data=data, made_by={"demo/": "make demo"}))


def test_too_few_cpus_are_refused_with_the_arithmetic(ray_cluster, config):
    greedy = dataclasses.replace(config.cluster, num_cpus=0, cpus={"learner": 7.0})
    with pytest.raises(RsgrpoError, match=r"need 7.35 CPUs and 0 GPUs.*the cluster has 2 and 0"):
        train(variant(config, cluster=greedy))


def wait_for_step(folder: Path, step: int, is_running: Callable[[], bool], timeout_s: float = 180) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and is_running():
        if any(row["step"] >= step and "actor/loss" in row for row in read_metrics(folder)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def wait_for_checkpoint(folder: Path, step: int, is_running: Callable[[], bool], timeout_s: float = 180) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and is_running():
        if (folder / "checkpoints" / f"step_{step:06d}").exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"the checkpoint of step {step} was not written")


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_from_outside_resumes_bit_for_bit(whole, tmp_path, how):
    stopped = variant(whole, output_dir=str(tmp_path), name="stopped")
    command = as_command(stopped, tmp_path)
    with start(command, tmp_path) as process:
        try:
            wait_for_checkpoint(tmp_path / "stopped", 2, lambda: process.poll() is None)
        finally:
            process.send_signal(how)
        output = process.communicate(timeout=120)[0]
    newest = CheckpointFolder(tmp_path / "stopped" / "checkpoints", keep_last=2, keep_best=1).newest()
    assert newest is not None, output
    if how is signal.SIGTERM:
        assert process.returncode == 0, output
        assert "Stopped by SIGTERM after step" in output
        assert newest.step >= 2
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    else:
        assert newest.step in (2, 4)
        train(in_one_process(stopped, tmp_path))  # another layout of processes: the numbers stay
    assert metrics_of(stopped) == metrics_of(whole)


def test_a_run_whose_learner_dies_goes_on_by_itself_with_the_same_numbers(whole, tmp_path, caplog):
    recovered = variant(whole, output_dir=str(tmp_path), name="recovered")

    ended = threading.Event()

    def kill_behind_step_2() -> None:
        wait_for_checkpoint(tmp_path / "recovered", 2, lambda: not ended.is_set())
        kill_learner(os.getpid())

    with ThreadPoolExecutor(1) as threads:
        killed = threads.submit(kill_behind_step_2)
        try:
            train(recovered)
        finally:
            ended.set()
        killed.result()
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert len(re.findall(r"step \d: learner 0 died in \w+", said)) == 1, said
    assert re.search(r"resumes from step [24] by itself \(recovery 1 of 3", said), said
    assert metrics_of(recovered) == metrics_of(whole)
    assert {row.get("perf/recoveries") for row in read_metrics(tmp_path / "recovered")} >= {1.0}
    exports = [sha256_of(whole_folder(run) / "export" / "model.safetensors") for run in (recovered, whole)]
    assert exports[0] == exports[1]


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kill_learner(driver_pid: int) -> None:
    killed = subprocess.run(["pkill", "-KILL", "-P", str(raylet_of(driver_pid)), "-f", "LearnerWorker"])
    assert killed.returncode == 0


@pytest.mark.slow
def test_a_learner_that_dies_for_good_ends_the_program_at_once_and_says_which(config, tmp_path):
    config = variant(config, total_steps=50, cluster=dataclasses.replace(config.cluster, max_recoveries=0))
    with start(as_command(config, tmp_path / "a"), tmp_path) as process:
        try:
            wait_for_step(tmp_path / "run", 1, lambda: process.poll() is None)
            kill_learner(process.pid)
            output = process.communicate(timeout=60)[0]
        finally:
            process.kill()
    assert process.returncode == 1
    assert output.count("learner 0 died in ") == 1, output
    assert re.search(r"error: step \d+: learner 0 died in \w+: ", output), output
    assert "run the same command to " in output


def raylet_of(driver_pid: int) -> int:
    """Process id of the local Ray node that a driver started."""
    found = subprocess.run(["pgrep", "-P", str(driver_pid), "-f", "raylet/raylet"], capture_output=True, text=True)
    return int(found.stdout.split()[0])
