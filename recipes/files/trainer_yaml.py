"""Turn the training yaml of EasyR1 (and of EVisRAG's fork of it) into a recipe of ours.

The keys are those of `examples/config.yaml` of hiyouga/EasyR1 and OpenBMB/VisRAG. What has no counterpart is returned
with the reason.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rollout.files import write_text
from rsgrpo.errors import ConfigError, InputError

SAME = {
    "data.prompt_key": "data.columns.prompt",
    "data.answer_key": "data.columns.answer",
    "data.image_key": "data.columns.image",
    "data.image_dir": "data.image_dir",
    "data.max_prompt_length": "inputs.max_prompt_tokens",
    "data.max_response_length": "rollout.max_response_tokens",
    "data.rollout_batch_size": "algorithm.prompts_per_step",
    "data.shuffle": "data.shuffle",
    "data.seed": "seed",
    "data.min_pixels": "inputs.min_pixels",
    "data.max_pixels": "inputs.max_pixels",
    "algorithm.online_filtering": "algorithm.filter.enabled",
    "algorithm.filter_low": "algorithm.filter.low",
    "algorithm.filter_high": "algorithm.filter.high",
    "worker.actor.max_grad_norm": "learner.max_grad_norm",
    "worker.actor.clip_ratio_low": "algorithm.clip_low",
    "worker.actor.clip_ratio_high": "algorithm.clip_high",
    "worker.actor.clip_ratio_dual": "algorithm.dual_clip",
    "worker.actor.model.model_path": "model.path",
    "worker.actor.model.trust_remote_code": "model.trust_remote_code",
    "worker.actor.model.freeze_vision_tower": "model.freeze_vision",
    "worker.actor.optim.lr": "learner.lr",
    "worker.actor.optim.betas": "learner.betas",
    "worker.actor.optim.weight_decay": "learner.weight_decay",
    "worker.actor.optim.lr_warmup_steps": "learner.warmup_steps",
    "worker.actor.optim.lr_scheduler_type": "learner.lr_schedule",
    "worker.actor.fsdp.enable_cpu_offload": "learner.offload",
    "worker.rollout.n": "rollout.group_size",
    "worker.rollout.temperature": "rollout.temperature",
    "worker.rollout.top_p": "rollout.top_p",
    "worker.rollout.gpu_memory_utilization": "rollout.vllm.gpu_memory_utilization",
    "worker.rollout.tensor_parallel_size": "rollout.vllm.tensor_parallel_size",
    "worker.rollout.enforce_eager": "rollout.vllm.engine_args.enforce_eager",
    "worker.rollout.max_num_batched_tokens": "rollout.vllm.engine_args.max_num_batched_tokens",
    "worker.rollout.max_model_len": "rollout.vllm.engine_args.max_model_len",
    "worker.rollout.val_override_config.temperature": "validation.temperature",
    "worker.rollout.val_override_config.top_p": "validation.top_p",
    "worker.rollout.val_override_config.n": "validation.samples",
    "trainer.total_epochs": "epochs",
    "trainer.total_episodes": "epochs",
    "trainer.max_steps": "total_steps",
    "trainer.project_name": "tracking.project",
    "trainer.experiment_name": "name",
    "trainer.val_before_train": "validation.at_start",
    "trainer.val_generations_to_log": "tracking.rollout_table_rows",
}
"""Their key -> ours, where the value means the same."""

OURS_ALWAYS = (
    "worker.actor.padding_free",
    "worker.actor.dynamic_batching",
    "worker.actor.fsdp.enable_full_shard",
    "worker.actor.fsdp.enable_rank0_init",
    "worker.rollout.enable_chunked_prefill",
    "worker.rollout.disable_tqdm",
    "worker.reward.reward_type",
    "worker.reward.num_cpus",
    "algorithm.filter_key",
    "data.val_batch_size",
    "data.mini_rollout_batch_size",
)
"""Keys whose matter is decided by how this trainer works, and which a user therefore need not carry over."""

NONE = {
    "data.video_key": "videos are not trained on",
    "data.video_fps": "videos are not trained on",
    "data.format_prompt": "write the template with {question} and {images} and set prompt.file",
    "data.override_chat_template": "the model's own chat template is used; set prompt.system for a system message",
    "worker.actor.micro_batch_size_per_device_for_update": "learner.max_tokens_per_micro_batch counts tokens, not rows",
    "worker.actor.micro_batch_size_per_device_for_experience": "old log-probabilities come from the training pass",
    "worker.actor.ulysses_size": "there is no sequence parallelism",
    "worker.actor.ulysses_sequence_parallel_size": "there is no sequence parallelism",
    "worker.actor.optim.lr_warmup_ratio": "set learner.warmup_steps",
    "worker.actor.optim.strategy": "the optimizer is AdamW with float32 state",
    "worker.actor.offload.offload_params": "`python -m rsgrpo.plan` says whether learner.offload=true is needed",
    "worker.actor.offload.offload_optimizer": "`python -m rsgrpo.plan` says whether learner.offload=true is needed",
    "trainer.val_only": "use `python -m recipes.evaluate`",
    "trainer.save_model_only": "a checkpoint always holds all that a resumed run needs",
    "trainer.save_checkpoint_path": "the run's folder is <output_dir>/<name>",
    "trainer.load_checkpoint_path": "a run resumes from its own folder",
    "worker.reward.reward_function_kwargs": "set reward_args.NAME",
}
"""Their key -> why it has no counterpart, and what to do."""

UNSET = (None, False, 0, 0.0, "", "null")
ESTIMATORS = {"router": "rs_grpo", "grpo": "grpo", "rloo": "rloo", "dr_grpo": "dr_grpo"}
KL_KINDS = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
LOGGERS = {"wandb": "wandb", "tensorboard": "tensorboard"}
EVISRAG_REWARDS = "evidencecot.py"


@dataclass(slots=True)
class TranslatedYaml:
    """A recipe. groups: group -> option. keys: our dotted key -> value. left: (their key, value, why) of the rest."""

    groups: dict[str, str] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    left: list[tuple[str, Any, str]] = field(default_factory=list)

    def recipe(self) -> str:
        """Return the text of a recipe file, for `--config-dir FOLDER recipe=NAME` with the file in FOLDER/recipe."""
        defaults = [
            {f"override /{group}": None if option == "null" else option} for group, option in self.groups.items()
        ]
        tree: dict[str, Any] = {"defaults": defaults} if defaults else {}
        for key, value in self.keys.items():
            *path, last = key.split(".")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[last] = value
        notes = [f"#   {key}: {_shown(value)}    {why}" for key, value, why in self.left]
        without = ["# No counterpart:", *notes] if notes else []
        return "\n".join(["# @package _global_", *without, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)])


def translate(path: Path, further: Sequence[str] = ()) -> TranslatedYaml:
    """Read a yaml of EasyR1. further: overrides `key=value` of its command line, which win over the file.

    Raises:
        InputError: the file cannot be read or is not such a yaml, or an override is not key=value.
    """
    theirs = _flat(_mapping(path))
    for override in further:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError(f"{override!r} is not key=value")
        theirs[key.lstrip("+")] = _plain(yaml.safe_load(value))
    if not any(key.startswith(("worker.", "trainer.", "data.")) for key in theirs):
        raise InputError(f"{path} has no data, worker or trainer: it is not a training yaml of EasyR1")
    found = TranslatedYaml(groups={"rollout": "vllm", "data": "files"})
    for key, value in theirs.items():
        if value is None or key in _HANDLED:
            continue
        if key in SAME:
            found.keys[SAME[key]] = value
        elif key not in OURS_ALWAYS and not (value in UNSET or (key in NONE and value == _HARMLESS.get(key))):
            is_reference = key.startswith("worker.ref.")
            why = "the frozen copy is kept as the policy is" if is_reference else "there is no such setting"
            found.left.append((key, value, NONE.get(key, why)))
    for handle in (_data, _algorithm, _batches, _devices, _memory, _run, _rewards):
        handle(theirs, found)
    return found


def open_points(found: TranslatedYaml, name: str) -> str:
    """Return what a run with the recipe would refuse, such as settings that contradict each other; "" for nothing.

    Raises:
        ConfigError: a value is outside of what our key allows.
    """
    from rsgrpo import cli
    from rsgrpo.config.checks import validate
    from rsgrpo.config.train import TrainConfig

    with tempfile.TemporaryDirectory() as folder:
        write_recipe(found, Path(folder) / "recipe" / f"{name}.yaml")
        where = f"hydra.searchpath=[file://{folder}]"
        config = cli.compose_or_explain(TrainConfig, "config", [where, f"recipe={name}"])
    try:
        validate(config)
    except ConfigError as error:
        return str(error)
    return ""


def write_recipe(found: TranslatedYaml, out: Path) -> None:
    """Write the recipe file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, found.recipe())


