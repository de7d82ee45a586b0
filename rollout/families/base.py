"""The interface of a model family for inputs, engines, learner and plan, with the defaults of most Qwen models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from rollout.errors import InputError
from rollout.families.routers import route_in_float32


@dataclass(frozen=True, slots=True)
class TowerShape:
    """What a plan needs of a vision tower beside its parameters.

    patch_size: pixels of a patch's side. patches_per_token: of one image token.
    full_layers: blocks in which patches attend to the whole image; in the others, to `window_patches` of it.
    extra_patches: of an image beside those that cut it up, such as a thumbnail's.
    merger: parts of the names of parameters that each image token passes, instead of each patch.
    """

    hidden_size: int
    patch_size: int
    patches_per_token: int
    full_layers: int
    window_patches: int = 0
    extra_patches: int = 0
    merger: tuple[str, ...] = ("merger",)


class Family:
    """One kind of vision-language model; `model` is always transformers' own `...ForConditionalGeneration`.

    A family overrides what differs. Each needs `model_type` and a place in the family tests.

    Attributes:
        model_type: of the configuration.
        vision_tokens: tokens that represent images; never sampled, and refused in a text.
        turn_tokens: tokens that open a turn of the chat template; refused in a text.
        end_token: ends a response; empty where it is the tokenizer's end-of-text.
        wrapper: tokens around the image tokens of one image that the chat template leaves out; empty: none.
        language_prefix, vision_prefixes: of the names of the decoder's and the tower's weights.
        engine_tower: pattern of the tower's parameters by the names that vLLM has for them.
        engine_config: part of the model's config -> keys that vLLM reads there and transformers does not write.
        no_mask: decoder arguments that keep transformers from building a mask for an attention that needs none.
        template_options: arguments of the chat template.
        reads_videos: rows may have videos. stamps_frames: each temporal patch follows its time, written as text.
        layer_kinds: of the decoder's layers, as `layer_types` of the configuration names them, that are supported.
    """

    model_type: ClassVar[str]
    vision_tokens: ClassVar[tuple[str, ...]] = (
        "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"
    )  # fmt: skip
    turn_tokens: ClassVar[tuple[str, ...]] = ("<|im_start|>",)
    end_token: ClassVar[str] = ""
    wrapper: ClassVar[tuple[str, ...]] = ()
    language_prefix: ClassVar[str] = "model.language_model."
    vision_prefixes: ClassVar[tuple[str, ...]] = ("model.visual.",)
    engine_tower: ClassVar[tuple[str, ...]] = ("*visual.*",)
    engine_config: ClassVar[dict[str, dict[str, Any]]] = {}
    no_mask: ClassVar[dict[str, Any]] = {}
    template_options: ClassVar[dict[str, Any]] = {}
    layer_kinds: ClassVar[frozenset[str]] = frozenset({"full_attention"})
    reads_videos: ClassVar[bool] = False
    stamps_frames: ClassVar[bool] = False

    # --- inputs

    def resize_unit(self, image_processor: Any) -> int:
        """Return the side in pixels of the square of which resized images are multiples; most often one image token."""
        return int(image_processor.patch_size * image_processor.merge_size)

    def canvas(
        self, image_processor: Any, height: int, width: int, min_pixels: int, max_pixels: int
    ) -> tuple[int, int] | None:
        """Return the height and width to which an image is resized by a rule of the family's own; None: Qwen's rule."""
        return None

    def image_tokens(self, image_processor: Any, height: int, width: int) -> int:
        """Return how many image tokens a resized image becomes."""
        unit = self.resize_unit(image_processor)
        return (height // unit) * (width // unit)

    def limits(self, image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        """Return the image processor's arguments that keep an image's area within these limits."""
        return {"size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}}

    def pixels(
        self, image_processor: Any, images: Sequence[Any], min_pixels: int, max_pixels: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the patches of resized images, all images' in one tensor, and their (images, 3) grid.

        The product of an image's grid is its number of rows in the first tensor.
        """
        patches = image_processor(images=images, do_resize=False, return_tensors="pt")
        return patches["pixel_values"], patches["image_grid_thw"]

    def video_pixels(self, video_processor: Any, frames: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the patches of a video's resized frames, all of one size, and its (1, 3) grid."""
        pixels = torch.stack([torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in frames])
        patches = video_processor(videos=[pixels], do_resize=False, do_sample_frames=False, return_tensors="pt")
        return patches["pixel_values_videos"], patches["video_grid_thw"]

    def requested_grid(self, item: Mapping[str, Any]) -> torch.Tensor:
        """Return the (3,) grid of an image or a video as vLLM has prepared it."""
        grid: torch.Tensor = item["image_grid_thw" if "image_grid_thw" in item else "video_grid_thw"].data
        return grid

    def num_features(self, image_processor: Any, image_grid_thw: torch.Tensor | None) -> int:
        """Return how many image tokens the patches of all images become."""
        return 0 if image_grid_thw is None else int(image_grid_thw.prod(1).sum()) // image_processor.merge_size**2

    def position_ids(
        self,
        model: Any,
        token_ids_BT: torch.Tensor,
        image_grid_thw: torch.Tensor | None,
        is_token_BT: torch.Tensor | None = None,
        video_steps: Sequence[float] = (),
    ) -> torch.Tensor:
        """Return the (3, B, T) positions of prompts; a response continues from their maximum + 1.

        is_token_BT: False on padding; None: nothing is padded.
        video_steps: the seconds that each video's temporal patches lie apart, over all prompts.
        """
        positions: torch.Tensor = model.model.get_rope_index(
            token_ids_BT,
            attention_mask=None if is_token_BT is None else is_token_BT.long(),
            **self._vision_inputs(model, token_ids_BT, image_grid_thw, bool(video_steps)),
        )[0]
        return positions

    def vision_kinds(self, model: Any, token_ids: torch.Tensor) -> torch.Tensor:
        """Return, in the shape of `token_ids`, 1 for a token of an image, 2 for one of a video and 0 for the others."""
        kinds: torch.Tensor = (token_ids == model.config.image_token_id).int()
        if self.reads_videos:
            kinds = kinds + 2 * (token_ids == model.config.video_token_id).int()
        return kinds

    def is_video(self, model: Any, token_ids: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Return which of the grids, in the order of the tokens, are videos': (images and videos,) bool."""
        kinds = self.vision_kinds(model, token_ids)
        ends = (grid.prod(1) // model.config.vision_config.spatial_merge_size**2).cumsum(0)
        found: torch.Tensor = kinds[kinds > 0][ends.to(kinds.device) - 1] == 2
        return found

    def _vision_inputs(
        self, model: Any, token_ids_BT: torch.Tensor, grid: torch.Tensor | None, has_videos: bool
    ) -> dict[str, Any]:
        """Return what transformers wants to know of the images and videos of some rows."""
        kinds = self.vision_kinds(model, token_ids_BT)
        if grid is None or not has_videos:
            return {"mm_token_type_ids": kinds, "image_grid_thw": grid}
        videos = self.is_video(model, token_ids_BT, grid).to(grid.device)
        found: dict[str, Any] = {"mm_token_type_ids": kinds, "video_grid_thw": grid[videos]}
        return found | {"image_grid_thw": None if videos.all() else grid[~videos]}

    def decoder_positions(self, positions_3BT: torch.Tensor) -> torch.Tensor:
        """Return positions as the decoder takes them; one that knows no M-RoPE takes one axis of three equal ones."""
        return positions_3BT

    # --- vision tower

    def vision_tower(self, model: Any) -> nn.Module:
        """Return the vision tower with its merger."""
        tower: nn.Module = model.model.visual
        return tower

    def vision_blocks(self, model: Any) -> Sequence[nn.Module]:
        """Return the tower's blocks, sharded one by one when the tower is trained."""
        return list(model.model.visual.blocks)

    def image_features(self, model: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Return (merged tokens of all images, F): everything that the tower gives to the decoder."""
        features: torch.Tensor = self._run_tower(model, pixel_values, image_grid_thw).pooler_output
        return features

    def blank_image(self, model: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pixels and grid of the smallest image that the tower accepts."""
        config = model.config.vision_config
        merge = config.spatial_merge_size
        patch_dim = config.in_channels * config.temporal_patch_size * config.patch_size**2
        return torch.zeros(merge**2, patch_dim, device=device), torch.tensor([[1, merge, merge]], device=device)

    def tower_shape(self, model: Any) -> TowerShape:
        """Return what a plan needs of the tower."""
        config, tower = model.config.vision_config, self.vision_tower(model)
        full_layers = getattr(config, "fullatt_block_indexes", None)
        return TowerShape(
            hidden_size=tower.get_parameter("patch_embed.proj.weight").shape[0],
            patch_size=config.patch_size,
            patches_per_token=config.spatial_merge_size**2,
            full_layers=len(self.vision_blocks(model)) if full_layers is None else len(full_layers),
            window_patches=(getattr(config, "window_size", 0) // config.patch_size) ** 2,
        )

    def _run_tower(self, model: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> Any:
        tower: Any = self.vision_tower(model)
        return tower(pixel_values.to(tower.patch_embed.proj.weight.dtype), grid_thw=image_grid_thw)

    # --- decoder

    def language_model(self, model: Any) -> Any:
        """Return the decoder without its head."""
        return model.model.language_model

    def decoder_layers(self, model: Any) -> Sequence[nn.Module]:
        """Return the layers that are sharded one by one."""
        return list(self.language_model(model).layers)

    def attend_by(self, model: Any, attention: str) -> Any:
        """Let the decoder use a registered attention function, and the tower the fastest; return the decoder.

        Routers of experts compute in float32 from here on.

        Raises:
            InputError: a layer is of a kind that our attention functions do not compute.
        """
        decoder = self.language_model(model)
        kinds = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
        if not kinds <= self.layer_kinds:
            raise InputError(
                f"the model has layers of kind {', '.join(sorted(kinds))}, but only "
                f"{', '.join(sorted(self.layer_kinds))} is supported. If it was trained without sliding windows, set "
                "use_sliding_window=false in its config.json."
            )
        decoder.config._attn_implementation = attention
        route_in_float32(self.routers(model).values())
        return decoder

    def recurrent_layers(self, model: Any) -> Sequence[nn.Module]:
        """Return the layers that carry a state from token to token instead of attending; most families have none.

        Each has the interface of transformers' `Qwen3_5GatedDeltaNet`.
        """
        return ()

    def routers(self, model: Any) -> dict[int, nn.Module]:
        """Return the modules that choose each token's experts, by the index of their layer; a dense model has none.

        Each has the interface of transformers' `Qwen3VLMoeTextTopKRouter`.
        """
        layers: list[Any] = list(self.decoder_layers(model))
        return {index: layer.mlp.gate for index, layer in enumerate(layers) if hasattr(layer.mlp, "experts")}

    def whole_inputs(
        self,
        model: Any,
        token_ids_BT: torch.Tensor,
        pixel_values: torch.Tensor | None,
        grid: torch.Tensor | None,
        video_steps: Sequence[float] = (),
    ) -> dict[str, Any]:
        """Return the arguments of transformers' own forward, tower and all."""
        found = {"input_ids": token_ids_BT, **self._vision_inputs(model, token_ids_BT, grid, bool(video_steps))}
        if pixel_values is None or grid is None or not video_steps:
            return found | {"pixel_values": pixel_values}
        videos = self.is_video(model, token_ids_BT, grid).tolist()
        patches = torch.split(pixel_values, grid.prod(1).tolist())
        parts = {
            name: [part for part, is_video in zip(patches, videos, strict=True) if is_video == wanted]
            for name, wanted in (("pixel_values", False), ("pixel_values_videos", True))
        }
        return found | {name: torch.cat(some) if some else None for name, some in parts.items()}

    def language_inputs(self, model: Any, token_ids_BT: torch.Tensor, features: torch.Tensor | None) -> dict[str, Any]:
        """Return the decoder's keyword arguments for some rows: embeddings, and what the family adds.

        features: (vision tokens of all rows, F); None without images. Here they replace the vision tokens' embeddings.
        """
        embeds_BTH = model.get_input_embeddings()(token_ids_BT)
        if features is not None:
            is_image_BT1 = (self.vision_kinds(model, token_ids_BT) > 0)[..., None]
            embeds_BTH = embeds_BTH.masked_scatter(is_image_BT1, features.to(embeds_BTH.dtype))
        return {"inputs_embeds": embeds_BTH}

    # --- weights

    def checkpoint_name(self, name: str) -> str:
        """Return the name that published checkpoints use for parameter `name`."""
        return name

    def published(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a weight in the layout that published checkpoints and vLLM have; done twice, it is the model's own."""
        return tensor

    def adapted_names(self, targets: Sequence[str]) -> list[str]:
        """Return the names of the linear layers that LoRA targets stand for."""
        return list(targets)

    def adapted_layers(self, targets: Sequence[str]) -> str:
        """Return a regular expression for the full names of the layers that get a LoRA adapter."""
        return rf".*{self.language_prefix.split('.')[-2]}\..*\.({'|'.join(self.adapted_names(targets))})"
