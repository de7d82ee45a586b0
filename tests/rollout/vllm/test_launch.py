"""What vLLM takes of memory, by hand; needs no vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from rollout.config import ConfigError, RolloutConfig, VllmConfig
from rollout.vllm.launch import (
    GIB,
    check_bucket,
    check_cache,
    check_cpu_memory,
    check_gpu_memory,
    cpu_cache_bytes,
    response_cache_bytes,
    weight_bytes,
)
from tests.rollout.parity import reference_model

# The demo's decoder: 4 layers, 2 heads of 32 for keys and as many for values.
DEMO = SimpleNamespace(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=128)
SEVEN_B = SimpleNamespace(num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, hidden_size=3584)


def rollout(**vllm):
    return RolloutConfig(engine="vllm", vllm=VllmConfig(**vllm))


def test_a_token_takes_keys_and_values_in_every_layer():
    def token_bytes(config, dtype):
        return response_cache_bytes(config, dtype, max_tokens=1, block_size=1) // 2  # one block is vLLM's own

    assert token_bytes(DEMO, "float32") == 2 * 4 * 64 * 4
    assert token_bytes(SEVEN_B, "bfloat16") == 57_344
    assert token_bytes(SimpleNamespace(**vars(DEMO), head_dim=64), "float32") == 2 * 4 * 128 * 4


def test_a_response_takes_whole_blocks_and_one_more():
    # 384 tokens are 12 blocks of 32, 385 are 13.
    assert response_cache_bytes(DEMO, "float32", 384, 32) == 13 * 32 * 2048
    assert response_cache_bytes(DEMO, "float32", 385, 32) == 14 * 32 * 2048


def test_the_cache_on_cpu_is_what_all_responses_need_within_one_gib():
    one = 13 * 32 * 2048
    assert cpu_cache_bytes(one, rollout()) == 256 * one  # 208 MiB
    assert cpu_cache_bytes(one, rollout(engine_args={"max_num_seqs": 8})) == 8 * one
    assert cpu_cache_bytes(20 << 20, rollout()) == GIB
    assert cpu_cache_bytes(3 * GIB, rollout()) == 3 * GIB
    assert cpu_cache_bytes(one, rollout(kv_cache_gib=0.5)) == GIB // 2


def test_weights_are_counted_in_the_files_and_taken_in_the_engines_type(tiny_model_path):
    total = sum(parameter.numel() for parameter in reference_model(tiny_model_path).parameters())
    assert weight_bytes(tiny_model_path, "float32") == 4 * total
    assert weight_bytes(tiny_model_path, "bfloat16") == 2 * total
    assert weight_bytes("Qwen/Qwen2.5-VL-7B-Instruct", "bfloat16") == 0


def test_a_cache_too_small_names_the_least_that_works():
    check_cache(GIB, GIB, 4096)
    with pytest.raises(ConfigError, match=r"kv_cache_gib=0\.5 .*\(4,096 tokens, 1\.23 GiB\)\. Raise it to 1\.3 or"):
        check_cache(GIB // 2, int(1.23 * GIB), 4096)


def test_memory_that_is_not_free_is_shown_with_its_parts():
    check_cpu_memory(GIB, GIB, int(3.5 * GIB))
    with pytest.raises(
        ConfigError, match=r"needs 3\.5 GiB \(weights 1\.0, KV cache 1\.0.*1\.5\), but 3\.4 GiB are free"
    ):
        check_cpu_memory(GIB, GIB, int(3.4 * GIB))


def test_weights_and_one_response_must_fit_into_the_engines_share_of_a_gpu():
    one = response_cache_bytes(SEVEN_B, "bfloat16", 16_536, 16)
    weights = 2 * 8_292_166_656
    check_gpu_memory(weights, one, rollout(gpu_memory_utilization=0.3), 80 * GIB)
    with pytest.raises(ConfigError, match=r"needs 16\.3 GiB .*15\.4, .*0\.9\).* 0\.2 of 80 GiB are 16\.0\. Change"):
        check_gpu_memory(weights, one, rollout(gpu_memory_utilization=0.2), 80 * GIB)
    check_gpu_memory(weights, one, rollout(gpu_memory_utilization=0.2, tensor_parallel_size=2), 80 * GIB)
    check_gpu_memory(weights, one, rollout(gpu_memory_utilization=0.2, kv_cache_gib=8), 80 * GIB)
    with pytest.raises(ConfigError, match=r"1 of 24 GiB are 24\.0\. Change rollout.vllm.kv_cache_gib"):
        check_gpu_memory(weights, one, rollout(kv_cache_gib=12), 24 * GIB)


def test_a_tensor_larger_than_a_bucket_is_refused_with_its_name_and_size(tmp_path):
    tensors = {"embed.weight": torch.zeros(3 * 2**19), "norm.weight": torch.zeros(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    room = RolloutConfig(dtype="bfloat16", vllm=VllmConfig(sync_bucket_mib=3))
    check_bucket(str(tmp_path), room)
    check_bucket("some/hub-id", room)
    with pytest.raises(ConfigError, match=r"sync_bucket_mib=2 has no room for embed.weight of .*3 MiB in bfloat16"):
        check_bucket(str(tmp_path), RolloutConfig(dtype="bfloat16", vllm=VllmConfig(sync_bucket_mib=2)))