_HARMLESS = {"worker.actor.ulysses_size": 1, "worker.actor.optim.strategy": "adamw", "data.video_key": "video"} | {
    "worker.actor.ulysses_sequence_parallel_size": 1,
    "data.video_fps": 2.0,
}
_HANDLED = {
    "data.train_files", "data.val_files", "data.filter_overlong_prompts", "algorithm.adv_estimator",
    "algorithm.disable_kl", "algorithm.use_kl_loss", "algorithm.kl_penalty", "algorithm.kl_coef",
    "worker.actor.global_batch_size", "worker.actor.model.enable_gradient_checkpointing", "worker.rollout.limit_images",
    "worker.rollout.top_k", "worker.rollout.dtype", "worker.reward.reward_function", "worker.reward.score_function",
    "trainer.nnodes", "trainer.n_gpus_per_node", "trainer.max_try_make_batch", "trainer.val_freq", "trainer.save_freq",
    "trainer.save_limit", "trainer.logger", "trainer.find_last_checkpoint", "worker.actor.ppo_epochs",
}  # fmt: skip


def _data(theirs: Mapping[str, Any], found: TranslatedYaml) -> None:
    for their, our in (("data.train_files", "data.train"), ("data.val_files", "data.val")):
        source = theirs.get(their)
        if isinstance(source, list) and len(source) > 1:
            found.left.append((their, source, "one file, folder or hub id each: join the files"))
        elif source:
            name = source[0] if isinstance(source, list) else str(source)
            found.keys[our] = re.sub(r"@(\w+)$", r":\1", name)  # a split
    if (overlong := theirs.get("data.filter_overlong_prompts")) is not None:
        found.keys["data.overlong"] = "drop" if overlong else "error"
    if limit := theirs.get("worker.rollout.limit_images"):
        found.keys["inputs.max_images"] = limit


