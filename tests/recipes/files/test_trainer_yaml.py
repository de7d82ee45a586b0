"""The training yaml of EasyR1, and of EVisRAG's fork of it, becomes a recipe; what has no counterpart is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from recipes import prepare
from recipes.files.trainer_yaml import open_points, translate
from rsgrpo import cli
from rsgrpo.config.train import TrainConfig
from rsgrpo.errors import ConfigError, InputError

EVISRAG = """
data: {prompt_key: prompt, answer_key: answer, image_key: image, max_prompt_length: 15000, max_response_length: 1536,
  rollout_batch_size: 512, seed: 1, min_pixels: 262144, max_pixels: 1568000, filter_overlong_prompts: false,
  video_key: video, video_fps: 2.0, override_chat_template: null, image_dir: pages}
algorithm: {adv_estimator: router, disable_kl: true, use_kl_loss: false, kl_penalty: low_var_kl, kl_coef: 1.0e-2,
  online_filtering: true, filter_key: overall, filter_low: 0.01, filter_high: 6.9}
worker:
  actor:
    global_batch_size: 32
    micro_batch_size_per_device_for_update: 1
    max_grad_norm: 1.0
    ulysses_size: 1
    clip_ratio_low: 0.2
    clip_ratio_high: 0.28
    model: {model_path: xxx/Qwen7B-SFT, enable_gradient_checkpointing: true, freeze_vision_tower: true}
    optim: {lr: 1e-6, weight_decay: 1.0e-2, strategy: adamw, lr_warmup_ratio: 0.0}
    offload: {offload_params: true}
  rollout: {n: 8, temperature: 1.0, top_p: 1.0, limit_images: 5, gpu_memory_utilization: 0.6, tensor_parallel_size: 2,
    val_override_config: {temperature: 0.1, top_p: 0.95, n: 1}}
  ref: {offload: {offload_params: true}}
  reward: {reward_type: batch, reward_function: "./examples/reward_function/evidencecot.py:sum_all"}
trainer: {total_epochs: 16, experiment_name: theirs, logger: [console, tensorboard], nnodes: 1, n_gpus_per_node: 8,
  max_try_make_batch: 20, val_freq: 10, val_before_train: true, save_freq: 10, save_limit: 8,
  find_last_checkpoint: true}
"""
EASYR1 = """
data: {train_files: org/math@train, val_files: [org/math@test], prompt_key: problem, image_key: images,
  rollout_batch_size: 512, format_prompt: math.jinja, filter_overlong_prompts: true}
algorithm: {adv_estimator: grpo, disable_kl: false, use_kl_loss: true, kl_penalty: low_var_kl, kl_coef: 1.0e-2}
worker:
  actor: {global_batch_size: 128, model: {model_path: org/model}, optim: {lr: 1.0e-6}}
  rollout: {n: 5, tensor_parallel_size: 2, top_k: -1}
  reward: {score_function: "./examples/score_function/math.py:compute_score"}
