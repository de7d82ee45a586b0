"""Estimate what a run needs before anything is rented: `python -m rsgrpo.plan recipe=evisrag_7b [plan.gpu=a100] ...`.

It takes every key that training takes, plus `plan.*` (the assumptions) and the size of the cluster. Arithmetic only: no
model, data or GPU is touched. Seconds are estimates from assumed rates; bytes and FLOPs follow from the sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rsgrpo import cli
from rsgrpo.config.checks import validate
from rsgrpo.plan.config import PlanConfig, device_of
from rsgrpo.plan.memory import GIB, devices_memory, engine_memory, trainable_params
from rsgrpo.plan.model_sizes import ModelSizes, sizes_of

USABLE = 0.94  # of a device's memory; the rest is lost to fragmentation


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of one step. flops: of all devices together; 0 where the time is not spent on arithmetic."""

    name: str
    flops: float
    seconds: float


def main(config: PlanConfig) -> None:
    """Print the plan."""
    validate(config)
    sizes, source = sizes_of(config.model.path)
    print(render(config, sizes, source))


def num_devices(config: PlanConfig) -> int:
    """Count the devices that the workers occupy."""
    engines = 0 if config.rollout.engine == "fake" else config.rollout.num_workers * devices_per_engine(config)
    ranks = config.learner.num_ranks
    return ranks + engines if config.cluster.placement == "disaggregated" else max(ranks, engines)


def devices_per_engine(config: PlanConfig) -> int:
    """Count the devices of one engine."""
    return config.rollout.vllm.tensor_parallel_size if config.rollout.engine == "vllm" else 1


def cache_bytes(config: PlanConfig, sizes: ModelSizes) -> float:
    """Return the KV cache of one engine, over all its devices."""
    engine = engine_memory(config, sizes)
    return (engine.static | engine.sampling)["engine KV cache"] * GIB * devices_per_engine(config)


def mean_lengths(config: PlanConfig) -> tuple[float, float]:
    """Return the assumed mean prompt and response lengths in tokens."""
    assumed = config.plan
    return (
        assumed.prompt_fill * config.inputs.max_prompt_tokens,
        assumed.response_fill * config.rollout.max_response_tokens,
    )


def phases(config: PlanConfig, sizes: ModelSizes) -> list[Phase]:
    """Return the phases of one step, without the filter's refills, validation and checkpoints."""
    device, rollout, learner, algorithm = device_of(config), config.rollout, config.learner, config.algorithm
    prompts, group = algorithm.prompts_per_step, rollout.group_size
    prompt_tokens, response_tokens = mean_lengths(config)
    vision = prompts * config.inputs.max_images * sizes.image_flops(config.plan.prompt_fill * config.inputs.max_pixels)
    forward = prompts * sizes.group_flops(prompt_tokens, response_tokens, group)
    rate = device.flops * config.plan.mfu
    learner_rate = learner.num_ranks * rate
    found = [*sampling_phases(config, sizes, vision)]
    if algorithm.updates_per_step > 1 or not algorithm.on_policy_shortcut:
        found.append(Phase("old log-probabilities", forward, forward / learner_rate))
    if algorithm.kl_coef > 0:
        found.append(Phase("reference", forward, forward / learner_rate))
    passes = (2 if config.model.lora.rank else 3) + learner.recomputed_share
    tower = vision * (1 if config.model.freeze_vision else 3 + (learner.recomputed_share > 0))
    work = passes * forward + tower
    found.append(Phase("learn", work, work / learner_rate))
    sent = 2 * (sizes.language_params + (0 if config.model.freeze_vision else sizes.vision_params))
    found.append(Phase("weight sync", 0.0, sent / (config.plan.sync_gb_per_s * 1e9)))
    return found


def sampling_phases(config: PlanConfig, sizes: ModelSizes, vision_flops: float) -> list[Phase]:
    """Return prefill (bound by arithmetic) and decode (bound by memory: all weights and the cache once per token)."""
    rollout, device = config.rollout, device_of(config)
    if rollout.engine == "fake":
        return []
    degree = devices_per_engine(config)
    prompts, group = config.algorithm.prompts_per_step, rollout.group_size
    prompt_tokens, response_tokens = mean_lengths(config)
    times_prefilled = 1 if rollout.engine == "vllm" and rollout.vllm.prefix_caching else group
    prefill = times_prefilled * prompts * sizes.group_flops(prompt_tokens, 0, 1) + vision_flops
    sequences = math.ceil(prompts * group / rollout.num_workers)
    at_once = min(sequences, concurrency(config, sizes))
    bytes_per_step = (
        2 * sizes.language_params + at_once * (prompt_tokens + response_tokens / 2) * sizes.kv_bytes_per_token
    ) / degree
    steps = math.ceil(sequences / at_once) * response_tokens
    decode = 2 * prompts * group * response_tokens * (sizes.body_params + sizes.vocab_size * sizes.hidden_size)
    return [
        Phase("sample: prefill", prefill, prefill / (rollout.num_workers * degree * device.flops * config.plan.mfu)),
        Phase("sample: decode", decode, steps * bytes_per_step / (device.bandwidth * config.plan.decode_bandwidth)),
    ]