def _algorithm(theirs: Mapping[str, Any], found: TranslatedYaml) -> None:
    estimator = theirs.get("algorithm.adv_estimator", "grpo")
    if estimator in ESTIMATORS:
        found.groups["algorithm"] = ESTIMATORS[estimator]
    else:
        names = ", ".join(ESTIMATORS)
        found.left.append(("algorithm.adv_estimator", estimator, f"only {names} have one; set algorithm=..."))
    coefficient, kind = theirs.get("algorithm.kl_coef", 0.0), theirs.get("algorithm.kl_penalty", "low_var_kl")
    in_loss = bool(theirs.get("algorithm.use_kl_loss"))
    if theirs.get("algorithm.disable_kl") or not coefficient:
        found.keys["algorithm.kl_coef"] = 0.0
    elif not in_loss:
        found.left.append(
            ("algorithm.use_kl_loss", False, "KL is a term of the loss (algorithm.kl_coef), not a reward")
        )
    elif kind not in KL_KINDS:
        found.left.append(("algorithm.kl_penalty", kind, f"estimators are {', '.join(KL_KINDS.values())}"))
    else:
        found.keys |= {"algorithm.kl_coef": coefficient, "algorithm.kl_estimator": KL_KINDS[kind]}


def _batches(theirs: Mapping[str, Any], found: TranslatedYaml) -> None:
    """Optimizer steps per batch of rollouts; both of their sizes count prompts."""
    prompts, per_update = theirs.get("data.rollout_batch_size"), theirs.get("worker.actor.global_batch_size")
    if (epochs := theirs.get("worker.actor.ppo_epochs", 1)) not in (None, 1):
        found.left.append(("worker.actor.ppo_epochs", epochs, "every rollout is learned from once"))
    if not prompts or not per_update:
        return
    if prompts % per_update:
        why = f"algorithm.updates_per_step must divide algorithm.prompts_per_step={prompts}"
        found.left.append(("worker.actor.global_batch_size", per_update, why))
    else:
        found.keys["algorithm.updates_per_step"] = prompts // per_update


