"""InternVL3 and 3.5, dense: an image is cut into square tiles, and its tokens have one position each, as text has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from rollout.errors import InputError
from rollout.families.base import Family, TowerShape

_TOKEN_SIDE = 28  # pixels: a patch of 14, and half as many tokens as patches per side


class InternVL(Family):
    """The adapter of transformers' `internvl` (the folders whose names end in `-hf`).

    The rows of an image's pixels are its tiles, (3, side, side) each, and a thumbnail behind them where there are
    several; its grid is (tiles with the thumbnail, 1, 1).
    """

    model_type = "internvl"
    vision_tokens = ("<IMG_CONTEXT>", "<img>", "</img>", "<video>")
    wrapper = ("<img>", "</img>")
    vision_prefixes = ("model.vision_tower.", "model.multi_modal_projector.")
    engine_tower = ("*vision_tower.*", "*multi_modal_projector.*")
    no_mask: ClassVar[dict[str, Any]] = {"attention_mask": {"full_attention": None}}

    # --- inputs

    def resize_unit(self, image_processor: Any) -> int:
        return int(image_processor.size.height)

    def canvas(
        self, image_processor: Any, height: int, width: int, min_pixels: int, max_pixels: int
    ) -> tuple[int, int]:
        """Return the rows and columns of tiles nearest to the image's shape, in pixels; a thumbnail is not counted.

        Transformers' own choice, whose result is a fixed point: it cuts the resized image into the same tiles.
        """
        from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

        side = self.resize_unit(image_processor)
        tiles = self.limits(image_processor, min_pixels, max_pixels)
        num_columns, num_rows = get_optimal_tiled_canvas(
            (height, width), (side, side), tiles["min_patches"], tiles["max_patches"]
        )
        return num_rows * side, num_columns * side

    def image_tokens(self, image_processor: Any, height: int, width: int) -> int:
        side = self.resize_unit(image_processor)
        num_tiles = (height // side) * (width // side)
        return (num_tiles + (num_tiles > 1)) * (side // _TOKEN_SIDE) ** 2

    def limits(self, image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        tile = self.resize_unit(image_processor) ** 2
        most = max(1, max_pixels // tile)
        return {"crop_to_patches": True, "min_patches": min(most, -(-min_pixels // tile)), "max_patches": most}

    def pixels(
        self, image_processor: Any, images: Sequence[Any], min_pixels: int, max_pixels: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        limits = self.limits(image_processor, min_pixels, max_pixels)
        tiles = image_processor(images=images, do_resize=False, return_tensors="pt", **limits)
        counts = torch.as_tensor(tiles["num_patches"])
        return tiles["pixel_values"], _grids(counts)

    def requested_grid(self, item: Mapping[str, Any]) -> torch.Tensor:
        return _grids(item["image_num_patches"].data.reshape(1))[0]

    def num_features(self, image_processor: Any, image_grid_thw: torch.Tensor | None) -> int:
        per_tile = (self.resize_unit(image_processor) // _TOKEN_SIDE) ** 2
        return 0 if image_grid_thw is None else int(image_grid_thw.prod(1).sum()) * per_tile

    def position_ids(
        self,
        model: Any,
        token_ids_BT: torch.Tensor,
        image_grid_thw: torch.Tensor | None,
        is_token_BT: torch.Tensor | None = None,
        video_steps: Sequence[float] = (),
    ) -> torch.Tensor:
        """Return the same positions in all three axes: 0, 1, 2 and so on from a row's first token."""
        is_token = torch.ones_like(token_ids_BT) if is_token_BT is None else is_token_BT.long()
        return (is_token.cumsum(-1) - 1).clamp_min(0).expand(3, -1, -1)

    def decoder_positions(self, positions_3BT: torch.Tensor) -> torch.Tensor:
        return positions_3BT[0]

    # --- vision tower

    def vision_tower(self, model: Any) -> nn.Module:
        return _TowerWithProjector(model.model)

    def vision_blocks(self, model: Any) -> Sequence[nn.Module]:
        return list(model.model.vision_tower.encoder.layer)

    def image_features(self, model: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = model.model.get_image_features(pixel_values).pooler_output
        return features.flatten(0, 1)

    def blank_image(self, model: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        config = model.config.vision_config
        tile = torch.zeros(1, config.num_channels, *config.image_size, device=device)
        return tile, torch.ones(1, 3, dtype=torch.int64, device=device)

    def tower_shape(self, model: Any) -> TowerShape:
        config = model.config.vision_config
        tile = (config.image_size[0] // config.patch_size[0]) ** 2
        return TowerShape(
            hidden_size=config.hidden_size,
            patch_size=config.patch_size[0],
            patches_per_token=round(1 / model.config.downsample_ratio) ** 2,
            full_layers=0,
            window_patches=tile,
            extra_patches=tile,
            merger=("projector",),
        )

    # --- decoder

    def attend_by(self, model: Any, attention: str) -> Any:
        config = model.config
        side = config.vision_config.patch_size[0] / config.downsample_ratio
        if side != _TOKEN_SIDE:
            raise InputError(
                f"the model's image tokens have sides of {side:g} pixels (vision_config.patch_size / "
                f"downsample_ratio), but only InternVL's {_TOKEN_SIDE} are supported. Set model.path to another model."
            )
        return super().attend_by(model, attention)

    def whole_inputs(
        self,
        model: Any,
        token_ids_BT: torch.Tensor,
        pixel_values: torch.Tensor | None,
        grid: torch.Tensor | None,
        video_steps: Sequence[float] = (),
    ) -> dict[str, Any]:
        return {"input_ids": token_ids_BT, "pixel_values": pixel_values}


class _TowerWithProjector(nn.Module):
    """A view of the tower and the projector behind it as one module; it owns no weight of its own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_tower, self.projector = model.vision_tower, model.multi_modal_projector

    @property
    def config(self) -> Any:
        """The tower's configuration."""
        return self.vision_tower.config


def _grids(counts: torch.Tensor) -> torch.Tensor:
    """Return (images, 3) grids of (tiles,) counts."""
    grids = torch.ones(len(counts), 3, dtype=torch.int64)
    grids[:, 0] = counts
    return grids
