"""Qwen3-VL, dense and mixtures: features from several depths of the tower enter the first decoder layers."""

from __future__ import annotations

from typing import Any

import torch

from rollout.families.base import Family


class Qwen3VL(Family):
    """The adapter of transformers' `qwen3_vl`.

    Features of an image token are the merger's output and one more of the same width per DeepStack layer, side by side.
    """

    model_type = "qwen3_vl"
    reads_videos = True
    stamps_frames = True

    def image_features(self, model: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        output = self._run_tower(model, pixel_values, image_grid_thw)
        return torch.cat([output.pooler_output, *output.deepstack_features], -1)

    def language_inputs(self, model: Any, token_ids_BT: torch.Tensor, features: torch.Tensor | None) -> dict[str, Any]:
        embeds_BTH = model.get_input_embeddings()(token_ids_BT)
        if features is None:
            return {"inputs_embeds": embeds_BTH}
        is_image_BT = self.vision_kinds(model, token_ids_BT) > 0
        merged, *deeper = torch.split(features.to(embeds_BTH.dtype), embeds_BTH.shape[-1], -1)
        return {
            "inputs_embeds": embeds_BTH.masked_scatter(is_image_BT[..., None], merged),
            "visual_pos_masks": is_image_BT,
            "deepstack_visual_embeds": deeper,
        }


class Qwen3VLMoe(Qwen3VL):
    """The adapter of transformers' `qwen3_vl_moe`; published checkpoints hold its experts' matrices transposed."""

    model_type = "qwen3_vl_moe"

    def published(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        is_expert = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        return tensor.transpose(1, 2).contiguous() if is_expert else tensor
