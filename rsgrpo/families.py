"""What differs between model families: where the parts are, how positions run, how image features enter.

One class per family, chosen by the configuration's `model_type`. Knows nothing of attention, sharding or losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from rsgrpo.types import RsgrpoError


class Family(Protocol):
    """The adapter of one model family; `model` is always transformers' own `...ForConditionalGeneration`."""

    def language_model(self, model: Any) -> Any:
        """Return the decoder without its head; its config carries `_attn_implementation`."""
        ...

    def vision_tower(self, model: Any) -> nn.Module:
        """Return the vision tower with its merger."""
        ...

    def decoder_layers(self, model: Any) -> Sequence[nn.Module]:
        """Return the layers that are sharded one by one."""
        ...

    def vision_blocks(self, model: Any) -> Sequence[nn.Module]:
        """Return the tower's blocks, sharded one by one when the tower is trained."""
        ...

    def position_ids(self, model: Any, token_ids_T: torch.Tensor, image_grid_thw: torch.Tensor | None) -> torch.Tensor:
        """Return the prompt's (3, T) positions; a response goes on from their maximum + 1."""
        ...

    def image_features(self, model: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Return (merged tokens of all images, F): everything that the tower gives to the decoder."""
        ...

    def blank_image(self, model: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pixels and grid of the smallest image that the tower takes."""
        ...

    def language_inputs(self, model: Any, token_ids_T: torch.Tensor, features: torch.Tensor | None) -> dict[str, Any]:
        """Return the decoder's keyword arguments for one row: `inputs_embeds` (1, T, H) and what the family adds."""
        ...

    def checkpoint_name(self, name: str) -> str:
        """Return the name that the hub's checkpoints use for parameter `name`."""
        ...


class Qwen25VL:
    """Qwen2.5-VL, every size."""

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
        return {"inputs_embeds": embeds_TH[None]}

    def checkpoint_name(self, name: str) -> str:
        if name.startswith("model.language_model."):
            return "model." + name.removeprefix("model.language_model.")
        return name.removeprefix("model.") if name.startswith("model.visual.") else name


_FAMILIES: dict[str, type[Family]] = {"qwen2_5_vl": Qwen25VL}


def family_of(model_type: str) -> Family:
    """Return the adapter of a configuration's `model_type`.

    Raises:
        RsgrpoError: a family without an adapter.
    """
    if model_type not in _FAMILIES:
        raise RsgrpoError(
            f"model.path holds a {model_type!r} model; the learner knows {sorted(_FAMILIES)}: "
            "add an adapter to rsgrpo/families.py and a parity test"
        )
    return _FAMILIES[model_type]()
