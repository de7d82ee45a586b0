"""Compute what one device holds, part by part, from a model's sizes and the settings. Arithmetic only."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from rsgrpo.config.train import TrainConfig
from rsgrpo.plan.config import PlanConfig, device_of
from rsgrpo.plan.model_sizes import ModelSizes, sizes_of

GIB = 2**30
WORKSPACE_GIB = 2.0  # CUDA context, communication buffers, an engine's own working memory
FOUR_BITS = 0.5 + 4 / 64  # bytes of a value: NF4, and a float32 per block of 64


@dataclass(frozen=True, slots=True)
class Memory:
    """GiB on one device. static: always there. learning, sampling: there in that phase only."""

    static: dict[str, float]
    learning: dict[str, float]
    sampling: dict[str, float]

    @property
    def peak(self) -> float:
        """The larger of the two phases."""
        return sum(self.static.values()) + max(sum(self.learning.values()), sum(self.sampling.values()))


def trainable_params(config: TrainConfig, sizes: ModelSizes) -> int:
    """Count the parameters that have gradients and optimiser state."""
    lora = config.model.lora
    if not lora.rank:
        return sizes.language_params + (0 if config.model.freeze_vision else sizes.vision_params)
    return lora.rank * sum(sizes.adapter_widths.get(target, 0) for target in lora.targets)


def learner_memory(config: TrainConfig, sizes: ModelSizes) -> Memory:
    """Return what one learner rank holds: its shard of the state, and the parts of the moment that needs most."""
    moments = learner_moments(config, sizes)
    return Memory(learner_state(config, sizes), max(moments.values(), key=lambda parts: sum(parts.values())), {})


def learner_state(config: TrainConfig, sizes: ModelSizes) -> dict[str, float]:
    """Return what stays between steps, in GiB: float32 masters and moments of what is trained, the rest in `precision`.

    Frozen weights are taken to be exact in that precision, as published ones are.
    """
    learner, width = config.learner, value_bytes(config)
    on_device = 0 if learner.offload else 1 / (shard_ranks(config) * GIB)
    trained = trainable_params(config, sizes)
    state = {
        "weights (float32)": on_device * 4 * trained,
        "frozen base": on_device * frozen_base_bytes(config, sizes),
        "optimiser": on_device * 8 * trained,
        "frozen vision tower": width * sizes.vision_params / GIB if config.model.freeze_vision else 0.0,
    }
    if config.needs_reference_workers:
        frozen = reference_sizes(config, sizes)
        state["reference"] = width * (frozen.language_params / shard_ranks(config) + frozen.vision_params) / GIB
    return state


def frozen_base_bytes(config: TrainConfig, sizes: ModelSizes) -> float:
    """Return the bytes of a LoRA run's decoder: in 4 bits, half a byte and a float32 per block of 64 values."""
    lora, width = config.model.lora, value_bytes(config)
    if not lora.rank:
        return 0.0
    packed = sum(sizes.adapted_params.get(target, 0) for target in lora.targets) if lora.base_bits == 4 else 0
    return width * (sizes.language_params - packed) + FOUR_BITS * packed


def reference_sizes(config: TrainConfig, sizes: ModelSizes) -> ModelSizes:
    """Return the sizes of the frozen model: a teacher's where there is one, else the policy's."""
    return _teacher_sizes(config.model.teacher) if config.model.teacher else sizes


@functools.cache
def _teacher_sizes(path: str) -> ModelSizes:
    return sizes_of(path)[0]