def _devices(theirs: Mapping[str, Any], found: TranslatedYaml) -> None:
    """A learner rank for each GPU, and engines of tensor_parallel_size GPUs that share them."""
    gpus = (theirs.get("trainer.nnodes") or 1) * (theirs.get("trainer.n_gpus_per_node") or 1)
    found.keys["learner.num_ranks"] = gpus
    found.keys["rollout.num_workers"] = max(1, gpus // (theirs.get("worker.rollout.tensor_parallel_size") or 1))


def _memory(theirs: Mapping[str, Any], found: TranslatedYaml) -> None:
    if (checkpointed := theirs.get("worker.actor.model.enable_gradient_checkpointing")) is not None:
        found.keys["learner.gradient_checkpointing"] = "full" if checkpointed else "none"
    dtype = {"bf16": "bfloat16", "fp32": "float32"}.get(str(theirs.get("worker.rollout.dtype", "bf16")))
    found.keys["rollout.dtype"] = dtype or "bfloat16"
    if (top_k := theirs.get("worker.rollout.top_k")) is not None:
        found.keys["rollout.top_k"] = max(0, top_k)  # theirs is -1 for none
    prompt, response = theirs.get("data.max_prompt_length"), theirs.get("data.max_response_length")
    if prompt and response:  # a group in one row
        found.keys["learner.max_tokens_per_micro_batch"] = prompt + response * (theirs.get("worker.rollout.n") or 8)


def _run(theirs: Mapping[str, Any], found: TranslatedYaml) -> None:
    for key, our, never in (
        ("trainer.val_freq", "validation.every", 0),
        ("trainer.save_freq", "checkpoint.every", None),
        ("trainer.save_limit", "checkpoint.keep_last", None),
        ("trainer.max_try_make_batch", "algorithm.filter.max_tries", None),
    ):
        value = theirs.get(key)
        if value is not None and value > 0:
            found.keys[our] = value
        elif value is not None and never is not None:
            found.keys |= {our: never, "checkpoint.keep_best": 0}  # no score to choose a best one by
        elif value is not None:
            found.left.append((key, value, f"{our} must be a number above 0"))
    loggers = theirs.get("trainer.logger") or []
    known = [LOGGERS[name] for name in loggers if name in LOGGERS]
    if known:
        found.groups["tracking"] = known[0]
    left = [name for name in loggers if name not in (*LOGGERS, "console", "file")] + known[1:]
    if left:
        found.left.append(("trainer.logger", left, "one of tracking=wandb and tracking=tensorboard, and files always"))
    if theirs.get("trainer.find_last_checkpoint") is not None:
        found.keys["checkpoint.resume"] = "auto" if theirs["trainer.find_last_checkpoint"] else "never"


def _rewards(theirs: Mapping[str, Any], found: TranslatedYaml) -> None:
    """EVisRAG's own function is the group rewards=evisrag; any other goes through the adapter."""
    key = next(
        (key for key in ("worker.reward.reward_function", "worker.reward.score_function") if theirs.get(key)), ""
    )
    file, _, function = str(theirs.get(key, "")).rpartition(":")
    if not key:
        return
    if Path(file).name == EVISRAG_REWARDS:
        found.groups["rewards"] = "evisrag"
        return
    target = f"{Path(file).stem}:{function}"
    found.groups["rewards"] = "null"  # not the default ones
    found.keys |= {
        "rewards.score": "rewards.adapters:easyr1",
        "reward_args.score.function": target,
        "checkpoint.metric": "val/sampled/score",
    }
    note = f"becomes rewards.adapters:easyr1 with {target}; start where {Path(file).name} lies"
    found.left.append((key, theirs[key], note))


def _mapping(path: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as yaml: {error}") from error
    if not isinstance(found, Mapping):
        raise InputError(f"{path} must be a mapping of settings, got {type(found).__name__}")
    return found


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value."""
    found: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """Return a number that yaml 1.1 takes for text ("1e-6") as one."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def _shown(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("\n...").strip()
