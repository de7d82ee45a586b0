"""What vLLM is started with: arguments, environment and memory, all checked before any process starts."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import psutil
import safetensors
import torch
from transformers import AutoConfig

from rollout.config import ConfigError, InputsConfig, RolloutConfig, VllmConfig
from rollout.engine import Backend, EngineOptions
from rollout.families import Family
from rollout.keys import nearest, require

CPU_BLOCK_SIZE = 32  # vLLM's default on CPU is 128: shorter prompts would never hit the prefix cache
GPU_BLOCK_SIZE = 16  # vLLM's own
CPU_BATCHED_TOKENS = 2048
GPU_BATCHED_TOKENS = 8192  # vLLM's default without a server is 2,048: a prompt of five pages would take six steps
SHARED_MEMORY = Path("/dev/shm")
TOWER = "*visual.*"
"""The tower's parameters, by the names that vLLM has for most families."""
WORKER_EXTENSION = "rollout.vllm.weights_in.WeightReceiver"

GIB = 2**30
ENGINES_PER_NODE = 8
CPU_CACHE_BYTES = 1 * GIB
"""Limit of the KV cache on CPU unless the cache size is set or a single response needs more."""
CPU_PROGRAM_BYTES = int(1.5 * GIB)
"""Memory of vLLM's two processes on CPU, weights and cache excluded (measured with a model of 2 M parameters)."""


def prepare(
    model_path: str, rollout: RolloutConfig, inputs: InputsConfig, options: EngineOptions
) -> tuple[dict[str, Any], dict[str, str], Backend]:
    """Check that a model can run as configured, and return what to start it with.

    Returns:
        Arguments of `vllm.AsyncEngineArgs`, environment variables of vLLM's processes, weight-transfer backend.

    Raises:
        ConfigError: a setting cannot work with this model and these devices.
    """
    cpu = on_cpu(options.device)
    config = check_model(model_path, rollout, inputs, options)
    if cpu and "linear_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        rollout = for_recurrent_layers_on_cpu(rollout)
    if rollout.routing_replay:
        check_replay(config, rollout, cpu=cpu)
    backend: Backend = "gloo" if cpu else "ipc" if options.colocated else "nccl"
    arguments = engine_arguments(
        model_path,
        rollout,
        inputs,
        cpu=cpu,
        backend=backend,
        lora_rank=options.lora_rank,
        kv_cache_bytes=cache_bytes(model_path, config, rollout, inputs, cpu=cpu),
    )
    num_threads = options.num_threads or rollout.num_threads
    variables = child_environment(rollout.vllm, cpu=cpu, backend=backend, num_threads=num_threads)
    return arguments | options.source, variables, backend


def on_cpu(device: str) -> bool:
    """Tell whether the installed vLLM runs on CPU; it is built for one kind of device.

    Raises:
        ConfigError: vLLM is missing, or `device` asks for the other kind.
    """
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ConfigError(
            f"rollout.engine=vllm needs vLLM, which cannot be imported ({error}). Install it, or set rollout.engine=hf."
        ) from error
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f'device must be "auto", "cpu" or "cuda", got {device!r}')
    cpu = bool(current_platform.is_cpu())
    if device != "auto" and (device == "cpu") != cpu:
        raise ConfigError(f"the installed vLLM runs on {'cpu' if cpu else 'cuda'}, but rollout asks for {device}")
    return cpu


def for_recurrent_layers_on_cpu(rollout: RolloutConfig) -> RolloutConfig:
    """Return the settings with which vLLM's CPU build runs layers that carry a recurrent state.

    Its prefix cache for them needs chunked prefill, which is off on CPU; so each sibling computes its prompt there.

    Raises:
        ConfigError: another dtype than bfloat16, the only one of vLLM's CPU kernels for such layers.
    """
    require(
        rollout.dtype == "bfloat16",
        f"rollout.dtype={rollout.dtype}, but vLLM on CPU runs the recurrent layers of this model in bfloat16 only. Set "
        "rollout.dtype=bfloat16 or rollout.engine=hf.",
    )
    engine_args = {**rollout.vllm.engine_args, "enable_prefix_caching": False}
    return replace(rollout, vllm=replace(rollout.vllm, engine_args=engine_args))