def learner_moments(config: TrainConfig, sizes: ModelSizes) -> dict[str, dict[str, float]]:
    """Return what a step needs at its three largest moments, in GiB, beside `learner_state`.

    layer: in the backward pass of a decoder layer. The gradient of the head waits for the last reduction, and the layer
        before is still being reduced in float32. head: one chunk of logits. end: embeddings and head are reduced.
    """
    learner = config.learner
    width = value_bytes(config)
    trained, frozen = trainable_params(config, sizes), bool(config.model.lora.rank)
    root = sizes.language_params - sizes.body_params
    head = sizes.vocab_size * sizes.hidden_size
    tokens = tokens_per_rank(config)
    kept, one_layer = kept_activations(config, sizes), tokens * sizes.layer_activation_bytes(width)
    copied = 4 * sizes.layer_params / shard_ranks(config) if learner.offload else 0
    is_cast = learner.num_ranks > 1 or width == 2
    gradients = 0.0 if learner.offload else 4 * trained / shard_ranks(config)
    vision = learner_vision_bytes(config, sizes)
    moments = {
        "layer": {
            "gradients": gradients,
            "gathered weights": width * (2 * sizes.layer_params + root) + copied if is_cast else 0,
            "gradients in flight": 0 if frozen else width * (head + sizes.layer_params) + 4 * sizes.layer_params,
            "activations": kept + (one_layer if learner.recomputed_share else 0),
            "their gradients": tokens * sizes.layer_gradient_bytes(width),
            "keys of other ranks": shared_keys_bytes(config, sizes),
            "vision": vision,
        },
        "head": {
            "gradients": gradients,
            "gathered weights": width * root if is_cast else 0,
            "gradients in flight": 0 if frozen else 2 * width * head,
            "activations": kept,
            "logits": 5 * 4 * learner.logits_chunk_tokens * sizes.vocab_size,  # float32, with their gradients
            "vision": vision,
        },
        "end": {"gradients": gradients, "gradients in flight": 0 if frozen else (width + 4) * root},
    }
    return {moment: {part: size / GIB for part, size in parts.items()} for moment, parts in moments.items()}


def kept_activations(config: TrainConfig, sizes: ModelSizes) -> float:
    """Return the bytes that all decoder layers keep between forward and backward."""
    learner, width = config.learner, value_bytes(config)
    tokens, recomputed = tokens_per_rank(config), learner.recomputed_share
    copies = 2 if learner.gradient_checkpointing == "attention" else 1
    inputs = recomputed * copies * width * sizes.hidden_size
    return tokens * sizes.num_layers * (inputs + (1 - recomputed) * sizes.layer_activation_bytes(width))


def tokens_per_rank(config: TrainConfig) -> int:
    """Return the tokens of the longest row that one rank holds: all, or a team's share of it.

    Responses are dealt out whole, so a rank may have most of one more than its share.
    """
    tokens, size = config.learner.max_tokens_per_micro_batch, config.learner.context_parallel
    longest = config.rollout.max_response_tokens + config.rollout.max_observation_tokens
    return min(tokens, math.ceil((tokens + (size - 1) * longest) / size))


def shared_keys_bytes(config: TrainConfig, sizes: ModelSizes) -> float:
    """Return what a layer's backward pass holds of a prompt's keys and values that a team has gathered.

    Each response of a rank has a copy, the rank's own slices one together and the last token one; all their gradients
    are added up in one more, beside what was gathered.
    """
    learner = config.learner
    if learner.context_parallel == 1:
        return 0.0
    copies = math.ceil(config.rollout.group_size / learner.context_parallel) + 2
    return (copies + 2) * value_bytes(config) * 2 * sizes.kv_width * config.inputs.max_prompt_tokens


def shard_ranks(config: TrainConfig) -> int:
    """Return the ranks over which one copy of the state is spread."""
    return config.learner.num_ranks // config.learner.replicas


def value_bytes(config: TrainConfig) -> int:
    """Return the bytes of a value in the learner's precision."""
    return 2 if config.learner.precision == "bfloat16" else 4


