"""The calls that only GPUs make, against the interfaces of the installed vLLM: names alone; no engine starts."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import logging
import shutil
import warnings
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoConfig

pytest.importorskip("vllm", reason="vLLM is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch's compiler, which vLLM imports
    from vllm import AsyncEngineArgs
    from vllm.config.multimodal import MMCacheType
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector, AuxRequestOutput
    from vllm.distributed.weight_transfer import ipc_engine, nccl_common, packed_tensor
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import layerwise
    from vllm.model_executor.models.glm4 import Glm4DecoderLayer
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM

from rollout.config import ConfigError
from rollout.engine import EngineError
from rollout.families.glm4v import Glm4V
from rollout.vllm import launch
from rollout.vllm.launch import check_replay, child_environment, engine_arguments, model_overrides
from rollout.vllm.peers import Peer, Peers
from rollout.vllm.requests import split_experts
from rollout.vllm.weights_out import _IpcClient, init_infos, nccl_packing
from tests.rollout.parity import INPUTS, ROLLOUT


def recording_peers(calls: list[tuple[str, Any]], sizes: list[int]) -> list[Peer]:
    """Engines that note what they are called with."""

    def call(method: str, args: tuple[Any, ...]) -> Any:
        calls.append((method, args))
        return lambda timeout_s: None

    return [Peer(f"engine {index}", size, call) for index, size in enumerate(sizes)]


@pytest.mark.parametrize("degree", [1, 2])
def test_every_argument_of_an_engine_on_gpus_is_one_of_vllms(degree):
    vllm = dataclasses.replace(
        ROLLOUT.vllm, tensor_parallel_size=degree, sleep_level=1, engine_args={"block_size": 16, "enforce_eager": True}
    )
    rollout = dataclasses.replace(ROLLOUT, vllm=vllm)
    arguments = engine_arguments("m", rollout, INPUTS, cpu=False, backend="ipc", lora_rank=8, kv_cache_bytes=1 << 30)
    assert set(arguments) <= {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert arguments["enable_sleep_mode"]
    assert arguments.get("distributed_executor_backend") == ("mp" if degree == 2 else None)
    assert WeightTransferConfig(**arguments["weight_transfer_config"]).backend == "ipc"


def gpu_arguments(**vllm: Any) -> dict[str, Any]:
    rollout = dataclasses.replace(ROLLOUT, vllm=dataclasses.replace(ROLLOUT.vllm, **vllm))
    return engine_arguments("m", rollout, INPUTS, cpu=False, backend="ipc", lora_rank=0, kv_cache_bytes=0)


def test_long_prompts_are_prefilled_in_large_steps_unless_told_otherwise():
    assert gpu_arguments()["max_num_batched_tokens"] == 8192
    assert gpu_arguments(engine_args={"max_num_batched_tokens": 4096})["max_num_batched_tokens"] == 4096


def test_images_travel_through_shared_memory_where_it_has_room(monkeypatch):
    assert "shm" in get_args(MMCacheType)
    room = 8 * 4 * launch.GIB
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=room))
    assert gpu_arguments()["mm_processor_cache_type"] == "shm"
    assert gpu_arguments(engine_args={"mm_processor_cache_type": "lru"})["mm_processor_cache_type"] == "lru"
    assert "mm_processor_cache_type" not in gpu_arguments(engine_args={"mm_processor_cache_gb": 5})


def test_the_deeper_sleep_keeps_the_tower(attentive_model_path):
    arguments = gpu_arguments(sleep_level=2)
    [pattern] = arguments["sleep_preserve_parameter_names"]
    assert "sleep_preserve_parameter_names" not in gpu_arguments(sleep_level=1)
    assert "sleep_preserve_parameter_names" in {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    # vLLM matches so (v1/worker/gpu_worker.py), and refuses a pattern without a match.
    names = vllm_names(attentive_model_path)
    kept = fnmatch.filter(names, pattern)
    assert kept == [name for name in names if "language_model" not in name]


def vllm_names(path: str) -> list[str]:
    """Return the names that vLLM gives to a model's parameters."""
    with safe_open(f"{path}/model.safetensors", framework="pt") as weights:
        return list(Qwen2_5_VLForConditionalGeneration.hf_to_vllm_mapper.apply_list(list(weights.keys())))


def test_a_tower_that_is_not_sent_is_not_reported_at_every_sync():
    import rollout.vllm.weights_in  # noqa: F401

    assert not logging.getLogger(layerwise.__name__).isEnabledFor(logging.WARNING)


def test_the_transports_that_we_name_are_registered():
    import rollout.vllm.weights_in  # noqa: F401  (registers gloo)

    assert {"gloo", "ipc", "nccl"} <= set(WeightTransferEngineFactory._registry)


def test_each_engine_is_told_its_ranks_in_the_nccl_group():
    peers = Peers(recording_peers([], [2, 1, 2]), 5.0)
    meeting = {"master_address": "10.0.0.1", "master_port": 1234}
    arguments = init_infos(peers, meeting | nccl_packing(1 << 20))
    infos = [nccl_common.NCCLWeightTransferInitInfo(**info) for (info,) in arguments]
    assert [info.rank_offset for info in infos] == [1, 3, 4]  # rank 0 sends
    assert {(info.world_size, info.master_port, info.packed) for info in infos} == {(6, 1234, True)}
    assert {info.packed_buffer_size_bytes for info in infos} == {1 << 20}
    inspect.signature(nccl_common.trainer_init).bind(meeting)
    inspect.signature(packed_tensor.packed_nccl_broadcast_producer).bind(
        iterator=iter(()), group=None, src=0, post_iter_func=None, buffer_size_bytes=1
    )


