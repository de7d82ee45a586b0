"""Whole programs over rows with videos, images and text: supervised steps, RL with the embedded engine, inference."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from recipes import infer
from recipes.sft import sft
from rollout.config import InputsConfig
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
    assert all(step["rollout/prompt_errors"] == 0 for step in steps if "rollout/prompt_errors" in step)
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
    limits = ["--min-pixels", "784", "--max-pixels", "784", "--max-videos", "1", "--max-tokens", "8", "--prompt", "raw"]
    assert infer.main(["--batch", config.data.train, "--model", str(export), "--out", str(out), *limits]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["id"] for line in lines if line["finish_reason"] != "error"} == {"r0", "r1", "r2", "r3"}


def as_written(answer: Any, columns: Any, num_images: int) -> dict[str, Any]:
    """A reader of the gold column: the response to imitate."""
    return {"gold": answer, "answers": [answer]}
