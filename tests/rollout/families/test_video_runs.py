"""Whole programs over rows with videos, images and text: supervised steps, RL and inference with both engines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from recipes import infer
from recipes.sft import sft
from rollout.config import InputsConfig, VllmConfig
from rsgrpo.config.train import ClusterConfig, DataConfig, SftConfig, TrainConfig
from rsgrpo.records.rollouts import read_rollouts, rollout_files
from rsgrpo.train import train
from tests.material.training import steps_of, tiny_run

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path, page_images, tiny_model_path) -> TrainConfig:
    """Two steps, each of a row of every kind."""
    kinds: list[dict[str, Any]] = [
        {"prompt": "<video>what happens?", "video": [page_images[:3]]},
        {"prompt": "<image><video>which?", "image": page_images[:1], "video": [page_images[:2]]},
        {"prompt": "<image>what?", "image": page_images[:1]},
        {"prompt": "what?"},
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"id": f"r{i}", "answer": "it is 7", **row}) for i, row in enumerate(kinds)))
    inputs = InputsConfig(min_pixels=784, max_pixels=784, max_videos=1, max_prompt_tokens=400)
    one = ClusterConfig(kind="inline")
    config = tiny_run(tmp_path / "runs", rows, tiny_model_path, inputs=inputs, cluster=one)
    data, algorithm = DataConfig(train=str(rows)), dataclasses.replace(config.algorithm, prompts_per_step=4)
    rewards = {"overlong": config.rewards["overlong"]}
    return dataclasses.replace(config, data=data, algorithm=algorithm, rewards=rewards)


def test_rl_trains_on_rows_of_every_kind_and_keeps_their_videos(config):
    train(config)  # with the engine check and the self-check
    steps = steps_of(config)
    assert len(steps) == 2
    assert [step["rollout/groups_sampled"] for step in steps] == [4, 4]
    assert_stored(config)


def test_rl_with_vllm_trains_on_the_same_rows(config):
    """A frozen tower and four rows a step; every row's tokens are counted, and the gate compares the two videos."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    vllm = VllmConfig(kv_cache_gib=0.0625, engine_args={"max_num_seqs": 16, "mm_processor_cache_gb": 0.25})
    rollout = dataclasses.replace(config.rollout, engine="vllm", vllm=vllm)
    cluster = ClusterConfig(num_cpus=2, cpus={"rollout": 0.4, "learner": 0.4, "reward": 0.1})
    train(dataclasses.replace(config, rollout=rollout, cluster=cluster))
    steps = steps_of(config)
    assert [step["rollout/groups_sampled"] for step in steps] == [4, 4]
    assert all(step["actor/mismatch_max"] < 1e-4 for step in steps)
    assert [step["rollout/oldest_weights_version"] for step in steps] == [0, 1]
    assert_stored(config)


def assert_stored(config: TrainConfig) -> None:
    [file, *_] = rollout_files(Path(config.output_dir) / config.name).values()
    stored = {row.prompt_id: (len(row.images), row.videos) for row in read_rollouts(file)}
    assert stored == {
        "r0": (3, ((0.0, 0.5, 1.0),)), "r1": (3, ((0.0, 0.5),)), "r2": (1, ()), "r3": (0, ())
    }  # fmt: skip


def test_supervised_steps_and_inference_read_them(config, tmp_path):
    data = dataclasses.replace(config.data, gold="tests.rollout.families.test_video_runs:as_written")
    names = {field.name for field in dataclasses.fields(SftConfig)} & {
        field.name for field in dataclasses.fields(config)
    }
    shared = {name: getattr(config, name) for name in names}
    changes = {"data": data, "checkpoint": dataclasses.replace(config.checkpoint, export=True), "name": "sft"}
    settings = SftConfig(**{**shared, **changes, "batch_size": 4, "max_response_tokens": 24})
    sft(settings)
    export = tmp_path / "runs" / "sft" / "export"
    assert (export / "model.safetensors").exists()
    out = tmp_path / "answers.jsonl"
    assert_answered(infer_with("hf", config, str(export), out))


def test_inference_with_vllm_reads_them(config, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    answers = {
        engine: infer_with(engine, config, config.model.path, tmp_path / f"{engine}.jsonl") for engine in ("hf", "vllm")
    }
    assert_answered(answers["vllm"])
    assert [line["raw"] for line in answers["vllm"]] == [line["raw"] for line in answers["hf"]]


def infer_with(engine: str, config: TrainConfig, model: str, out: Path) -> list[dict[str, Any]]:
    limits = ["--min-pixels", "784", "--max-pixels", "784", "--max-videos", "1", "--max-tokens", "8", "--prompt", "raw"]
    command = ["--batch", config.data.train, "--model", model, "--out", str(out), "--engine", engine, *limits]
    command += ["--max-prompt-tokens", "400"]
    assert infer.main(command) == 0
    return sorted((json.loads(line) for line in out.read_text().splitlines()), key=lambda line: line["id"])


def assert_answered(lines: list[dict[str, Any]]) -> None:
    assert [line["id"] for line in lines if line["finish_reason"] != "error"] == ["r0", "r1", "r2", "r3"]


def as_written(answer: Any, columns: Any, num_images: int) -> dict[str, Any]:
    """A reader of the gold column: the response to imitate."""
    return {"gold": answer, "answers": [answer]}
