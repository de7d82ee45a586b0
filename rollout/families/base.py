"""What a model family is to the learner, and how Qwen's vision-language models do it where they do it alike.

Knows transformers' modules; nothing of sharding or losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Family:
    """The adapter of one model family; `model` is always transformers' own `...ForConditionalGeneration`.

    A family overrides what it does otherwise. `language_inputs` is the only method that each must write.
    """

    def language_model(self, model: Any) -> Any:
        """Return the decoder without its head; its config carries `_attn_implementation`."""
        return model.model.language_model

    def vision_tower(self, model: Any) -> nn.Module:
        """Return the vision tower with its merger."""
        return model.model.visual

    def decoder_layers(self, model: Any) -> Sequence[nn.Module]:
        """Return the layers that are sharded one by one."""
        return list(self.language_model(model).layers)

    def vision_blocks(self, model: Any) -> Sequence[nn.Module]:
        """Return the tower's blocks, sharded one by one when the tower is trained."""
        return list(model.model.visual.blocks)

    def position_ids(self, model: Any, token_ids_T: torch.Tensor, image_grid_thw: torch.Tensor | None) -> torch.Tensor:
        """Return the prompt's (3, T) positions; a response goes on from their maximum + 1."""
        kinds = (token_ids_T == model.config.image_token_id).int()
        positions, _ = model.model.get_rope_index(
            token_ids_T[None], mm_token_type_ids=kinds[None], image_grid_thw=image_grid_thw
        )
        return positions[:, 0]

    def image_features(self, model: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Return (merged tokens of all images, F): everything that the tower gives to the decoder."""
        return self._run_tower(model, pixel_values, image_grid_thw).pooler_output

    def blank_image(self, model: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pixels and grid of the smallest image that the tower takes."""
        config = model.config.vision_config
        merge = config.spatial_merge_size
        patch_dim = config.in_channels * config.temporal_patch_size * config.patch_size**2
        return torch.zeros(merge**2, patch_dim, device=device), torch.tensor([[1, merge, merge]], device=device)

    def language_inputs(self, model: Any, token_ids_T: torch.Tensor, features: torch.Tensor | None) -> dict[str, Any]:
        """Return the decoder's keyword arguments for one row: embeddings, mask, and what the family adds.

        features: (image tokens, F); None without images.
        """
        raise NotImplementedError

    def checkpoint_name(self, name: str) -> str:
        """Return the name that the hub's checkpoints use for parameter `name`."""
        return name

    def _run_tower(self, model: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> Any:
        tower: Any = self.vision_tower(model)
        return tower(pixel_values.to(tower.patch_embed.proj.weight.dtype), grid_thw=image_grid_thw)
