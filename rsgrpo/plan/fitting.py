"""Whether a run fits its devices, and the least that has to change where it does not."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from rsgrpo.config.checks import validate
from rsgrpo.errors import ConfigError
from rsgrpo.plan.config import PlanConfig, device_of
from rsgrpo.plan.memory import GIB, devices_memory, host_memory
from rsgrpo.plan.model_sizes import ModelSizes
from rsgrpo.plan.times import cache_bytes, num_devices

USABLE = 0.94  # of a device's memory; the rest is lost to fragmentation

Overrides = dict[str, Any]

_COSTS = {
    "rollout.vllm.sleep_level": 1.0,
    "rollout.vllm.gpu_memory_utilization": 1.0,
    "learner.gradient_checkpointing": 1.0,
    "learner.max_tokens_per_micro_batch": 1.5,
    "learner.logits_chunk_tokens": 0.5,
    "learner.context_parallel": 1.4,  # each rank waits for the keys of others; shorter rows compute a prompt again
    "learner.offload": 4.0,  # slower
    "model.lora.rank": 8.0,  # learns something else
    "inputs.max_images": 12.0,  # sees less
}
"""How much a change is disliked; the number of workers costs nothing beside it."""


def shortages(config: PlanConfig, sizes: ModelSizes) -> list[str]:
    """Return what does not fit, with its arithmetic."""
    found = []
    limit = device_of(config).memory_gib
    for kind, memory in devices_memory(config, sizes).items():
        if memory.peak > USABLE * limit:
            room = f"{USABLE:g} x {limit:g} GiB = {USABLE * limit:.1f}"
            found.append(f"{kind}: {memory.peak:.1f} GiB needed > {room}{hints(config)}")
    host, limit = sum(host_memory(config, sizes).values()), config.plan.host_memory_gib
    if limit and host > limit:
        found.append(f"one node: {host:.0f} GiB of CPU memory needed > {limit:g}")
    if config.rollout.engine == "vllm":
        cached = cache_bytes(config, sizes)
        longest = longest_row(config) * sizes.kv_bytes_per_token
        if cached < longest:
            found.append(
                f"engine: its KV cache of {cached / GIB:.2f} GiB does not hold one response of full length "
                f"({longest / GIB:.2f} GiB). Raise rollout.vllm.gpu_memory_utilization or tensor_parallel_size"
            )
    if config.learner.context_parallel > 1 and sizes.recurrent:
        found.append(
            f"learner.context_parallel={config.learner.context_parallel}: {sizes.recurrent.num_layers} layers of this "
            "model carry a recurrent state, which cannot be spread over ranks. Set it to 1"
        )
    have, used = num_gpus(config), num_devices(config)
    if have and used > have:
        found.append(
            f"the workers take {used} GPUs, the cluster has {_shape(config)}: the run would never start. Add nodes, or "
            "lower learner.num_ranks or rollout.num_workers"
        )
    return found


def longest_row(config: PlanConfig) -> int:
    """Return the tokens of the longest prompt with the longest response and what it may read."""
    rollout = config.rollout
    return config.inputs.max_prompt_tokens + rollout.max_response_tokens + rollout.max_observation_tokens


def hints(config: PlanConfig) -> str:
    """Return what may help a device whose memory is short and is not set already."""
    vllm = config.rollout.engine == "vllm" and config.cluster.placement == "colocated"
    helps = {
        "more learner.num_ranks": True,
        "a smaller learner.max_tokens_per_micro_batch": True,
        "learner.gradient_checkpointing=full": config.learner.gradient_checkpointing != "full",
        "a smaller rollout.vllm.gpu_memory_utilization": vllm,
        "rollout.vllm.sleep_level=1": vllm and not config.rollout.vllm.sleep_level,
        "learner.context_parallel=2": config.learner.context_parallel == 1 < config.learner.num_ranks,
        "learner.offload=true": not config.learner.offload and config.learner.device != "cpu",
        "adapters (model.lora.rank=64)": not config.model.lora.rank and config.model.freeze_vision,
    }
    return ". Try " + ", ".join(help for help, is_open in helps.items() if is_open)


def idle(config: PlanConfig) -> list[str]:
    """Return what the cluster has and the run does not use."""
    have, used = num_gpus(config), num_devices(config)
    return [f"the workers take {used} of {_shape(config)}: {have - used} stay idle"] if used < have else []


def num_gpus(config: PlanConfig) -> int:
    """Return the GPUs of the cluster; 0 if it is as large as the workers need."""
    return 0 if config.learner.device == "cpu" else config.cluster.nodes * config.cluster.gpus_per_node


def _shape(config: PlanConfig) -> str:
    return f"{config.cluster.nodes} x {config.cluster.gpus_per_node} = {num_gpus(config)} GPUs"


def fitting_overrides(config: PlanConfig, sizes: ModelSizes) -> Overrides | None:
    """Return the least disliked overrides with which the run fits; None if none of those tried does.

    Each candidate is planned, and checked as a run is checked.
    """
    by_cost = sorted(_candidates(config), key=lambda changes: sum(_COSTS.get(key, 0.1) for key in changes))
    logging.disable(logging.WARNING)  # what is said of the run itself has been said
    try:
        for changes in by_cost:
            changed = _valid(config, changes)
            if changed is not None and not shortages(changed, sizes):
                return changes
    finally:
        logging.disable(logging.NOTSET)
    return None


def _valid(config: PlanConfig, changes: Overrides) -> PlanConfig | None:
    """Return the changed configuration, or None where a run would refuse it."""
    try:
        changed = with_overrides(config, changes)
        validate(changed)
    except ConfigError:
        return None
    return changed


def _candidates(config: PlanConfig) -> Iterator[Overrides]:
    learner, inputs, vllm = config.learner, config.inputs, config.rollout.engine == "vllm"
    on_gpu, colocated = learner.device != "cpu", config.cluster.placement == "colocated"
    shortest = longest_row(config)
    choices: list[list[Overrides]] = [
        [{}, *_layouts(config)],
        [{}, *({"rollout.vllm.gpu_memory_utilization": share / 100} for share in range(85, 20, -5) if vllm)],
        [{}, *([{"rollout.vllm.sleep_level": 1}] if vllm and colocated else [])],
        [
            {},
            *(
                [{"learner.max_tokens_per_micro_batch": shortest}]
                if shortest < learner.max_tokens_per_micro_batch
                else []
            ),
        ],
        [{}, {"learner.gradient_checkpointing": "full"}],
        [{}, *([{"learner.offload": True}] if on_gpu else [])],
        [{}, *([{"model.lora.rank": 64}] if config.model.freeze_vision else [])],
        [
            {},
            *({"learner.context_parallel": size} for size in (2, 4, 8) if size > learner.context_parallel and on_gpu),
            *({"inputs.max_images": count} | _shorter(config, count) for count in range(1, inputs.max_images)),
        ],
    ]
    for combination in itertools.product(*choices):
        merged = {key: value for changes in combination for key, value in changes.items()}
        yield {key: value for key, value in merged.items() if _value(config, key) != value}


def _shorter(config: PlanConfig, num_images: int) -> Overrides:
    """Return the limits of tokens of prompts with fewer images; the text keeps its room."""
    inputs, learner = config.inputs, config.learner
    prompt = inputs.max_prompt_tokens * num_images // inputs.max_images
    group = learner.max_tokens_per_micro_batch - inputs.max_prompt_tokens + prompt
    return {"inputs.max_prompt_tokens": prompt, "learner.max_tokens_per_micro_batch": group}


def _layouts(config: PlanConfig) -> Iterator[Overrides]:
    """Yield ways to lay workers over the GPUs of the cluster, all of them used."""
    have, vllm = num_gpus(config), config.rollout.engine == "vllm"
    for degree in (1, 2, 4, 8) if vllm else (1,):
        if not have or degree > config.cluster.gpus_per_node or have % degree:
            continue
        learners = [have] if config.cluster.placement == "colocated" else [have // 2, have - degree]
        for num_ranks in learners:
            engines = num_ranks if config.cluster.placement == "colocated" else have - num_ranks
            if num_ranks > 0 and engines >= degree:
                layout: Overrides = {"learner.num_ranks": num_ranks, "rollout.num_workers": engines // degree}
                yield layout | ({"rollout.vllm.tensor_parallel_size": degree} if vllm else {})


def with_overrides(config: PlanConfig, overrides: Mapping[str, Any]) -> PlanConfig:
    """Return the configuration with some keys changed."""
    changed: Any = config
    for key, value in overrides.items():
        changed = _replace(changed, key.split("."), value)
    return changed  # type: ignore[no-any-return]


def _replace(part: Any, names: list[str], value: Any) -> Any:
    new = value if len(names) == 1 else _replace(getattr(part, names[0]), names[1:], value)
    return dataclasses.replace(part, **{names[0]: new})


def _value(config: PlanConfig, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found