def test_ipc_handles_reach_the_receiver_as_the_sender_made_them(monkeypatch):
    for key, value in child_environment(ROLLOUT.vllm, cpu=False, backend="ipc", num_threads=1).items():
        monkeypatch.setenv(key, value)
    calls: list[tuple[str, Any]] = []
    client = _IpcClient(Peers(recording_peers(calls, [1]), 5.0))
    handles = {"GPU-1": ("rebuild", 1, b"handle"), "GPU-2": ("rebuild", 2, b"other")}
    made = ipc_engine.IPCWeightTransferUpdateInfo(
        names=["a"], dtype_names=["float32"], shapes=[[2]], ipc_handles=handles, tensor_sizes=[8]
    )
    client.init_weight_transfer_engine({"packed": True})
    client.start_weight_update()
    client.update_weights(dataclasses.asdict(made))
    client.version = 7
    client.finish_weight_update()
    assert [method for method, _ in calls] == [
        "transfer_init", "transfer_start", "transfer_update", "transfer_finish",
    ]  # fmt: skip
    ipc_engine.IPCWeightTransferInitInfo(**calls[0][1][0])
    received = ipc_engine.IPCWeightTransferUpdateInfo(**calls[2][1][0])
    assert received == made
    assert calls[3][1] == (7,)


def test_the_ipc_sender_is_made_and_used_as_vllm_expects():
    engine = ipc_engine.IPCTrainerWeightTransferEngine
    info = ipc_engine.IPCTrainerInitInfo(rank=1, packed=True, packed_buffer_size_bytes=1 << 20)
    assert not info.is_sender
    inspect.signature(engine.trainer_init).bind(info, client=None, source=None)
    inspect.signature(engine.send_weights).bind(None)
    inspect.signature(engine.shutdown).bind(None)
    asked = {"init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"}
    assert asked <= {name for name in dir(_IpcClient) if not name.startswith("_")}


def test_sleeping_waking_and_pausing_are_called_as_vllm_has_them():
    inspect.signature(AsyncLLM.sleep).bind(None, 2, mode="wait")
    inspect.signature(AsyncLLM.wake_up).bind(None, ["kv_cache"])
    inspect.signature(AsyncLLM.pause_generation).bind(None, mode="wait", clear_cache=False)
    for method in ("resume_generation", "reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"):
        inspect.signature(getattr(AsyncLLM, method)).bind(None)
    inspect.signature(AsyncLLM.collective_rpc).bind(None, "receive_start", args=())


# Routing replay


def test_experts_are_asked_for_and_split_as_vllm_returns_them():
    replaying = dataclasses.replace(ROLLOUT, routing_replay=True)
    arguments = engine_arguments("m", replaying, INPUTS, cpu=False, backend="ipc", lora_rank=0, kv_cache_bytes=0)
    assert arguments["enable_return_routed_experts"] is True
    assert gpu_arguments()["enable_return_routed_experts"] is False
    # Of a prompt of 4 and a response of 3 tokens vLLM's scheduler accepts the rows of all but the last.
    request: Any = SimpleNamespace(request_id="r", num_tokens=7)
    rows = np.arange(8 * 2 * 1, dtype=np.uint8).reshape(8, 2, 1)
    connector = AuxOutputSchedulerConnector()
    accepted = connector.take_output(request, {"r": AuxRequestOutput(token_start=0, rows=rows)})
    completion = CompletionOutput(0, "", (1, 2, 3), None, None, routed_experts=accepted)
    prompt_experts_TLk, experts_RLk = split_experts(completion, 4, 7)
    np.testing.assert_array_equal(prompt_experts_TLk, rows[:4])
    np.testing.assert_array_equal(experts_RLk, rows[4:6])
    with pytest.raises(EngineError, match="experts of 6 tokens, not of 7"):
        split_experts(completion, 4, 8)
    assert split_experts(CompletionOutput(0, "", (1,), None, None), 4, 5) == (None, None)


def test_replay_is_refused_where_vllm_cannot_return_experts():
    replaying = dataclasses.replace(ROLLOUT, routing_replay=True)
    dense, mixture = AutoConfig.for_model("qwen3_vl"), AutoConfig.for_model("qwen3_vl_moe")
    check_replay(mixture, replaying, cpu=False)
    check_replay(AutoConfig.for_model("qwen3_5_moe"), replaying, cpu=False)
    with pytest.raises(ConfigError, match="qwen3_vl has no experts"):
        check_replay(dense, replaying, cpu=False)
    with pytest.raises(ConfigError, match="CPU build does not return experts"):
        check_replay(mixture, replaying, cpu=True)
    uncached = dataclasses.replace(ROLLOUT.vllm, engine_args={"enable_prefix_caching": False})
    with pytest.raises(ConfigError, match=r"Set rollout\.vllm\.engine_args\.enable_prefix_caching=true"):
        check_replay(mixture, dataclasses.replace(replaying, vllm=uncached), cpu=False)


def test_glm_is_told_of_its_biases_whatever_else_is_overridden():
    """Of a key that vLLM reads and transformers never writes; without it the biases are skipped in silence."""
    assert model_overrides(Glm4V(), {}) == {"text_config": {"attention_bias": True}}
    given = {"text_config": {"rope_theta": 5}, "x": 1}
    assert model_overrides(Glm4V(), given) == {"text_config": {"attention_bias": True, "rope_theta": 5}, "x": 1}
    assert "attention_bias" in inspect.getsource(Glm4DecoderLayer)
