"""The engines' side of a weight sync; `rollout.vllm.weights_out` lists its steps.

vLLM's worker processes load this module by name (`worker_extension_cls`); importing it registers the gloo transport.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from rollout.vllm.wire import GlooGroup, HeldChecksum, checksum

if TYPE_CHECKING:
    from vllm.config import VllmConfig as EngineConfig

_EXPERTS = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}
"""Matrices of all experts of a layer: the published name -> vLLM's."""


@dataclass
class GlooInit(WeightTransferInitInfo):  # type: ignore[misc,unused-ignore]
    """Where this engine's workers meet the sender; `rank_offset` is the rank of the engine's first worker."""

    address: str
    port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):  # type: ignore[misc,unused-ignore]
    """The tensors of one bucket, as `wire.layout_of` describes them."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooReceiver(WeightTransferEngine[GlooInit, GlooUpdate]):  # type: ignore[misc,unused-ignore]
    """Receives buckets of checkpoint-format weights by broadcast over gloo."""

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate
    group: GlooGroup | None = None
    kernels: Sequence[tuple[Any, Any]] = ()

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        rank = init_info.rank_offset + self.parallel_config.rank
        self.group = GlooGroup.join(
            init_info.address, init_info.port, rank, init_info.world_size, timeout_s=init_info.timeout_s
        )

    def start_weight_update(self) -> None:
        self.kernels = forget_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive one bucket; the base class would wait for an accelerator that a CPU does not have."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdate) -> None:
        if self.group is None:
            raise RuntimeError("weights arrive before init_transfer_engine")
        model: Any = self.model
        model.load_weights(self.group.receive(update_info.names, update_info.dtype_names, update_info.shapes))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        restore_kernels(self.kernels)

    def shutdown(self) -> None:
        self.group = None


class WeightReceiver:
    """Mixed into vLLM's worker class; its methods are called by name through `collective_rpc`."""

    if TYPE_CHECKING:
        vllm_config: EngineConfig
        model_runner: Any

    kernels: Sequence[tuple[Any, Any]] = ()

    def receive_start(self) -> None:
        """Expect weights in checkpoint format, by `receive_chunk`."""
        self.kernels = forget_kernels(self.model_runner.get_model())
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.get_model())

    def receive_chunk(self, chunk: bytes) -> None:
        """Load some tensors, serialised by safetensors. A layer may be spread over several chunks."""
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(iter(safetensors.torch.load(chunk).items()))

    def receive_finish(self) -> None:
        """Use the loaded weights."""
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model_runner.get_model(), self.vllm_config.model_config)
        restore_kernels(self.kernels)
        self.model_runner.reset_lora_state()

    def missing_parts(self, names: list[str]) -> list[str]:
        """Return what is missing from the layers of which `names` contains a part."""
        model = self.model_runner.get_model()
        parameters = _parameters(model)
        came = _names_by_parameter(names, model, parameters)
        touched = {held_by.rpartition(".")[0] for held_by in came}
        missing = []
        for held_by in parameters:
            layer = held_by.rpartition(".")[0]
            if layer in touched:
                whole = layer.rpartition(".")[2]
                parts = model.packed_modules_mapping.get(whole, [whole])
                segments = {segment for name in came.get(held_by, ()) for segment in name.split(".")}
                if whole not in segments and not (whole == "routed_experts" and segments):
                    missing += [f"{held_by} ({part})" for part in parts if part not in segments]
        return missing

    def resident_checksums(self, names: list[str]) -> list[HeldChecksum]:
        """Return the checksum of each parameter that holds any of `names` (Hugging Face names).

        A parameter that vLLM has repacked for its kernels (linear weights on CPU) has 0 elements here.
        """
        model = self.model_runner.get_model()
        parameters = _parameters(model)
        held = _names_by_parameter(names, model, parameters)
        return [(hf_names, *checksum(parameters[held_by])) for held_by, hf_names in held.items()]


def forget_kernels(model: Any) -> list[tuple[Any, Any]]:
    """On CPU, let vLLM pack the experts of an update as it packs those that it loads; return what was forgotten.

    vLLM 0.32 packs them for its CPU kernel only while a layer has no kernel yet (`UnquantizedFusedMoEMethod.
    _setup_kernel`). After an update it would read unpacked matrices as packed ones, or refuse a width that it had
    padded.
    """
    if not current_platform.is_cpu():
        return []
    methods: list[Any] = [getattr(layer, "quant_method", None) for layer in model.modules()]
    kernels = [(method, method.moe_kernel) for method in methods if getattr(method, "moe_kernel", None) is not None]
    for method, _ in kernels:
        method.moe_kernel = None
    return kernels


def restore_kernels(kernels: Iterable[tuple[Any, Any]]) -> None:
    """Give layers to which the update sent no experts their kernels back."""
    for method, kernel in kernels:
        if method.moe_kernel is None:
            method.moe_kernel = kernel


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    """Return the model's parameters by the names that they have without adapters."""
    return {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}


def _names_by_parameter(names: Iterable[str], model: Any, parameters: dict[str, Any]) -> dict[str, list[str]]:
    """Return vLLM parameter -> the Hugging Face names that it holds; names that the model lacks are left out."""
    fused = {part: whole for whole, parts in model.packed_modules_mapping.items() for part in parts}
    held: dict[str, list[str]] = {}
    for name in names:
        for mapped in model.hf_to_vllm_mapper.apply_list([name]):
            layer, _, part = mapped.rpartition(".experts.")
            if part in _EXPERTS:
                mapped = f"{layer}.experts.routed_experts.{_EXPERTS[part]}"
            whole = ".".join(fused.get(segment, segment) for segment in mapped.split("."))
            held_by = mapped if mapped in parameters else whole
            if held_by in parameters:
                held.setdefault(held_by, []).append(name)
    return held


# A frozen tower is in no sync, and vLLM would warn about each of its layers in every worker at every sync;
# `missing_parts` finds layers that came in part.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
WeightTransferEngineFactory.register_engine("gloo", GlooReceiver)
