"""Frozen weights under adapters in 4 bits (QLoRA), by bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from rsgrpo.errors import RsgrpoError


class FourBitLinear(nn.Module):
    """A frozen linear layer whose weight is in 4 bits: NF4 in blocks of 64 (QLoRA, arXiv:2305.14314)."""

    packed: torch.Tensor
    largest: torch.Tensor
    code: torch.Tensor

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        from bitsandbytes.functional import quantize_4bit

        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        packed, state = quantize_4bit(linear.weight.detach().to(device), quant_type="nf4", blocksize=64)
        # Buffers: in no optimiser, checkpoint or shard.
        for name, tensor in (("packed", packed), ("largest", state.absmax), ("code", state.code)):
            self.register_buffer(name, tensor, persistent=False)

    def _state(self, dtype: torch.dtype) -> Any:
        from bitsandbytes.functional import QuantState

        shape = torch.Size((self.out_features, self.in_features))
        return QuantState(self.largest, shape, code=self.code, blocksize=64, quant_type="nf4", dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Multiply in the dtype of `hidden`, (..., in_features)."""
        from bitsandbytes import matmul_4bit

        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        output: torch.Tensor = matmul_4bit(hidden, self.packed, self._state(hidden.dtype), bias=bias)
        return output

    @property
    def weight(self) -> torch.Tensor:
        """The weight as the layer uses it, float32."""
        from bitsandbytes.functional import dequantize_4bit

        weight: torch.Tensor = dequantize_4bit(self.packed, self._state(torch.float32))
        return weight


def pack_base(model: Any, device: torch.device) -> None:
    """Keep the weights under a model's adapters in 4 bits, in place."""
    adapted: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    for module in adapted:
        module.base_layer = FourBitLinear(module.base_layer, device)


def require_packing(device: torch.device, world_size: int) -> None:
    """Raise RsgrpoError where the frozen base of adapters cannot be kept in 4 bits."""
    where = f"the device is {device.type} and learner.num_ranks is {world_size}"
    if device.type != "cuda" or world_size > 1:
        raise RsgrpoError(
            f"model.lora.base_bits=4 needs CUDA and learner.num_ranks=1, but {where}. Set model.lora.base_bits=16"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RsgrpoError(
            "model.lora.base_bits=4 needs bitsandbytes, which is not installed. Run pip install bitsandbytes, or "
            "set model.lora.base_bits=16"
        )
