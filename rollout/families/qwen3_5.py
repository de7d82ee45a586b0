"""Qwen3.5 and Qwen3.6, dense and as mixtures of experts.

Three of four decoder layers carry a recurrent state (gated delta rule), one attends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from rollout.families.qwen2_vl import Qwen2VL

# What a layer with a state has in the place of the attention's projections.
_IN_PLACE_OF = {"q_proj": "in_proj_qkv", "v_proj": "in_proj_z", "o_proj": "out_proj"}


class Qwen35(Qwen2VL):
    """The adapter of transformers' `qwen3_5`."""

    model_type = "qwen3_5"
    stamps_frames = True
    no_mask: ClassVar[dict[str, Any]] = {"attention_mask": {"full_attention": None, "linear_attention": None}}
    layer_kinds = frozenset({"full_attention", "linear_attention"})
    template_options: ClassVar[dict[str, Any]] = {"enable_thinking": False}

    def recurrent_layers(self, model: Any) -> Sequence[nn.Module]:
        layers: list[Any] = list(self.decoder_layers(model))
        return [layer.linear_attn for layer in layers if hasattr(layer, "linear_attn")]

    def checkpoint_name(self, name: str) -> str:
        return name

    def adapted_names(self, targets: Sequence[str]) -> list[str]:
        return [*targets, *(_IN_PLACE_OF[target] for target in targets if target in _IN_PLACE_OF)]


class Qwen35Moe(Qwen35):
    """The adapter of transformers' `qwen3_5_moe`. LoRA adapts the expert that all tokens share, not the others."""

    model_type = "qwen3_5_moe"
