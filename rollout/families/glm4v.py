"""GLM-4.1V, dense: patches and M-RoPE as Qwen2-VL has them; a response ends where the next turn of a user begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from rollout.families.base import Family, TowerShape


class Glm4V(Family):
    """The adapter of transformers' `glm4v`.

    The gate and the upper half of a layer's MLP are one matrix, `gate_up_proj`, and so is their LoRA adapter.
    """

    model_type = "glm4v"
    vision_tokens = (
        "<|image|>", "<|begin_of_image|>", "<|end_of_image|>", "<|video|>", "<|begin_of_video|>", "<|end_of_video|>"
    )  # fmt: skip
    turn_tokens = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    end_token = "<|user|>"
    # transformers' layers always have these biases; without the key vLLM would skip them in silence.
    engine_config: ClassVar[dict[str, dict[str, Any]]] = {"text_config": {"attention_bias": True}}
    template_options: ClassVar[dict[str, Any]] = {"enable_thinking": False}

    def limits(self, image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        """An image counts as `temporal_patch_size` frames, and the processor's limit is over all of them."""
        frames = image_processor.temporal_patch_size
        return super().limits(image_processor, frames * min_pixels, frames * max_pixels)

    def tower_shape(self, model: Any) -> TowerShape:
        return replace(super().tower_shape(model), merger=("merger", "downsample"))

    def adapted_names(self, targets: Sequence[str]) -> list[str]:
        fused = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
        return list(dict.fromkeys(fused.get(target, target) for target in targets))