def learner_vision_bytes(config: TrainConfig, sizes: ModelSizes) -> float:
    """Return what the tower and its features take while learning.

    A frozen tower works on one image at a time and leaves the features of a micro-batch's images; a trained one keeps
    what its backward pass needs of all of them.
    """
    width = value_bytes(config)
    pixels = config.inputs.max_pixels
    rollout = config.rollout
    response_tokens = rollout.max_response_tokens + rollout.max_observation_tokens
    group_tokens = config.inputs.max_prompt_tokens + rollout.group_size * response_tokens
    groups = max(1, config.learner.max_tokens_per_micro_batch // group_tokens)
    # A group that is over the budget is split: no row holds more images than its tokens have room for.
    read = min(
        groups * rollout.group_size * rollout.max_observation_images,
        config.learner.max_tokens_per_micro_batch // max(1, int(sizes.image_tokens(pixels))),
    )
    images = config.inputs.most_images * groups + read
    patches = sizes.image_patches(pixels)
    features = images * sizes.image_tokens(pixels) * sizes.hidden_size * width
    block = patches * sizes.vision_activation_bytes(width)
    if config.model.freeze_vision:
        return features + block
    if config.learner.recomputed_share:
        return features + images * (block + patches * width * sizes.vision_hidden_size * sizes.vision_depth)
    return features + images * sizes.vision_depth * block


def engine_memory(config: PlanConfig, sizes: ModelSizes) -> Memory:
    """Return what one device of an engine holds. vLLM's KV cache has a fixed size; that of transformers grows."""
    rollout = config.rollout
    if rollout.engine == "fake":
        return Memory({}, {}, {})
    all_params = sizes.language_params + sizes.vision_params
    if rollout.engine == "vllm":
        degree = rollout.vllm.tensor_parallel_size
        packed = sizes.body_params if rollout.vllm.engine_args.get("quantization") == "bitsandbytes" else 0
        weights = (2 * (all_params - packed) + FOUR_BITS * packed) / degree / GIB
        # vLLM measures the images of one prompt through the tower, each worker all of it, before it sizes its cache.
        images = config.inputs.most_images + rollout.max_observation_images
        patches = images * sizes.image_patches(config.inputs.max_pixels)
        vision = patches * sizes.vision_activation_bytes(2) / GIB
        left = rollout.vllm.gpu_memory_utilization * device_of(config).memory_gib - weights - vision - WORKSPACE_GIB
        held = {"engine weights": weights, "engine KV cache": rollout.vllm.kv_cache_gib or max(left, 0.0)}
        if rollout.vllm.sleep_level:
            return Memory({}, {}, held | {"engine vision": vision})
        return Memory(held, {}, {"engine vision": vision})
    width = 2 if rollout.dtype == "bfloat16" else 4
    longest = config.inputs.max_prompt_tokens + rollout.max_response_tokens + rollout.max_observation_tokens
    sequence = longest * sizes.kv_bytes_per_token * width / 2
    cached = max(sequence, min(rollout.max_batch_sequences * sequence, rollout.max_batch_gib * GIB))
    return Memory({"engine weights": width * all_params / GIB}, {}, {"engine KV cache": cached / GIB})


def devices_memory(config: PlanConfig, sizes: ModelSizes) -> dict[str, Memory]:
    """Return the memory of one device of each kind: shared by both roles, or one kind for each."""
    learner, engine = learner_memory(config, sizes), engine_memory(config, sizes)
    context = {"context and buffers": WORKSPACE_GIB if config.learner.device != "cpu" else 0.5}
    if config.cluster.placement == "disaggregated":
        return {
            "learner": Memory(context | learner.static, learner.learning, {}),
            "engine": Memory(context | engine.static, {}, engine.sampling),
        }
    return {"learner and engine": Memory(context | learner.static | engine.static, learner.learning, engine.sampling)}


def host_memory(config: PlanConfig, sizes: ModelSizes) -> dict[str, float]:
    """Return what one node holds in CPU memory, in GiB."""
    learner, rollout = config.learner, config.rollout
    ranks = math.ceil(learner.num_ranks / config.cluster.nodes)
    trained, all_params = trainable_params(config, sizes), sizes.language_params + sizes.vision_params
    frozen = value_bytes(config) * sizes.language_params if config.model.lora.rank else 0
    parts = {
        "model while it loads": 4 * all_params,
        "image features": ranks * (learner.vision_cache_mb << 20) if config.model.freeze_vision else 0,
        "object store": config.cluster.object_store_mb << 20,
        "copy while a checkpoint is written": 12 * trained * ranks / shard_ranks(config)
        if config.checkpoint.background
        else 0,
        "offloaded state": (16 * trained + frozen) * ranks / shard_ranks(config) if learner.offload else 0,
    }
    if config.checkpoint.background:
        parts["copy while a checkpoint is written"] = 12 * trained * ranks / shard_ranks(config)
    if rollout.engine == "vllm":
        engines = math.ceil(rollout.num_workers / config.cluster.nodes)
        if rollout.vllm.sleep_level == 1 and config.cluster.placement == "colocated":
            parts["sleeping engines' weights"] = engines * 2 * all_params
    return {part: size / GIB for part, size in parts.items()}
