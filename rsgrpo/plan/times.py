"""Seconds of a step, phase by phase, from a model's sizes and assumed rates. Arithmetic only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rsgrpo.plan.config import PlanConfig, device_of
from rsgrpo.plan.memory import GIB, engine_memory, reference_sizes, trainable_params, value_bytes
from rsgrpo.plan.model_sizes import ModelSizes


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of one step. flops: of all devices together; 0 where the time is not spent on arithmetic."""

    name: str
    flops: float
    seconds: float


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


def mean_observation_tokens(config: PlanConfig) -> float:
    """Return the assumed mean of the tokens that an environment adds to a response."""
    return config.plan.observation_fill * config.rollout.max_observation_tokens


def phases(config: PlanConfig, sizes: ModelSizes) -> list[Phase]:
    """Return the phases of one step, a checkpoint's share of it included; without validation."""
    device, rollout, learner, algorithm = device_of(config), config.rollout, config.learner, config.algorithm
    prompts, group = algorithm.prompts_per_step, rollout.group_size
    prompt_tokens, response_tokens = mean_lengths(config)
    read = group * config.plan.observation_fill * rollout.max_observation_images
    image_flops = sizes.image_flops(config.plan.prompt_fill * config.inputs.max_pixels)
    vision = prompts * (config.inputs.most_images + read) * image_flops
    forward = prompts * sizes.group_flops(prompt_tokens, response_tokens, group, mean_observation_tokens(config))
    rate = device.flops * config.plan.mfu
    learner_rate = learner.num_ranks * rate
    found = [*sampling_phases(config, sizes, vision)]
    if algorithm.updates_per_step > 1 or not algorithm.on_policy_shortcut:
        found.append(Phase("old log-probabilities", forward, forward / learner_rate))
    if algorithm.needs_reference:
        frozen = prompts * reference_sizes(config, sizes).group_flops(prompt_tokens, response_tokens, group)
        found.append(Phase("reference", frozen, frozen / learner_rate))
    passes = (2 if config.model.lora.rank else 3) + learner.recomputed_share
    tower = vision * (1 if config.model.freeze_vision else 3 + (learner.recomputed_share > 0))
    work = passes * forward + tower
    found.append(Phase("learn", work, work / learner_rate))
    if learner.context_parallel > 1:
        found.append(Phase("learn: keys of other ranks", 0.0, exchange_seconds(config, sizes)))
    sent = 2 * (sizes.language_params + (0 if config.model.freeze_vision else sizes.vision_params))
    found.append(Phase("weight sync", 0.0, sent / (config.plan.sync_gb_per_s * 1e9)))
    written = checkpoint_bytes(config, sizes) / config.checkpoint.every
    found.append(Phase("checkpoint (its share)", 0.0, written / (config.plan.disk_gb_per_s * 1e9)))
    return found


def exchange_seconds(config: PlanConfig, sizes: ModelSizes) -> float:
    """Return how long teams exchange keys, values and their gradients: forward, recomputed and backward."""
    learner = config.learner
    passes = 2 + learner.recomputed_share
    per_prompt = mean_lengths(config)[0] * sizes.kv_bytes_per_token * value_bytes(config) / 2
    received = (1 - 1 / learner.context_parallel) * passes * per_prompt
    prompts_per_team = config.algorithm.prompts_per_step * learner.context_parallel / learner.num_ranks
    return prompts_per_team * received / (config.plan.link_gb_per_s * 1e9)


def checkpoint_bytes(config: PlanConfig, sizes: ModelSizes) -> float:
    """Return the bytes of one checkpoint: float32 weights and both moments of what is trained."""
    return 12.0 * trainable_params(config, sizes)


def disk_bytes(config: PlanConfig, sizes: ModelSizes) -> float:
    """Return what a run folder grows to: the checkpoints that are kept, the one being written, and the export."""
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    exported = (
        (2 if config.export.dtype == "bfloat16" else 4) * (sizes.language_params + sizes.vision_params)
        if config.checkpoint.export
        else 0
    )
    return kept * checkpoint_bytes(config, sizes) + exported


def times_sampled(config: PlanConfig) -> float:
    """Return how many groups are sampled for each that the filter keeps."""
    return 1 / config.plan.kept_by_filter if config.algorithm.filter.enabled else 1.0


def sampling_phases(config: PlanConfig, sizes: ModelSizes, vision_flops: float) -> list[Phase]:
    """Return prefill (bound by arithmetic) and decode (bound by memory: all weights and the cache once per token)."""
    rollout, device = config.rollout, device_of(config)
    if rollout.engine == "fake":
        return []
    degree = devices_per_engine(config)
    prompts, group = config.algorithm.prompts_per_step, rollout.group_size
    prompt_tokens, response_tokens = mean_lengths(config)
    sampled = prompts * times_sampled(config)
    observed = mean_observation_tokens(config)
    times_prefilled = 1 if rollout.engine == "vllm" and rollout.vllm.prefix_caching else group
    prefill = times_prefilled * sampled * sizes.group_flops(prompt_tokens, 0, 1) + vision_flops * times_sampled(config)
    between = [sizes.group_flops(prompt_tokens, response_tokens, 1, tokens) for tokens in (observed, 0)]
    prefill += sampled * group * (between[0] - between[1])
    sequences = math.ceil(sampled * group / rollout.num_workers)
    at_once = min(sequences, concurrency(config, sizes))
    bytes_per_step = (
        2 * sizes.language_params
        + at_once * (prompt_tokens + (response_tokens + observed) / 2) * sizes.kv_bytes_per_token
    ) / degree
    steps = math.ceil(sequences / at_once) * response_tokens
    passed = sizes.body_params - sizes.idle_params + sizes.vocab_size * sizes.hidden_size
    decode = 2 * sampled * group * response_tokens * passed
    # The last responses of a step run to the limit, in engines nearly empty: each token reads the weights it passes.
    tail = (rollout.max_response_tokens - response_tokens) * 2 * (sizes.language_params - sizes.idle_params) / degree
    bandwidth = device.bandwidth * config.plan.decode_bandwidth
    return [
        Phase("sample: prefill", prefill, prefill / (rollout.num_workers * degree * device.flops * config.plan.mfu)),
        Phase("sample: decode", decode, steps * bytes_per_step / bandwidth),
        Phase("sample: longest responses", 0.0, tail / bandwidth),
    ]


def concurrency(config: PlanConfig, sizes: ModelSizes) -> int:
    """Return how many sequences one engine decodes at once; in vLLM the siblings of a group share their prompt."""
    rollout = config.rollout
    prompt_tokens, response_tokens = mean_lengths(config)
    response_tokens += mean_observation_tokens(config)
    if rollout.engine != "vllm":
        at_once = int(cache_bytes(config, sizes) / (sizes.kv_bytes_per_token * (prompt_tokens + response_tokens)))
        return max(1, min(rollout.max_batch_sequences, at_once))
    per_sequence = (prompt_tokens / rollout.group_size + response_tokens) * sizes.kv_bytes_per_token
    return max(1, min(rollout.vllm.max_num_seqs, int(cache_bytes(config, sizes) / per_sequence)))