trainer: {experiment_name: theirs, n_gpus_per_node: 8, val_freq: -1, save_limit: -1, logger: [wandb, swanlab]}
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch):
    """Write a yaml of theirs and return its path."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        Path("theirs.yaml").write_text(text)
        return Path("theirs.yaml")

    return write


def reasons(found) -> dict[str, str]:
    return {key: why for key, _, why in found.left}


def test_evisrags_yaml_and_command_line_are_our_recipe(theirs, capsys):
    theirs(EVISRAG)
    further = ["data.rollout_batch_size=32", "data.train_files=train.jsonl", "data.val_files=val.jsonl"]
    assert prepare.main(["settings", "theirs.yaml", *further, "--out", "my/recipe/evisrag.yaml"]) == 0
    said = capsys.readouterr().out
    assert "micro_batch_size_per_device_for_update=1: learner.max_tokens_per_micro_batch counts tokens" in said
    assert "python -m rsgrpo.plan --config-dir my recipe=evisrag" in said
    where = f"hydra.searchpath=[file://{Path('my').absolute()}]"
    made = cli.compose(TrainConfig, "config", [where, "recipe=evisrag"])
    shipped = cli.compose(TrainConfig, "config", ["recipe=evisrag_7b"])
    assert made.model.path == "xxx/Qwen7B-SFT"
    assert (made.data.train, made.data.val, made.data.image_dir) == ("train.jsonl", "val.jsonl", "pages")
    assert made.algorithm == shipped.algorithm
    assert made.inputs == shipped.inputs
    assert made.rewards == shipped.rewards
    assert made.validation == shipped.validation
    for name in ("lr", "betas", "weight_decay", "num_ranks", "max_grad_norm", "max_tokens_per_micro_batch"):
        expected = 15000 + 8 * 1536 if name == "max_tokens_per_micro_batch" else getattr(shipped.learner, name)
        assert getattr(made.learner, name) == expected
    assert (made.rollout.num_workers, made.rollout.vllm.tensor_parallel_size) == (4, 2)
    assert (made.epochs, made.checkpoint.keep_last, made.tracking.tensorboard) == (16, 8, True)


def test_what_has_no_counterpart_is_named_with_the_reason(theirs):
    found = translate(theirs(EVISRAG))
    assert set(reasons(found)) == {
        "worker.actor.micro_batch_size_per_device_for_update",
        "worker.actor.offload.offload_params",
        "worker.ref.offload.offload_params",
    }
    written = yaml.safe_load(found.recipe())
    assert found.recipe().startswith("# @package _global_\n# No counterpart:\n#   worker.actor.micro_batch")
    assert written["learner"]["lr"] == 1e-6


def test_a_yaml_of_easyr1_keeps_its_kl_its_updates_and_its_reward(theirs):
    found = translate(theirs(EASYR1))
    assert found.keys["data.train"] == "org/math:train"
    assert found.keys["data.val"] == "org/math:test"
    assert found.keys["algorithm.updates_per_step"] == 4
    assert (found.keys["algorithm.kl_coef"], found.keys["algorithm.kl_estimator"]) == (0.01, "k3")
    assert found.keys["rollout.top_k"] == 0
    assert found.keys["validation.every"] == 0
    assert found.keys["reward_args.score.function"] == "math:compute_score"
    assert found.groups == {
        "rollout": "vllm",
        "data": "files",
        "algorithm": "grpo",
        "tracking": "wandb",
        "rewards": "null",
    }
    said = reasons(found)
    assert said["data.format_prompt"].startswith("write the template")
    assert "swanlab" in str(found.left)
    assert said["trainer.save_limit"] == "checkpoint.keep_last must be a number above 0"
    assert open_points(found, "theirs") == ""


@pytest.mark.parametrize(
    ("further", "their_key", "why"),
    [
        ("algorithm.adv_estimator=gae", "algorithm.adv_estimator", "only router, grpo"),
        ("algorithm.use_kl_loss=false", "algorithm.use_kl_loss", "KL is a term of the loss"),
        ("algorithm.kl_penalty=full", "algorithm.kl_penalty", "estimators are k1, k2, k3"),
        ("worker.actor.global_batch_size=100", "worker.actor.global_batch_size", "must divide"),
        ("worker.actor.ulysses_size=2", "worker.actor.ulysses_size", "no sequence parallelism"),
        ("data.train_files=[a.parquet, b.parquet]", "data.train_files", "join the files"),
        ("worker.actor.strange=3", "worker.actor.strange", "there is no such setting"),
        ("worker.actor.ppo_epochs=2", "worker.actor.ppo_epochs", "learned from once"),
    ],
)
def test_a_setting_that_we_lack_is_not_dropped_in_silence(theirs, further, their_key, why):
    assert why in reasons(translate(theirs(EASYR1), [further]))[their_key]


def test_settings_that_our_run_would_refuse_are_left_to_the_user(theirs, capsys):
    theirs(EASYR1)
    further = ["worker.rollout.top_p=0.99"]
    assert prepare.main(["settings", "theirs.yaml", *further, "--out", "my/recipe/math.yaml"]) == 0
    assert "to decide: rollout.top_p=0.99" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "cannot be read as yaml"), ("- 1", "must be a mapping"), ("a: 1", "not a training yaml of EasyR1")],
)
def test_what_is_not_their_yaml_is_refused(theirs, text, message):
    with pytest.raises(InputError, match=message):
        translate(theirs(text))


def test_a_value_that_our_key_does_not_take_is_named(theirs):
    with pytest.raises(ConfigError, match=r"rollout\.group_size must be >= 1"):
        open_points(translate(theirs(EASYR1), ["worker.rollout.n=0"]), "theirs")


def test_a_recipe_file_must_lie_in_a_folder_recipe(theirs, capsys):
    theirs(EASYR1)
    assert prepare.main(["settings", "theirs.yaml", "--out", "mine.yaml"]) == 2
    assert "--out must be FOLDER/recipe/NAME.yaml, got mine.yaml" in capsys.readouterr().err
