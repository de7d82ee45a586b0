"""A short training run on a tiny model, for tests of the whole loop."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from rollout.config import InputsConfig, RolloutConfig
from rsgrpo.config.train import (
    AlgorithmConfig,
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    LearnerConfig,
    ModelConfig,
    TrainConfig,
    ValidationConfig,
)
from rsgrpo.records.tracking import read_metrics


def write_rows(path: Path, page_images: list[str], num_rows: int = 6) -> Path:
    """Write questions over two or three pages, in EVisRAG's layout."""
    with open(path, "w") as file:
        for index in range(num_rows):
            pages = page_images[: 2 + index % 2]
            evidence = "\n".join(
                f"[{i + 1}]: {'7' if i == 0 else 'no relevant information'}" for i in range(len(pages))
            )
            row = {
                "id": f"row{index}",
                "prompt": "<image>" * len(pages) + "what amount is on page 1?",
                "answer": f"<evidence>\n{evidence}\n</evidence>\n<answer>7</answer>",
                "image": pages,
            }
            file.write(json.dumps(row) + "\n")
    return path


def tiny_run(output_dir: Path, rows: Path, model_path: str, **changes: Any) -> TrainConfig:
    """Two steps of two prompts with four rollouts and no validation; `length` has signal even on a random model."""
    return TrainConfig(
        **{
            "name": "run",
            "output_dir": str(output_dir),
            "total_steps": 2,
            "rewards": {"overlong": "rewards.evisrag:overlong", "vowels": "tests_rewards_for_train:vowels"},
            "reward_args": {"overlong": {"min_tokens": 4, "max_tokens": 24, "buffer_tokens": 8}},
            "model": ModelConfig(path=model_path),
            "data": DataConfig(train=str(rows)),
            "inputs": InputsConfig(min_pixels=784, max_pixels=50_176, max_prompt_tokens=400),
            "rollout": RolloutConfig(group_size=4, max_response_tokens=24, num_threads=1),
            "algorithm": AlgorithmConfig(prompts_per_step=2),
            "learner": LearnerConfig(
                device="cpu",
                precision="float32",
                lr=1e-3,
                num_threads=1,
                gradient_checkpointing="none",
                max_tokens_per_micro_batch=1024,
            ),
            "validation": ValidationConfig(every=0, at_start=False),
            "checkpoint": CheckpointConfig(every=1, keep_last=2, keep_best=0, export=False),
            "cluster": ClusterConfig(num_cpus=2, cpus={"rollout": 0.4, "learner": 0.4, "reward": 0.1}),
            **changes,
        }
    )


def write_rewards(folder: Path) -> None:
    """Write `tests_rewards_for_train.py`, a user's own module with a reward that has signal on random text."""
    (folder / "tests_rewards_for_train.py").write_text(
        "from rewards.api import Response, reward\n\n\n@reward\ndef vowels(response: Response) -> float:\n"
        "    return sum(c in 'aeiou' for c in response.text) / 10\n\n\n@reward\n"
        "def fails(response: Response) -> float:\n    raise LookupError('no such page')\n"
    )


def steps_of(config: TrainConfig) -> list[dict]:
    """Rows of training steps."""
    return [row for row in read_metrics(Path(config.output_dir) / config.name) if "actor/loss" in row]


def write_recipe(folder: Path, config: TrainConfig) -> list[str]:
    """Write a configuration as a recipe of this folder; return the command that trains with it there."""
    recipe = folder / "conf" / "recipe" / "mine.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("# @package _global_\n" + yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config)))))
    names = ("accuracy", "evidence", "well_formed", "no_early_index", "think_differs")  # of the default recipe
    command = [sys.executable, "-m", "rsgrpo.train", "--config-dir", str(folder / "conf"), "recipe=mine"]
    return [*command, *(f"~rewards.{name}" for name in names)]
