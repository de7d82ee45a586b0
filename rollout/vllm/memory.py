"""What vLLM will take of a device's memory: weights and KV cache; arithmetic on a model's config and the settings.

Refuses what cannot fit before any process starts: vLLM would say it from the depths of a child process.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import safetensors
import torch

from rollout.config import ConfigError, RolloutConfig

GIB = 2**30
CPU_CACHE_BYTES = 1 * GIB
"""The most that an engine on CPU takes for its KV cache unless it is told, or a single response needs more."""
CPU_PROGRAM_BYTES = int(1.5 * GIB)
"""What vLLM's two processes hold on CPU beside weights and cache (measured with a model of 2 M parameters)."""


def cache_bytes_per_token(text_config: Any, dtype: str) -> int:
    """Return the bytes of one token's keys and values in all layers, over all devices of the engine."""
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    width = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return 2 * text_config.num_hidden_layers * heads * width * getattr(torch, dtype).itemsize


def response_cache_bytes(text_config: Any, dtype: str, max_tokens: int, block_size: int) -> int:
    """Return the bytes of a prompt with its response of full length, in whole blocks and one of vLLM's own."""
    blocks = math.ceil(max_tokens / block_size) + 1
    return blocks * block_size * cache_bytes_per_token(text_config, dtype)


def cpu_cache_bytes(one_response: int, rollout: RolloutConfig) -> int:
    """Return the KV cache on CPU: as set, else what all responses at once need, within `CPU_CACHE_BYTES`."""
    if rollout.vllm.kv_cache_gib:
        return int(rollout.vllm.kv_cache_gib * GIB)
    return max(one_response, min(CPU_CACHE_BYTES, rollout.vllm.max_num_seqs * one_response))


def weight_bytes(model_path: str, dtype: str) -> int:
    """Return the bytes of a model folder's weights in `dtype`; 0 for a model that is not a local folder."""
    num_elements = 0
    for file in Path(model_path).glob("*.safetensors"):
        with safetensors.safe_open(file, framework="pt") as tensors:
            num_elements += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return num_elements * getattr(torch, dtype).itemsize


def check_cache(cache_bytes: int, one_response: int, max_tokens: int) -> None:
    """Refuse a KV cache that was set too small for one response.

    Raises:
        ConfigError: names the least size.
    """
    if cache_bytes < one_response:
        raise ConfigError(
            f"rollout.vllm.kv_cache_gib={cache_bytes / GIB:.3g} does not hold one prompt with its response "
            f"({max_tokens:,} tokens, {one_response / GIB:.3g} GiB): raise it to {_rounded_up(one_response / GIB):g} "
            "or more, or lower inputs.max_prompt_tokens or rollout.max_response_tokens"
        )


def check_cpu_memory(weights: int, cache_bytes: int, available: int) -> None:
    """Refuse a start that would not fit into the memory that is free.

    Raises:
        ConfigError: shows the sum.
    """
    needed = weights + cache_bytes + CPU_PROGRAM_BYTES
    if needed > available:
        raise ConfigError(
            f"vLLM needs {needed / GIB:.1f} GiB (weights {weights / GIB:.1f}, KV cache {cache_bytes / GIB:.1f}, its "
            f"processes {CPU_PROGRAM_BYTES / GIB:.1f}), {available / GIB:.1f} GiB are free: lower "
            "rollout.vllm.kv_cache_gib or rollout.num_workers, take a smaller model, or use rollout.engine=hf"
        )


def check_gpu_memory(weights: int, one_response: int, rollout: RolloutConfig, device_bytes: int) -> None:
    """Refuse weights and a cache that cannot fit into what the engine may take of each GPU.

    one_response: as `response_cache_bytes`; the least cache, split like the weights.

    Raises:
        ConfigError: shows the sum.
    """
    vllm, degree = rollout.vllm, rollout.vllm.tensor_parallel_size
    cache = vllm.kv_cache_gib * GIB or one_response / degree
    share = 1.0 if vllm.kv_cache_gib else vllm.gpu_memory_utilization  # vLLM asks no share where the cache is given
    if weights / degree + cache > share * device_bytes:
        key = "kv_cache_gib" if vllm.kv_cache_gib else "gpu_memory_utilization"
        raise ConfigError(
            f"vLLM needs {(weights / degree + cache) / GIB:.1f} GiB on each GPU (weights {weights / degree / GIB:.1f}, "
            f"KV cache {cache / GIB:.1f}) and working memory; {share:g} of {device_bytes / GIB:.0f} GiB are "
            f"{share * device_bytes / GIB:.1f}: change rollout.vllm.{key}, raise rollout.vllm.tensor_parallel_size, or "
            "lower inputs.max_prompt_tokens or rollout.max_response_tokens"
        )


def _rounded_up(gib: float) -> float:
    """Return a value of two digits that is not below `gib`."""
    digits = 1 - math.floor(math.log10(gib))
    return math.ceil(gib * 10**digits) / 10**digits
