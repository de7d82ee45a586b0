"""Gather the learner's weights, whole and one at a time, and export them as a Hugging Face folder.

Gathering is collective: every rank must iterate to the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from transformers import AutoProcessor

from rollout.config import InputsConfig
from rollout.families import family_of
from rsgrpo.config.learner import LoraConfig, ModelConfig
from rsgrpo.learning.fsdp import whole
from rsgrpo.learning.layers.four_bits import FourBitLinear
from rsgrpo.learning.policy import Policy, hub_options
from rsgrpo.learning.state import require_room

_SHARD_BYTES = 4 << 30


def full_weights(
    policy: Policy, *, with_vision: bool, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, whole tensor) in the model's own order, adapters merged in float32; tied weights come once.

    Tensors have the layout of published checkpoints, names are the model's own.

    Every rank yields; a tensor is dropped before the next is gathered.
    """
    tower = {id(parameter) for parameter in policy.family.vision_tower(policy.hf).parameters()}
    scalings = _lora_scalings(policy.hf)
    parameters = dict(policy.hf.named_parameters())
    for name, parameter in parameters.items():
        layer = name.removesuffix(".lora_A.default.weight")
        if layer != name and isinstance(base := policy.hf.get_submodule(f"{layer}.base_layer"), FourBitLinear):
            up, down = parameters[f"{layer}.lora_B.default.weight"], parameter
            merged = base.weight + scalings[layer] * (_full(up) @ _full(down))
            yield f"{layer}.weight", policy.family.published(f"{layer}.weight", merged.to(dtype))
        if ".lora_" in name or (id(parameter) in tower and not with_vision):
            continue
        layer = name.removesuffix(".base_layer.weight")
        if layer in scalings and layer != name:
            up, down = parameters[f"{layer}.lora_B.default.weight"], parameters[f"{layer}.lora_A.default.weight"]
            full = (_full(parameter) + scalings[layer] * (_full(up) @ _full(down))).to(dtype)
        else:
            full = _full(parameter, dtype)
        yield name.replace(".base_layer.", "."), policy.family.published(name, full)


def adapter_weights(policy: Policy, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name in peft's saved form, whole tensor) of every adapter; every rank yields."""
    for name, parameter in policy.hf.named_parameters():
        if ".lora_" in name:
            yield f"base_model.model.{name.replace('.default.', '.')}", _full(parameter, dtype)


def adapter_config(lora: LoraConfig) -> dict[str, Any]:
    """Return peft's adapter_config of adapters."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "bias": "none",
    }


def _full(parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a whole tensor in `dtype`; shards travel in the smaller of it and their own, which rounds alike."""
    shard = parameter.detach()
    return whole(shard.to(dtype) if dtype.itemsize < shard.dtype.itemsize else shard).to(dtype)


def _lora_scalings(model: nn.Module) -> dict[str, float]:
    """Return module name -> alpha / rank of every layer with an adapter."""
    return {
        name: float(module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
    }


def export_folder(
    policy: Policy, model: ModelConfig, inputs: InputsConfig, folder: Path, *, dtype: torch.dtype | None
) -> None:
    """Write weights, configuration, tokenizer and processor so that transformers and vLLM load the folder.

    The processor resizes to the pixel limits of training, so that whoever loads the folder sees the same pages.
    Collective. Rank 0 holds at most one shard of the weights besides its own.

    dtype: of the floating-point weights; None keeps float32.
    """
    is_writer = dist.get_rank() == 0
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
        require_room(folder, _num_bytes(policy, dtype or torch.float32), "an export")
        _write_configs(policy.hf, model, inputs, folder, dtype or torch.float32)
    shard: dict[str, torch.Tensor] = {}
    shard_bytes = 0
    shards: list[list[str]] = []
    total_bytes = 0
    for name, full in full_weights(policy, with_vision=True):
        if not is_writer:
            continue
        tensor = full.to("cpu", dtype or full.dtype).contiguous()
        num_bytes = tensor.numel() * tensor.element_size()
        if shard and shard_bytes + num_bytes > _SHARD_BYTES:
            shards.append(_write_shard(shard, folder, len(shards)))
            shard, shard_bytes = {}, 0
        shard[policy.family.checkpoint_name(name)] = tensor
        shard_bytes += num_bytes
        total_bytes += num_bytes
    if is_writer:
        shards.append(_write_shard(shard, folder, len(shards)))
        _name_shards(folder, shards, total_bytes)
    dist.barrier()


def _num_bytes(policy: Policy, dtype: torch.dtype) -> int:
    sizes = [parameter.numel() for name, parameter in policy.hf.named_parameters() if ".lora_" not in name]
    packed = [m.in_features * m.out_features for m in policy.hf.modules() if isinstance(m, FourBitLinear)]
    return int(dtype.itemsize * (sum(sizes) + sum(packed)))


def _write_shard(shard: dict[str, torch.Tensor], folder: Path, index: int) -> list[str]:
    path = folder / f"shard-{index}.safetensors"
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes files that only their owner can read
    return list(shard)


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give the shards the names that transformers looks for, now that their number is known."""
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index_json = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2), encoding="utf-8")


def _write_configs(hf: Any, model: ModelConfig, inputs: InputsConfig, folder: Path, dtype: torch.dtype) -> None:
    hf.config.save_pretrained(folder)
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config |= {"dtype": str(dtype).removeprefix("torch."), "architectures": [type(hf).__name__]}
    config_path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    hf.generation_config.save_pretrained(folder)
    load_processor: Any = AutoProcessor.from_pretrained
    processor = load_processor(model.path, **hub_options(model))
    family = family_of(hf.config.model_type)
    for name, limit in family.limits(processor.image_processor, inputs.min_pixels, inputs.max_pixels).items():
        setattr(processor.image_processor, name, limit)
    processor.save_pretrained(folder)
    # transformers 5 writes processor_config.json only; older tools look for preprocessor_config.json.
    processor.image_processor.save_pretrained(folder)
