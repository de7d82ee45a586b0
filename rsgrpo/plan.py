"""What a run will need, before anything is rented: `python -m rsgrpo.plan recipe=evisrag_7b [plan.gpu=a100] ...`.

Takes every key that training takes, plus `plan.*` (the assumptions) and the size of the cluster. Arithmetic only: no
model, no data and no GPU is touched. Seconds are estimates from assumed rates; bytes and FLOPs follow from the sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rsgrpo import cli
from rsgrpo.checks import at_least, one_of, require
from rsgrpo.config import ClusterConfig, TrainConfig, validate
from rsgrpo.shapes import Shapes, shapes_of

GIB = 2**30
WORKSPACE_GIB = 2.0  # CUDA context, communication buffers, an engine's own working memory
USABLE = 0.94  # the rest is lost to fragmentation


@dataclass(frozen=True, slots=True)
class Device:
    """Memory in GiB, dense bfloat16 (CPU: float32) FLOP/s, bytes/s of memory."""

    memory_gib: float
    flops: float
    bandwidth: float


DEVICES = {
    "h100": Device(80, 989e12, 3.35e12),
    "h200": Device(141, 989e12, 4.8e12),
    "b200": Device(180, 2250e12, 8e12),
    "a100": Device(80, 312e12, 2.0e12),
    "a100_40": Device(40, 312e12, 1.55e12),
    "l40s": Device(48, 362e12, 0.86e12),
    "rtx4090": Device(24, 165e12, 1.0e12),
    "cpu": Device(8, 0.1e12, 20e9),
}


@dataclass(frozen=True)
class Assumptions:
    """What a plan cannot know.

    gpu: one of DEVICES. Runs with learner.device=cpu take "cpu".
    mfu: share of the device's FLOP/s that training and prefill reach. decode_bandwidth: share of its bytes/s in decode.
    prompt_fill, response_fill: mean lengths as a share of the limits.
    sync_gb_per_s: weights from learner to engines.
    """

    gpu: str = "h100"
    mfu: float = 0.4
    decode_bandwidth: float = 0.5
    prompt_fill: float = 0.73
    response_fill: float = 0.46
    sync_gb_per_s: float = 20.0

    def __post_init__(self) -> None:
        one_of("plan.gpu", self.gpu, DEVICES)
        for key in ("mfu", "decode_bandwidth", "prompt_fill", "response_fill"):
            require(0 < getattr(self, key) <= 1, f"plan.{key} must be in (0, 1], got {getattr(self, key):g}")


@dataclass(frozen=True)
class PlannedCluster(ClusterConfig):
    """The cluster and what it is made of. gpus_per_node: 0 is as many as the workers take, all on one node."""

    nodes: int = 1
    gpus_per_node: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, cluster__nodes=self.nodes)
        at_least(0, cluster__gpus_per_node=self.gpus_per_node)


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """A training configuration with the assumptions of a plan."""

    cluster: PlannedCluster = field(default_factory=PlannedCluster)
    plan: Assumptions = field(default_factory=Assumptions)


@dataclass(frozen=True, slots=True)
class Memory:
    """GiB on one device. static: there all the time. learning, sampling: there in that phase only."""

    static: dict[str, float]
    learning: dict[str, float]
    sampling: dict[str, float]

    @property
    def peak(self) -> float:
        """The larger of the two phases."""
        return sum(self.static.values()) + max(sum(self.learning.values()), sum(self.sampling.values()))


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of one step. flops: of all devices together; 0 where the time is not spent on arithmetic."""

    name: str
    flops: float
    seconds: float


def main(config: PlanConfig) -> None:
    """Print the plan."""
    validate(config)
    shapes, source = shapes_of(config.model.path)
    print(render(config, shapes, source))


def device_of(config: PlanConfig) -> Device:
    """Return the device that the run is planned for."""
    return DEVICES["cpu" if config.learner.device == "cpu" else config.plan.gpu]


