"""Qwen3-VL: as Qwen2.5-VL, and features of several depths of the tower enter the first decoder layers (DeepStack)."""

from __future__ import annotations

from typing import Any

import torch

from rollout.families.base import Family


class Qwen3VL(Family):
    """The adapter of transformers' `qwen3_vl`.

    Features of an image token are the merger's output and one more of the same width per DeepStack layer, side by side.
    """

    def image_features(self, model: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        output = self._run_tower(model, pixel_values, image_grid_thw)
        return torch.cat([output.pooler_output, *output.deepstack_features], -1)

    def language_inputs(self, model: Any, token_ids_T: torch.Tensor, features: torch.Tensor | None) -> dict[str, Any]:
        # transformers builds no mask for an attention function that registers none.
        embeds_TH = model.model.language_model.embed_tokens(token_ids_T)
        if features is None:
            return {"inputs_embeds": embeds_TH[None]}
        is_image_T = token_ids_T == model.config.image_token_id
        merged, *deeper = features.to(embeds_TH.dtype).split(embeds_TH.shape[-1], -1)
        return {
            "inputs_embeds": embeds_TH.masked_scatter(is_image_T[:, None], merged)[None],
            "visual_pos_masks": is_image_T[None],
            "deepstack_visual_embeds": deeper,
        }
