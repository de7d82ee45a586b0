"""Compute what one device holds, part by part, from a model's sizes and the settings. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from rsgrpo.config.train import TrainConfig
from rsgrpo.plan.config import PlanConfig, device_of
from rsgrpo.plan.model_sizes import ModelSizes

GIB = 2**30
WORKSPACE_GIB = 2.0  # CUDA context, communication buffers, an engine's own working memory


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
    return sizes.num_layers * lora.rank * sum(sizes.adapter_widths.get(target, 0) for target in lora.targets)


def learner_memory(config: TrainConfig, sizes: ModelSizes) -> Memory:
    """Return what one learner rank holds: float32 state, sharded; a working copy of two layers; activations."""
    learner = config.learner
    width = 2 if learner.precision == "bfloat16" else 4
    shard = learner.num_ranks * GIB
    on_device = 0 if learner.offload else 1
    trained = trainable_params(config, sizes)
    sharded = sizes.language_params + (0 if config.model.freeze_vision else sizes.vision_params)
    sharded += trained if config.model.lora.rank else 0
    tokens = learner.max_tokens_per_micro_batch
    layer_activations = tokens * sizes.layer_activation_bytes(width)
    kept = tokens * width * sizes.hidden_size * sizes.num_layers
    recomputed = learner.recomputed_share
    activations = (1 - recomputed) * sizes.num_layers * layer_activations
    if recomputed:
        copies = 2 if learner.gradient_checkpointing == "attention" else 1
        activations += layer_activations + recomputed * copies * kept
    gathered = 2 * sizes.layer_params + (sizes.language_params - sizes.body_params)
    static = {
        "weights (float32)": on_device * 4 * sharded / shard,
        "optimiser": on_device * 8 * trained / shard,
        "frozen vision tower": width * sizes.vision_params / GIB if config.model.freeze_vision else 0.0,
    }
    if config.algorithm.kl_coef > 0 and not config.model.lora.rank:
        static["reference"] = (4 * sizes.language_params / learner.num_ranks + width * sizes.vision_params) / GIB
    learning = {
        "gradients": on_device * 4 * trained / shard,
        "gathered weights": width * gathered / GIB if learner.num_ranks > 1 or width == 2 else 0.0,
        "activations": activations / GIB,
        "logits": 3 * 4 * learner.logits_chunk_tokens * sizes.vocab_size / GIB,
        "vision": learner_vision_bytes(config, sizes) / GIB,
    }
    return Memory(static, learning, {})


def learner_vision_bytes(config: TrainConfig, sizes: ModelSizes) -> float:
    """Return what the tower and its features take while learning.

    A frozen tower works on one image at a time and leaves the features of a micro-batch's images; a trained one keeps
    what its backward pass needs of all of them.
    """
    width = 2 if config.learner.precision == "bfloat16" else 4
    pixels = config.inputs.max_pixels
    group_tokens = config.inputs.max_prompt_tokens + config.rollout.group_size * config.rollout.max_response_tokens
    images = config.inputs.max_images * max(1, config.learner.max_tokens_per_micro_batch // group_tokens)
    patches = pixels / sizes.patch_size**2
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
        weights = 2 * all_params / degree / GIB
        # vLLM measures the images of one prompt through the tower, each worker all of it, before it sizes its cache.
        patches = config.inputs.max_images * config.inputs.max_pixels / sizes.patch_size**2
        vision = patches * sizes.vision_activation_bytes(2) / GIB
        left = rollout.vllm.gpu_memory_utilization * device_of(config).memory_gib - weights - vision - WORKSPACE_GIB
        held = {"engine weights": weights, "engine KV cache": rollout.vllm.kv_cache_gib or max(left, 0.0)}
        if rollout.vllm.sleep_level:
            return Memory({}, {}, held | {"engine vision": vision})
        return Memory(held, {}, {"engine vision": vision})
    width = 2 if rollout.dtype == "bfloat16" else 4
    longest = config.inputs.max_prompt_tokens + rollout.max_response_tokens
    cached = rollout.max_batch_sequences * longest * sizes.kv_bytes_per_token * width / 2
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
