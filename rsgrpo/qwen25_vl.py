"""Qwen2.5-VL, every size: where its parts are, how its positions run, how image features enter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Qwen25VL:
    """The adapter of transformers' `qwen2_5_vl` (see rsgrpo.families.Family)."""

    def language_model(self, model: Any) -> Any:
        return model.model.language_model

    def vision_tower(self, model: Any) -> nn.Module:
        return model.model.visual

    def decoder_layers(self, model: Any) -> Sequence[nn.Module]:
        return list(model.model.language_model.layers)

    def vision_blocks(self, model: Any) -> Sequence[nn.Module]:
        return list(model.model.visual.blocks)

    def position_ids(self, model: Any, token_ids_T: torch.Tensor, image_grid_thw: torch.Tensor | None) -> torch.Tensor:
        kinds = (token_ids_T == model.config.image_token_id).int()
        positions, _ = model.model.get_rope_index(
            token_ids_T[None], mm_token_type_ids=kinds[None], image_grid_thw=image_grid_thw
        )
        return positions[:, 0]

    def image_features(self, model: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        tower = model.model.visual
        return tower(pixel_values.to(tower.patch_embed.proj.weight.dtype), grid_thw=image_grid_thw).pooler_output

    def blank_image(self, model: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        config = model.config.vision_config
        merge = config.spatial_merge_size
        patch_dim = config.in_channels * config.temporal_patch_size * config.patch_size**2
        return torch.zeros(merge**2, patch_dim, device=device), torch.tensor([[1, merge, merge]], device=device)

    def language_inputs(self, model: Any, token_ids_T: torch.Tensor, features: torch.Tensor | None) -> dict[str, Any]:
        embeds_TH = model.model.language_model.embed_tokens(token_ids_T)
        if features is not None:
            is_image_T1 = (token_ids_T == model.config.image_token_id)[:, None]
            embeds_TH = embeds_TH.masked_scatter(is_image_T1, features.to(embeds_TH.dtype))
        # A mask given by kind of layer is taken as it is: none is built.
        return {"inputs_embeds": embeds_TH[None], "attention_mask": {"full_attention": None}}

    def checkpoint_name(self, name: str) -> str:
        if name.startswith("model.language_model."):
            return "model." + name.removeprefix("model.language_model.")
        return name.removeprefix("model.") if name.startswith("model.visual.") else name