def concurrency(config: PlanConfig, sizes: ModelSizes) -> int:
    """Return how many sequences one engine decodes at once; in vLLM the siblings of a group share their prompt."""
    rollout = config.rollout
    if rollout.engine != "vllm":
        return rollout.max_batch_sequences
    prompt_tokens, response_tokens = mean_lengths(config)
    per_sequence = (prompt_tokens / rollout.group_size + response_tokens) * sizes.kv_bytes_per_token
    return max(1, min(rollout.vllm.max_num_seqs, int(cache_bytes(config, sizes) / per_sequence)))


def warnings(config: PlanConfig, sizes: ModelSizes) -> list[str]:
    """Return what will not fit or will be idle, each with what to change."""
    found = []
    limit = device_of(config).memory_gib
    for kind, memory in devices_memory(config, sizes).items():
        if memory.peak > USABLE * limit:
            found.append(
                f"{kind}: {memory.peak:.1f} GiB needed > {USABLE:g} x {limit:g} GiB = {USABLE * limit:.1f}. Try more "
                "learner.num_ranks, a smaller learner.max_tokens_per_micro_batch or "
                "rollout.vllm.gpu_memory_utilization, rollout.vllm.sleep_level=1, learner.offload=true, or adapters "
                "(model.lora.rank=64)"
            )
    if config.rollout.engine == "vllm":
        cached = cache_bytes(config, sizes)
        longest = (config.inputs.max_prompt_tokens + config.rollout.max_response_tokens) * sizes.kv_bytes_per_token
        if cached < longest:
            found.append(
                f"engine: its KV cache of {cached / GIB:.2f} GiB does not hold one response of full length "
                f"({longest / GIB:.2f} GiB). Raise rollout.vllm.gpu_memory_utilization or tensor_parallel_size"
            )
    if config.learner.device != "cpu" and config.cluster.gpus_per_node:
        have, used = config.cluster.nodes * config.cluster.gpus_per_node, num_devices(config)
        cluster = f"{config.cluster.nodes} x {config.cluster.gpus_per_node} = {have} GPUs"
        if used > have:
            found.append(
                f"the workers take {used} GPUs, the cluster has {cluster}: the run would never start. Add nodes, or "
                "lower learner.num_ranks or rollout.num_workers"
            )
        elif used < have:
            found.append(f"the workers take {used} of {cluster}: {have - used} stay idle")
    return found


def render(config: PlanConfig, sizes: ModelSizes, source: str) -> str:
    """Return the plan as text."""
    device, rollout, learner = device_of(config), config.rollout, config.learner
    name = "cpu" if learner.device == "cpu" else config.plan.gpu
    trained = trainable_params(config, sizes)
    prompt_tokens, response_tokens = mean_lengths(config)
    lines = [
        f"Plan of {config.name}: {learner.num_ranks} learner ranks and {rollout.num_workers} {rollout.engine} engines, "
        f"{config.cluster.placement}, on {num_devices(config)} x {name} ({device.memory_gib:g} GiB)",
        f"Model: {source}: {sizes.language_params / 1e9:.3g} B decoder + {sizes.vision_params / 1e9:.3g} B vision "
        f"parameters, {trained / 1e9:.3g} B of them trained",
    ]
    for kind, memory in devices_memory(config, sizes).items():
        lines += ["", f"Memory of one device, {kind}:"]
        for phase, parts in (("always", memory.static), ("learning", memory.learning), ("sampling", memory.sampling)):
            lines += [f"  {phase:<9} {part:<22} {gib:8.2f} GiB" for part, gib in parts.items() if gib]
        lines.append(f"  {'peak':<9} {'':<22} {memory.peak:8.2f} GiB of {device.memory_gib:g}")
    lines += [
        "",
        f"One step: {config.algorithm.prompts_per_step} prompts x {rollout.group_size} rollouts of "
        f"{prompt_tokens:,.0f} + {response_tokens:,.0f} tokens:",
    ]
    found = phases(config, sizes)
    lines += [f"  {phase.name:<32} {phase.flops / 1e15:10.3g} PFLOP {phase.seconds:10.1f} s" for phase in found]
    seconds = sum(phase.seconds for phase in found)
    lines.append(f"  {'step':<32} {sum(phase.flops for phase in found) / 1e15:10.3g} PFLOP {seconds:10.1f} s")
    if config.total_steps:
        lines.append(f"  {config.total_steps} steps: {config.total_steps * seconds / 3600:.2f} hours")
    assumed = config.plan
    lines += [
        "",
        f"Assumed: {assumed.mfu:.0%} of {device.flops / 1e12:g} TFLOP/s in prefill and training, "
        f"{assumed.decode_bandwidth:.0%} of {device.bandwidth / 1e9:,.0f} GB/s in decode,",
        f"  prompts {assumed.prompt_fill:.0%} and responses {assumed.response_fill:.0%} of their limits, "
        f"{config.inputs.max_images} images per prompt, weights sent at {assumed.sync_gb_per_s:g} GB/s.",
        "  Left out: refills of the group filter, validation, checkpoints, traffic between tensor-parallel devices.",
        "  Change any of it with plan.KEY=VALUE. Counted, not assumed: parameters, FLOPs, state, activations, cache.",
    ]
    lines += [f"WARNING: {warning}" for warning in warnings(config, sizes)]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, PlanConfig, "config")