def model_overrides(family: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what vLLM reads in the place of the model's config.json. given: by the user, who has the last word."""
    needed = family.engine_config.items()
    return {**given, **{part: {**keys, **given.get(part, {})} for part, keys in needed}}


def check_replay(config: Any, rollout: RolloutConfig, *, cpu: bool) -> None:
    """Refuse routing replay where vLLM cannot return the experts that it took.

    Raises:
        ConfigError: names the setting and what to change.
    """
    if not getattr(config.get_text_config(), "num_experts", 0):
        raise ConfigError(f"rollout.routing_replay: {config.model_type} has no experts. Set it to false.")
    if cpu:
        raise ConfigError(
            "rollout.routing_replay=true needs vLLM on GPUs: its CPU build does not return experts. Set "
            "rollout.engine=hf or rollout.routing_replay=false."
        )
    require(
        rollout.vllm.prefix_caching,
        "rollout.routing_replay=true: vLLM keeps the experts beside its prefix cache. Set "
        "rollout.vllm.engine_args.enable_prefix_caching=true.",
    )


def max_model_len(rollout: RolloutConfig, inputs: InputsConfig) -> int:
    """Return the longest prompt plus response, in tokens, with what an environment may add."""
    longest = inputs.max_prompt_tokens + rollout.max_response_tokens + rollout.max_observation_tokens
    return rollout.vllm.engine_args.get("max_model_len") or longest


def check_model(model_path: str, rollout: RolloutConfig, inputs: InputsConfig, options: EngineOptions) -> Any:
    """Refuse a model or a size that vLLM cannot run; return the model's config.

    Raises:
        ConfigError: names the setting and what to change.
    """
    from vllm.model_executor.models import ModelRegistry

    config = AutoConfig.from_pretrained(model_path, **options.source)
    architectures = config.architectures or []
    if not set(architectures) & set(ModelRegistry.get_supported_archs()):
        raise ConfigError(
            f"vLLM does not support the model class {architectures} of {model_path}. Use rollout.engine=hf."
        )
    text = config.get_text_config()
    heads = {"attention heads": text.num_attention_heads}
    if vision_heads := getattr(getattr(config, "vision_config", None), "num_heads", None):
        heads["vision heads"] = vision_heads
    degree = rollout.vllm.tensor_parallel_size
    for kind, count in heads.items():
        if count % degree:
            fitting = [size for size in range(1, count + 1) if all(n % size == 0 for n in heads.values())]
            raise ConfigError(
                f"rollout.vllm.tensor_parallel_size={degree} does not divide the model's {count} {kind}. Use one of "
                f"{fitting}."
            )
    length, limit = max_model_len(rollout, inputs), getattr(text, "max_position_embeddings", None)
    if limit and length > limit:
        raise ConfigError(
            f"a prompt and its response may have {length:,} tokens, but the model has {limit:,} positions. Lower "
            "inputs.max_prompt_tokens or rollout.max_response_tokens, or set rollout.vllm.engine_args.max_model_len."
        )
    return config


def engine_arguments(
    model_path: str,
    rollout: RolloutConfig,
    inputs: InputsConfig,
    *,
    cpu: bool,
    backend: Backend,
    lora_rank: int,
    kv_cache_bytes: int,
) -> dict[str, Any]:
    """Return the keyword arguments of `vllm.AsyncEngineArgs`.

    kv_cache_bytes: as `cache_bytes` returns it.

    Raises:
        ConfigError: `engine_args` has an argument that the installed vLLM lacks, or changes one that is fixed here.
    """
    from vllm import AsyncEngineArgs

    vllm = rollout.vllm
    known = [field.name for field in fields(AsyncEngineArgs)]
    for name in vllm.engine_args:
        require(
            name in known,
            f"rollout.vllm.engine_args.{name}: the installed vLLM has no such engine argument{nearest(name, known)}",
        )
    # What engine_args may change comes first; what our own code relies on overrides it.
    arguments: dict[str, Any] = {
        "max_num_seqs": vllm.max_num_seqs,
        "enable_prefix_caching": vllm.prefix_caching,
        "disable_log_stats": True,
        **({} if cpu else gpu_defaults(vllm)),
        **vllm.engine_args,
    }
    fixed = _fixed(model_path, rollout, inputs, cpu=cpu) | {"weight_transfer_config": {"backend": backend}}
    if cpu:
        arguments.setdefault("block_size", CPU_BLOCK_SIZE)
        # A prompt split over two steps draws a token that is discarded, and vLLM cannot rewind a seeded CPU generator:
        # its engine dies. So every prompt goes into one step.
        whole = max(arguments.get("max_num_batched_tokens", CPU_BATCHED_TOKENS), fixed["max_model_len"])
        fixed |= {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": whole}
    if kv_cache_bytes:
        fixed["kv_cache_memory_bytes"] = kv_cache_bytes
    if lora_rank:
        fixed |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _lora_rank_of_vllm(lora_rank)}
    for name in vllm.engine_args.keys() & fixed.keys() - {"max_model_len", "max_num_batched_tokens"}:
        require(
            vllm.engine_args[name] == fixed[name],
            f"rollout.vllm.engine_args.{name} is always {fixed[name]!r} here. Remove it.",
        )
    return arguments | fixed


def _fixed(model_path: str, rollout: RolloutConfig, inputs: InputsConfig, *, cpu: bool) -> dict[str, Any]:
    """Return the arguments on which our own code relies, and which have keys of their own."""
    vllm = rollout.vllm
    fixed: dict[str, Any] = {
        "model": model_path,
        "dtype": rollout.dtype,
        "max_model_len": max_model_len(rollout, inputs),
        "tensor_parallel_size": vllm.tensor_parallel_size,
        "gpu_memory_utilization": vllm.gpu_memory_utilization,
        "limit_mm_per_prompt": {"image": inputs.max_images + rollout.max_observation_images, "video": 0},
        # Images arrive resized; the sizes tell vLLM how many tokens an image may have when it profiles memory.
        "mm_processor_kwargs": {
            "do_resize": False,
            "size": {"shortest_edge": inputs.min_pixels, "longest_edge": inputs.max_pixels},
        },
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "enable_sleep_mode": vllm.sleep_level > 0 and not cpu,
        "worker_extension_cls": WORKER_EXTENSION,
        "enable_return_routed_experts": rollout.routing_replay,
    }
    if vllm.tensor_parallel_size > 1 and not cpu:
        fixed["distributed_executor_backend"] = "mp"  # inside a Ray actor vLLM would start actors of its own
    elif vllm.tensor_parallel_size == 1 and cpu:
        fixed["distributed_executor_backend"] = "uni"
    return fixed


def gpu_defaults(vllm: VllmConfig) -> dict[str, Any]:
    """Return arguments that differ from vLLM's own on GPUs, where `engine_args` does not say otherwise."""
    arguments: dict[str, Any] = {"max_num_batched_tokens": GPU_BATCHED_TOKENS}
    # In shared memory an image goes to vLLM's process once, not once for each sibling of a group.
    cache_gib = vllm.engine_args.get("mm_processor_cache_gb", 4)
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= ENGINES_PER_NODE * cache_gib * GIB:
        arguments["mm_processor_cache_type"] = "shm"
    if vllm.sleep_level == 2:  # a frozen tower is never sent again
        arguments["sleep_preserve_parameter_names"] = [TOWER]
    return arguments


def start_timeout_s() -> int:
    """Return the time limit to load the model and profile memory; vLLM's own environment variable sets it."""
    return int(os.environ.get("VLLM_ENGINE_READY_TIMEOUT_S", "900"))


def _lora_rank_of_vllm(rank: int) -> int:
    """Return the smallest adapter rank that vLLM has kernels for and that holds `rank`."""
    from vllm.config.lora import MaxLoRARanks

    ranks: tuple[int, ...] = get_args(MaxLoRARanks)
    if rank > max(ranks):
        raise ConfigError(f"model.lora.rank must be <= {max(ranks)} for vLLM, got {rank}")
    return min(size for size in ranks if size >= rank)


def child_environment(vllm: VllmConfig, *, cpu: bool, backend: str, num_threads: int) -> dict[str, str]:
    """Return the variables under which vLLM's own processes start; they inherit the parent's."""
    variables = {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would inherit locks of the parent's threads
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(start_timeout_s()),
        # On CPU a start logs ten warnings about settings that cannot be changed there.
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR" if cpu else "WARNING"),
    }
    if cpu:
        # Dynamo would compile for half a minute at the first request; several OpenMP threads stall unless they are
        # pinned by vLLM's multi-process executor, which costs one more process.
        variables |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": str(num_threads or 1)}
        if vllm.tensor_parallel_size == 1:
            variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if backend == "ipc":
        variables["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # CUDA handles travel pickled, inside one machine
    return variables


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a block and restore the old ones after it."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)


# ---- memory ----------------------------------------------------------------------------------------------------------


def cache_bytes(model_path: str, config: Any, rollout: RolloutConfig, inputs: InputsConfig, *, cpu: bool) -> int:
    """Return the KV cache to ask vLLM for, in bytes on each device; 0 leaves it to `gpu_memory_utilization`.

    Raises:
        ConfigError: the cache is too small for a response of full length, or memory does not suffice.
    """
    text, length = config.get_text_config(), max_model_len(rollout, inputs)
    block_size = rollout.vllm.engine_args.get("block_size") or (CPU_BLOCK_SIZE if cpu else GPU_BLOCK_SIZE)
    one_response = response_cache_bytes(text, rollout.dtype, length, block_size)
    weights = weight_bytes(model_path, rollout.dtype)
    if cpu:
        size = cpu_cache_bytes(one_response, rollout)
        check_cache(size, one_response, length)
        check_cpu_memory(weights, size, psutil.virtual_memory().available)
        return size
    from vllm.platforms import current_platform

    size = int(rollout.vllm.kv_cache_gib * GIB)
    if size:
        check_cache(size, one_response // rollout.vllm.tensor_parallel_size, length)
    check_gpu_memory(weights, one_response, rollout, current_platform.get_device_total_memory())
    return size


def response_cache_bytes(text_config: Any, dtype: str, max_tokens: int, block_size: int) -> int:
    """Return the bytes of a prompt with its response of full length, in whole blocks, plus one that vLLM reserves."""
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    width = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    token_bytes: int = 2 * text_config.num_hidden_layers * heads * width * getattr(torch, dtype).itemsize
    return (math.ceil(max_tokens / block_size) + 1) * block_size * token_bytes


def cpu_cache_bytes(one_response: int, rollout: RolloutConfig) -> int:
    """Return the bytes of the KV cache on CPU: as set, else for all responses at once, up to `CPU_CACHE_BYTES`."""
    if rollout.vllm.kv_cache_gib:
        return int(rollout.vllm.kv_cache_gib * GIB)
    return max(one_response, min(CPU_CACHE_BYTES, rollout.vllm.max_num_seqs * one_response))


def weight_bytes(model_path: str, dtype: str) -> int:
    """Return the bytes of a model folder's weights in `dtype`; 0 for a model that is not a local folder."""
    return sum(_tensor_bytes(model_path, dtype).values())


def check_bucket(model_path: str, rollout: RolloutConfig) -> None:
    """Refuse a tensor that no bucket of a weight sync on shared GPUs has room for; only a local folder is looked at."""
    sizes = _tensor_bytes(model_path, rollout.dtype)
    largest = max(sizes, key=lambda name: sizes[name], default="")
    mib = math.ceil(sizes.get(largest, 0) / 2**20)
    require(
        mib <= rollout.vllm.sync_bucket_mib,
        f"rollout.vllm.sync_bucket_mib={rollout.vllm.sync_bucket_mib} has no room for {largest} of {model_path}, which "
        f"has {mib} MiB in {rollout.dtype}. Set it to {mib} or more.",
    )


def _tensor_bytes(model_path: str, dtype: str) -> dict[str, int]:
    """Return the bytes of each tensor of a model folder in `dtype`; nothing for a model that is not a local folder."""
    itemsize, sizes = int(getattr(torch, dtype).itemsize), {}
    for file in Path(model_path).glob("*.safetensors"):
        with safetensors.safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                sizes[name] = math.prod(tensors.get_slice(name).get_shape()) * itemsize
    return sizes


def check_cache(num_bytes: int, one_response: int, max_tokens: int) -> None:
    """Refuse a KV cache that is too small for one response; the message names the smallest that works."""
    if num_bytes < one_response:
        digits = 1 - math.floor(math.log10(one_response / GIB))  # keep two significant digits, rounded up
        least = math.ceil(one_response / GIB * 10**digits) / 10**digits
        raise ConfigError(
            f"rollout.vllm.kv_cache_gib={num_bytes / GIB:.3g} is too small for one prompt with its response "
            f"({max_tokens:,} tokens, {one_response / GIB:.3g} GiB). Raise it to {least:g} or more, or lower "
            "inputs.max_prompt_tokens or rollout.max_response_tokens."
        )


def check_cpu_memory(weights: int, cache: int, available: int) -> None:
    """Refuse a start that needs more memory than is available; the message shows the sum. All in bytes."""
    needed = weights + cache + CPU_PROGRAM_BYTES
    if needed > available:
        raise ConfigError(
            f"vLLM needs {needed / GIB:.1f} GiB (weights {weights / GIB:.1f}, KV cache {cache / GIB:.1f}, its "
            f"processes {CPU_PROGRAM_BYTES / GIB:.1f}), but {available / GIB:.1f} GiB are free. Lower "
            "rollout.vllm.kv_cache_gib or rollout.num_workers, use a smaller model, or set rollout.engine=hf."
        )


def check_gpu_memory(weights: int, one_response: int, rollout: RolloutConfig, device_bytes: int) -> None:
    """Refuse weights and a cache that do not fit into the engine's share of each GPU; the message shows the sum.

    one_response: as `response_cache_bytes`; the smallest possible cache, split over GPUs like the weights.
    """
    vllm, degree = rollout.vllm, rollout.vllm.tensor_parallel_size
    cache = vllm.kv_cache_gib * GIB or one_response / degree
    share = 1.0 if vllm.kv_cache_gib else vllm.gpu_memory_utilization  # a given cache size overrides it
    if weights / degree + cache > share * device_bytes:
        key = "kv_cache_gib" if vllm.kv_cache_gib else "gpu_memory_utilization"
        raise ConfigError(
            f"vLLM needs {(weights / degree + cache) / GIB:.1f} GiB on each GPU (weights {weights / degree / GIB:.1f}, "
            f"KV cache {cache / GIB:.1f}) and working memory, but {share:g} of {device_bytes / GIB:.0f} GiB are "
            f"{share * device_bytes / GIB:.1f}. Change rollout.vllm.{key}, raise rollout.vllm.tensor_parallel_size, or "
            "lower inputs.max_prompt_tokens or rollout.max_response_tokens."
        )
