"""Qwen2-VL and Qwen2.5-VL, every size: features replace the embeddings of image tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from rollout.families.base import Family
from rollout.families.windows import WINDOWS


class Qwen2VL(Family):
    """The adapter of transformers' `qwen2_vl`."""

    model_type = "qwen2_vl"
    # A mask per kind of layer is taken as it is.
    no_mask: ClassVar[dict[str, Any]] = {"attention_mask": {"full_attention": None}}

    def checkpoint_name(self, name: str) -> str:
        if name.startswith(self.language_prefix):
            return "model." + name.removeprefix(self.language_prefix)
        return name.removeprefix("model.") if name.startswith(self.vision_prefixes) else name


class Qwen25VL(Qwen2VL):
    """The adapter of transformers' `qwen2_5_vl`: most blocks of the tower attend within windows."""

    model_type = "qwen2_5_vl"

    def attend_by(self, model: Any, attention: str) -> Any:
        tower: Any = self.vision_tower(model)
        tower.config._attn_implementation = WINDOWS
        return super().attend_by(model, attention)
