"""Refuse combinations of settings that cannot work, and missing files, before anything starts.

Every message names the key, the value and the fix, and shows its arithmetic. The classes that declare keys check the
bounds of single keys. Only `require_inputs` and `require_found` access the disk.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping

from rollout.errors import ConfigError
from rollout.keys import nearest, require
from rsgrpo.config.placement import place
from rsgrpo.config.train import RunConfig, SftConfig, TrainConfig

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%]+)?")


def validate(config: TrainConfig) -> None:
    """Refuse a training run that cannot work.

    Raises:
        ConfigError: two or more keys contradict each other.
    """
    lengths = {"rollout.max_response_tokens": config.rollout.max_response_tokens}
    if config.rollout.max_observation_tokens:
        lengths["rollout.turns.max_observation_tokens"] = config.rollout.max_observation_tokens
    _check_run(config, lengths)
    _check_reward_names(config)
    _check_sampling(config)
    _check_sleep(config)
    _check_in_flight(config)
    _check_cpus(config)
    _check_inline(config)
    _check_checkpoint_metric(config)
    prompts, updates = config.algorithm.prompts_per_step, config.algorithm.updates_per_step
    require(
        prompts % updates == 0,
        f"algorithm.prompts_per_step={prompts} cannot be split into algorithm.updates_per_step={updates} equal parts: "
        f"{prompts} = {updates} x {prompts // updates} + {prompts % updates}",
    )
    require(
        bool(config.model.teacher) == (config.algorithm.distill_coef > 0),
        f"model.teacher={config.model.teacher!r} and algorithm.distill_coef={config.algorithm.distill_coef:g} need "
        "each other: the frozen model, and the weight of its term. Set both or neither.",
    )
    if config.algorithm.kl_coef > 0 and config.algorithm.kl_estimator == "k1":
        log.warning(
            "algorithm.kl_estimator=k1 as a loss has zero expected gradient: it is reported but does not restrain the "
            "policy. Set it to k3 or k2."
        )


def validate_sft(config: SftConfig) -> None:
    """Refuse a supervised run that cannot work; raises as `validate`."""
    _check_run(config, {"max_response_tokens": config.max_response_tokens})
    _check_inline(config)
    _check_kept_weights(config)


def how_to_get(key: str, path: str, made_by: Mapping[str, str] | None = None) -> str:
    """Return the message for a model or data path that does not exist, with the command that makes it if one does."""
    command = next((command for start, command in (made_by or {}).items() if path.startswith(start)), None)
    if command is not None:
        fix = f"Run `{command}` once to make it."
    elif key.startswith("model"):
        fix = f"Set {key} to a folder or hub id; `python -m recipes.sft` exports a model to <run folder>/export."
    else:
        fix = f"Set {key} to a .jsonl, .json or .parquet file, a folder or a hub data set."
    return f"{key}={path}: there is no such file or folder. {fix}"


def require_found(key: str, path: str, made_by: Mapping[str, str] | None = None) -> None:
    """Refuse a model or data path that is neither on disk nor shaped like a hub id ("org/name", "org/name:split").

    A path into a folder that is here is local: the hub is not asked for a file that is missing in it.

    made_by: start of a local path -> command that makes it (`made_by` of a run's configuration).
    """
    is_local = path.startswith(tuple(made_by or ())) or os.path.isdir(path.partition("/")[0])
    is_hub_id = HUB_ID.fullmatch(path) is not None and not is_local
    require(os.path.exists(path) or is_hub_id, how_to_get(key, path, made_by))


def require_model(key: str, path: str, made_by: Mapping[str, str] | None = None) -> None:
    """Refuse a model path as `require_found` does, and a folder without a model, such as that of a run."""
    require_found(key, path, made_by)
    if not os.path.isdir(path) or os.path.exists(os.path.join(path, "config.json")):
        return
    export = os.path.join(path, "export")
    if os.path.exists(os.path.join(export, "config.json")):
        raise ConfigError(f"{key}={path} is the folder of a run. Did you mean {export}, where its model is?")
    if os.path.exists(os.path.join(path, "config.yaml")):
        why = "It has no export: the run has not ended, or checkpoint.export is false."
        raise ConfigError(f"{key}={path} is the folder of a run, not of a model. {why}")
    raise ConfigError(f"{key}={path} is a folder without a model: it has no config.json.")


def require_inputs(config: RunConfig) -> None:
    """Refuse a model or rows that do not exist, before anything heavy is loaded."""
    require_model("model.path", config.model.path, config.made_by)
    if config.model.teacher:
        require_model("model.teacher", config.model.teacher, config.made_by)
    require_found("data.train", config.data.train, config.made_by)
    if config.data.val:
        require_found("data.val", config.data.val, config.made_by)


def _check_run(config: RunConfig, response: Mapping[str, int]) -> None:
    """Check what training and warm start have in common.

    response: the longest that a response may be, by the keys that limit its parts.
    """
    model, data, learner, validation = config.model, config.data, config.learner, config.validation
    require(model.path != "", "model.path is empty. Choose a model, for example model=qwen2_5_vl_3b.")
    require(data.train != "", "data.train is empty. Name the training rows, for example data.train=my/train.jsonl.")
    require(
        data.val != "" or not (validation.every or validation.at_start),
        f"data.val is empty, but validation.every={validation.every} and validation.at_start={validation.at_start}. "
        "Set data.val to held-out rows, or set validation.every=0 validation.at_start=false.",
    )
    if data.train == data.val:
        log.warning("data.train and data.val are the same rows (%s): validation measures memorization", data.train)
    budget, lengths = learner.max_tokens_per_micro_batch, {"inputs.max_prompt_tokens": config.inputs.max_prompt_tokens}
    lengths |= response
    needed = sum(lengths.values())
    require(
        budget >= needed,
        f"learner.max_tokens_per_micro_batch {budget} < {' + '.join(map(str, lengths.values()))} = {needed} "
        f"({' + '.join(lengths)}): the longest prompt with one response would not fit. Set it to {needed} or more.",
    )
    require(
        not (learner.offload and learner.device == "cpu"),
        "learner.offload=true moves parameters off a GPU, but learner.device=cpu. Set learner.offload=false.",
    )
    require(
        not (learner.attention == "flash" and learner.device == "cpu"),
        "learner.attention=flash needs a GPU, but learner.device=cpu. Set learner.attention=sdpa.",
    )
    require(
        config.cluster.kind == "ray" or learner.num_ranks == 1,
        f"cluster.kind=inline has a single process, but learner.num_ranks={learner.num_ranks}. Set it to 1, or set "
        "cluster.kind=ray.",
    )
    require(
        not model.lora.rank or model.freeze_vision,
        f"model.lora.rank={model.lora.rank} puts adapters on the language model and trains nothing else, but "
        "model.freeze_vision=false trains the vision tower. Set it to true, or set model.lora.rank=0.",
    )


def _check_reward_names(config: TrainConfig) -> None:
    names = list(config.rewards)
    require(bool(names), "rewards is empty: there is nothing to learn from. Choose some, for example rewards=evisrag.")
    for name in names:
        require(name not in config.monitors, f"monitors.{name}: a reward has this name. Rename the monitor.")
    scored = [*names, *config.monitors]
    for key, weights, known in (
        ("reward_weights", config.reward_weights, names),
        ("algorithm.filter.weights", config.algorithm.filter.weights if config.algorithm.filter.enabled else {}, names),
        ("reward_timeouts_s", config.reward_timeouts_s, scored),
    ):
        for name in weights:
            require(
                name in known,
                f"{key}.{name}: there is no reward {name!r}{nearest(name, known)} The run has {', '.join(known)}.",
            )
    for name in config.reward_args:
        close = nearest(name, scored, cutoff=0.8)
        require(name in scored or not close, f"reward_args.{name}: there is no reward {name!r}{close}")
        if name not in scored:
            log.warning("reward_args.%s is not used: this run has no reward of that name", name)


def _check_sampling(config: TrainConfig) -> None:
    rollout = config.rollout
    require(
        rollout.group_size >= 2,
        f"rollout.group_size must be >= 2 to normalise within a group, got {rollout.group_size}",
    )
    require(
        rollout.temperature > 0,
        f"rollout.temperature must be > 0 in training, got {rollout.temperature:g}: greedy rollouts of a group are "
        "identical, so no reward varies",
    )
    biased = (rollout.top_p < 1 and f"rollout.top_p={rollout.top_p:g}") or (
        rollout.top_k > 0 and f"rollout.top_k={rollout.top_k}"
    )
    require(
        not biased or rollout.allow_biased_sampling,
        f"{biased} cuts the sampling distribution, and importance ratios do not correct it. Set rollout.top_p=1 "
        "rollout.top_k=0, or force it with rollout.allow_biased_sampling=true.",
    )


def _check_cpus(config: TrainConfig) -> None:
    cluster = config.cluster
    if cluster.kind == "ray" and cluster.num_cpus and not cluster.address:
        placement = place(config, has_gpus=False)
        require(
            placement.total_cpus <= cluster.num_cpus + 1e-6,
            f"{placement.describe()}, but cluster.num_cpus={cluster.num_cpus}. Raise it, or lower cluster.cpus.",
        )


def _check_inline(config: TrainConfig | SftConfig) -> None:
    rollout = config.rollout
    if config.cluster.kind != "inline":
        return
    require(
        rollout.num_workers == 1,
        f"cluster.kind=inline has one engine, but rollout.num_workers={rollout.num_workers}. Set it to 1, or set "
        "cluster.kind=ray.",
    )
    require(
        rollout.engine != "vllm",
        "cluster.kind=inline samples in this process, but rollout.engine=vllm needs processes of its own. Set "
        "rollout.engine=hf, or set cluster.kind=ray.",
    )


def _check_in_flight(config: TrainConfig) -> None:
    if not config.changes_weights_in_flight:
        return
    for holds, why in (
        (config.algorithm.max_staleness > 0, "algorithm.max_staleness=0 samples nothing while weights change"),
        (config.model.freeze_vision, "model.freeze_vision=false makes the features of images in use stale"),
        (not config.model.lora.rank, "model.lora.rank > 0 takes the adapter away that running requests use"),
        (not config.rollout.turns.environment, "rollout.turns.environment samples turn by turn"),
        (not config.rollout.routing_replay, "rollout.routing_replay=true records the experts of one version"),
    ):
        require(holds, f"rollout.vllm.in_flight=true cannot be used here: {why}. Set rollout.vllm.in_flight=false.")


def _check_sleep(config: TrainConfig) -> None:
    level, colocated = config.rollout.vllm.sleep_level, config.cluster.placement == "colocated"
    if config.rollout.engine != "vllm" or not level:
        return
    require(
        config.algorithm.max_staleness == 0 or not colocated,
        f"algorithm.max_staleness={config.algorithm.max_staleness} samples while the learner works, but "
        f"rollout.vllm.sleep_level={level} puts "
        "colocated engines to sleep then. Set rollout.vllm.sleep_level=0, or cluster.placement=disaggregated.",
    )
    _check_kept_weights(config)


def _check_kept_weights(config: TrainConfig | SftConfig) -> None:
    """Refuse a sleep in which an engine discards weights that no sync brings back."""
    level = config.rollout.vllm.sleep_level
    if config.rollout.engine != "vllm":
        return
    require(
        level < 2 or not config.model.lora.rank,
        "rollout.vllm.sleep_level=2 discards the weights, but a LoRA run sends adapters only. Set sleep_level=1.",
    )


def _check_checkpoint_metric(config: TrainConfig) -> None:
    if not config.checkpoint.keep_best:
        return
    metric, validation = config.checkpoint.metric, config.validation
    modes = [mode for mode, on in (("greedy", validation.greedy), ("sampled", validation.samples > 0)) if on]
    off = "or set checkpoint.keep_best=0"
    require(
        validation.every > 0 and bool(modes),
        f"checkpoint.keep_best={config.checkpoint.keep_best} ranks checkpoints by {metric}, but nothing is validated "
        f"(validation.every={validation.every}, greedy={validation.greedy}, samples={validation.samples}). "
        f"Switch validation on, {off}.",
    )
    known = [f"val/{mode}/{name}" for mode in modes for name in (*config.rewards, *config.monitors)]
    require(
        metric in known,
        f"checkpoint.metric={metric} is not measured by this run{nearest(metric, known)} Set it to one of "
        f"{', '.join(known)}, {off}.",
    )