def trainable_params(config: TrainConfig, shapes: Shapes) -> int:
    """Count the parameters that have gradients and optimiser state."""
    lora = config.model.lora
    if not lora.rank:
        return shapes.language_params + (0 if config.model.freeze_vision else shapes.vision_params)
    hidden, kv_width, inner = shapes.hidden_size, shapes.kv_width, shapes.intermediate_size
    widths = {
        "q_proj": 2 * hidden, "k_proj": hidden + kv_width, "v_proj": hidden + kv_width, "o_proj": 2 * hidden,
        "gate_proj": hidden + inner, "up_proj": hidden + inner, "down_proj": hidden + inner,
    }  # fmt: skip
    return shapes.num_layers * lora.rank * sum(widths.get(target, 0) for target in lora.targets)


def learner_memory(config: TrainConfig, shapes: Shapes) -> Memory:
    """Return what one learner rank holds: float32 state, sharded; a working copy of two layers; activations."""
    learner = config.learner
    width = 2 if learner.precision == "bfloat16" else 4
    shard = learner.num_ranks * GIB
    on_device = 0 if learner.offload else 1
    trained = trainable_params(config, shapes)
    sharded = shapes.language_params + (0 if config.model.freeze_vision else shapes.vision_params)
    sharded += trained if config.model.lora.rank else 0
    tokens, hidden = learner.max_tokens_per_micro_batch, shapes.hidden_size
    layer_activations = tokens * width * (10 * hidden + 4 * shapes.intermediate_size)
    kept = tokens * width * hidden * shapes.num_layers
    activations = kept + layer_activations if learner.gradient_checkpointing else shapes.num_layers * layer_activations
    gathered = 2 * shapes.layer_params + (shapes.language_params - shapes.body_params)
    static = {
        "weights (float32)": on_device * 4 * sharded / shard,
        "optimiser": on_device * 8 * trained / shard,
        "frozen vision tower": width * shapes.vision_params / GIB if config.model.freeze_vision else 0.0,
    }
    if config.algorithm.kl_coef > 0 and not config.model.lora.rank:
        static["reference"] = (4 * shapes.language_params / learner.num_ranks + width * shapes.vision_params) / GIB
    learning = {
        "gradients": on_device * 4 * trained / shard,
        "gathered weights": width * gathered / GIB if learner.num_ranks > 1 or width == 2 else 0.0,
        "activations": activations / GIB,
        "logits": 3 * 4 * learner.logits_chunk_tokens * shapes.vocab_size / GIB,
    }
    return Memory(static, learning, {})


def engine_memory(config: PlanConfig, shapes: Shapes) -> Memory:
    """Return what one device of an engine holds. The KV cache of vLLM is what it was given; transformers' grows."""
    rollout = config.rollout
    if rollout.engine == "fake":
        return Memory({}, {}, {})
    all_params = shapes.language_params + shapes.vision_params
    if rollout.engine == "vllm":
        degree = rollout.vllm.tensor_parallel_size
        weights = 2 * all_params / degree / GIB
        left = rollout.vllm.gpu_memory_utilization * device_of(config).memory_gib - weights - WORKSPACE_GIB
        cache = {"engine KV cache": rollout.vllm.kv_cache_gib or max(left, 0.0)}
        if rollout.vllm.sleep_level:
            return Memory({}, {}, {"engine weights": weights} | cache)
        return Memory({"engine weights": weights} | cache, {}, {})
    width = 2 if rollout.dtype == "bfloat16" else 4
    longest = config.inputs.max_prompt_tokens + rollout.max_response_tokens
    cached = rollout.max_batch_sequences * longest * shapes.kv_bytes_per_token * width / 2
    return Memory({"engine weights": width * all_params / GIB}, {}, {"engine KV cache": cached / GIB})


def devices_memory(config: PlanConfig, shapes: Shapes) -> dict[str, Memory]:
    """Return the memory of one device of each kind: shared by both roles, or one kind for each."""
    learner, engine = learner_memory(config, shapes), engine_memory(config, shapes)
    context = {"context and buffers": WORKSPACE_GIB if config.learner.device != "cpu" else 0.5}
    if config.cluster.placement == "disaggregated":
        return {
            "learner": Memory(context | learner.static, learner.learning, {}),
            "engine": Memory(context | engine.static, {}, engine.sampling),
        }
    return {"learner and engine": Memory(context | learner.static | engine.static, learner.learning, engine.sampling)}


def num_devices(config: PlanConfig) -> int:
    """Count the devices that the workers occupy."""
    degree = config.rollout.vllm.tensor_parallel_size if config.rollout.engine == "vllm" else 1
    engines = 0 if config.rollout.engine == "fake" else config.rollout.num_workers * degree
    ranks = config.learner.num_ranks
    return ranks + engines if config.cluster.placement == "disaggregated" else max(ranks, engines)


def mean_lengths(config: PlanConfig) -> tuple[float, float]:
    """Return the assumed mean prompt and response lengths in tokens."""
    assumed = config.plan
    return (
        assumed.prompt_fill * config.inputs.max_prompt_tokens,
        assumed.response_fill * config.rollout.max_response_tokens,
    )


def phases(config: PlanConfig, shapes: Shapes) -> list[Phase]:
    """Return the phases of one step, without the filter's refills, validation and checkpoints."""
    device, rollout, learner, algorithm = device_of(config), config.rollout, config.learner, config.algorithm
    prompts, group = algorithm.prompts_per_step, rollout.group_size
    prompt_tokens, response_tokens = mean_lengths(config)
    vision = prompts * config.inputs.max_images * shapes.image_flops(config.plan.prompt_fill * config.inputs.max_pixels)
    forward = prompts * shapes.group_flops(prompt_tokens, response_tokens, group)
    rate = device.flops * config.plan.mfu
    learner_rate = learner.num_ranks * rate
    found = [*sampling_phases(config, shapes, vision)]
    if algorithm.updates_per_step > 1 or not algorithm.on_policy_shortcut:
        found.append(Phase("old log-probabilities", forward, forward / learner_rate))
    if algorithm.kl_coef > 0:
        found.append(Phase("reference", forward, forward / learner_rate))
    passes = (2 if config.model.lora.rank else 3) + learner.gradient_checkpointing
    tower = vision * (1 if config.model.freeze_vision else 3 + learner.gradient_checkpointing)
    work = passes * forward + tower
    found.append(Phase("learn", work, work / learner_rate))
    sent = 2 * (shapes.language_params + (0 if config.model.freeze_vision else shapes.vision_params))
    found.append(Phase("weight sync", 0.0, sent / (config.plan.sync_gb_per_s * 1e9)))
    return found


def sampling_phases(config: PlanConfig, shapes: Shapes, vision_flops: float) -> list[Phase]:
    """Return prefill (arithmetic) and decode (memory traffic: all weights and the cache once per token)."""
    rollout, device = config.rollout, device_of(config)
    if rollout.engine == "fake":
        return []
    degree = rollout.vllm.tensor_parallel_size if rollout.engine == "vllm" else 1
    prompts, group = config.algorithm.prompts_per_step, rollout.group_size
    prompt_tokens, response_tokens = mean_lengths(config)
    times_prefilled = 1 if rollout.engine == "vllm" and rollout.vllm.prefix_caching else group
    prefill = times_prefilled * prompts * shapes.group_flops(prompt_tokens, 0, 1) + vision_flops
    sequences = math.ceil(prompts * group / rollout.num_workers)
    at_once = min(sequences, concurrency(config, shapes))
    bytes_per_step = (
        2 * shapes.language_params + at_once * (prompt_tokens + response_tokens / 2) * shapes.kv_bytes_per_token
    ) / degree
    steps = math.ceil(sequences / at_once) * response_tokens
    decode = 2 * prompts * group * response_tokens * (shapes.body_params + shapes.vocab_size * shapes.hidden_size)
    return [
        Phase("sample: prefill", prefill, prefill / (rollout.num_workers * degree * device.flops * config.plan.mfu)),
        Phase("sample: decode", decode, steps * bytes_per_step / (device.bandwidth * config.plan.decode_bandwidth)),
    ]


def concurrency(config: PlanConfig, shapes: Shapes) -> int:
    """Return how many sequences one engine decodes at once; in vLLM the siblings of a group share their prompt."""
    rollout = config.rollout
    if rollout.engine != "vllm":
        return rollout.max_batch_sequences
    engine = engine_memory(config, shapes)
    cache_bytes = (engine.static | engine.sampling)["engine KV cache"] * GIB * rollout.vllm.tensor_parallel_size
    prompt_tokens, response_tokens = mean_lengths(config)
    per_sequence = (prompt_tokens / rollout.group_size + response_tokens) * shapes.kv_bytes_per_token
    return max(1, min(rollout.vllm.max_num_seqs, int(cache_bytes / per_sequence)))


def warnings(config: PlanConfig, shapes: Shapes) -> list[str]:
    """Return what will not fit or lie idle, each with what to change."""
    found = []
    limit = device_of(config).memory_gib
    for kind, memory in devices_memory(config, shapes).items():
        if memory.peak > USABLE * limit:
            found.append(
                f"{kind}: {memory.peak:.1f} GiB needed > {USABLE:g} x {limit:g} GiB = {USABLE * limit:.1f}. Try more "
                "learner.num_ranks, a smaller learner.max_tokens_per_micro_batch or "
                "rollout.vllm.gpu_memory_utilization, rollout.vllm.sleep_level=1, learner.offload=true, or adapters "
                "(model.lora.rank=64)"
            )
    if config.rollout.engine == "vllm":
        engine = engine_memory(config, shapes)
        cached = (engine.static | engine.sampling)["engine KV cache"] * GIB * config.rollout.vllm.tensor_parallel_size
        longest = (config.inputs.max_prompt_tokens + config.rollout.max_response_tokens) * shapes.kv_bytes_per_token
        if cached < longest:
            found.append(
                f"engine: its KV cache of {cached / GIB:.2f} GiB does not hold one response of full length "
                f"({longest / GIB:.2f} GiB): raise rollout.vllm.gpu_memory_utilization or tensor_parallel_size"
            )
    if config.learner.device != "cpu" and config.cluster.gpus_per_node:
        have, used = config.cluster.nodes * config.cluster.gpus_per_node, num_devices(config)
        sizes = f"{config.cluster.nodes} x {config.cluster.gpus_per_node} = {have} GPUs"
        if used > have:
            found.append(f"the workers take {used} GPUs, the cluster has {sizes}: it will wait for the rest for ever")
        elif used < have:
            found.append(f"the workers take {used} of {sizes}: {have - used} stay idle")
    return found


def render(config: PlanConfig, shapes: Shapes, source: str) -> str:
    """Return the plan as text."""
    device, rollout, learner = device_of(config), config.rollout, config.learner
    name = "cpu" if learner.device == "cpu" else config.plan.gpu
    trained = trainable_params(config, shapes)
    prompt_tokens, response_tokens = mean_lengths(config)
    lines = [
        f"Plan of {config.name}: {learner.num_ranks} learner ranks and {rollout.num_workers} {rollout.engine} engines, "
        f"{config.cluster.placement}, on {num_devices(config)} x {name} ({device.memory_gib:g} GiB)",
        f"Model: {source}: {shapes.language_params / 1e9:.3g} B decoder + {shapes.vision_params / 1e9:.3g} B vision "
        f"parameters, {trained / 1e9:.3g} B of them trained",
    ]
    for kind, memory in devices_memory(config, shapes).items():
        lines += ["", f"Memory of one device, {kind}:"]
        for phase, parts in (("always", memory.static), ("learning", memory.learning), ("sampling", memory.sampling)):
            lines += [f"  {phase:<9} {part:<22} {gib:8.2f} GiB" for part, gib in parts.items() if gib]
        lines.append(f"  {'peak':<9} {'':<22} {memory.peak:8.2f} GiB of {device.memory_gib:g}")
    lines += [
        "",
        f"One step: {config.algorithm.prompts_per_step} prompts x {rollout.group_size} rollouts of "
        f"{prompt_tokens:,.0f} + {response_tokens:,.0f} tokens:",
    ]
    found = phases(config, shapes)
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
        f"{config.inputs.max_images} images a prompt, weights sent at {assumed.sync_gb_per_s:g} GB/s.",
        "  Left out: refills of the group filter, validation, checkpoints. Change any of it with plan.KEY=VALUE.",
    ]
    lines += [f"WARNING: {warning}" for warning in warnings(config, shapes)]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, PlanConfig, "config")
