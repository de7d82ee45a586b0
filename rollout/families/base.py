"""The interface of a model family for inputs, engines, learner and plan, with the defaults of most Qwen models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from rollout.errors import InputError


class Family:
    """One kind of vision-language model; `model` is always transformers' own `...ForConditionalGeneration`.

    A family overrides what differs. Each needs `model_type`, `language_inputs` and a place in the family tests.

    Attributes:
        model_type: of the configuration.
        vision_tokens: tokens that represent images; never sampled, and refused in a text.
        turn_tokens: tokens that open a turn of the chat template; refused in a text.
        language_prefix, vision_prefix: of the names of the decoder's and the tower's weights.
        no_mask: decoder arguments that keep transformers from building a mask for an attention that needs none.
        template_options: arguments of the chat template.
        layer_kinds: of the decoder's layers, as `layer_types` of the configuration names them, that are supported.
    """

    model_type: ClassVar[str]
    vision_tokens: ClassVar[tuple[str, ...]] = (
        "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"
    )  # fmt: skip
    turn_tokens: ClassVar[tuple[str, ...]] = ("<|im_start|>",)
    language_prefix: ClassVar[str] = "model.language_model."
    vision_prefix: ClassVar[str] = "model.visual."
    no_mask: ClassVar[dict[str, Any]] = {}
    template_options: ClassVar[dict[str, Any]] = {}
    layer_kinds: ClassVar[frozenset[str]] = frozenset({"full_attention"})

    # --- inputs

    def resize_unit(self, image_processor: Any) -> int:
        """Return the side in pixels of the square that becomes one image token; images are resized to multiples."""
        return int(image_processor.patch_size * image_processor.merge_size)

    def num_features(self, image_processor: Any, image_grid_thw: torch.Tensor | None) -> int:
        """Return how many image tokens the patches of all images become."""
        return 0 if image_grid_thw is None else int(image_grid_thw.prod(1).sum()) // image_processor.merge_size**2

    def position_ids(
        self,
        model: Any,
        token_ids_BT: torch.Tensor,
        image_grid_thw: torch.Tensor | None,
        is_token_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the (3, B, T) positions of prompts; a response continues from their maximum + 1.

        is_token_BT: False on padding; None: nothing is padded.
        """
        positions: torch.Tensor = model.model.get_rope_index(
            token_ids_BT,
            mm_token_type_ids=(token_ids_BT == model.config.image_token_id).int(),
            image_grid_thw=image_grid_thw,
            attention_mask=None if is_token_BT is None else is_token_BT.long(),
        )[0]
        return positions

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
        return decoder

    def recurrent_layers(self, model: Any) -> Sequence[nn.Module]:
        """Return the layers that carry a state from token to token instead of attending; most families have none.

        Each has the interface of transformers' `Qwen3_5GatedDeltaNet`.
        """
        return ()

    def language_inputs(self, model: Any, token_ids_BT: torch.Tensor, features: torch.Tensor | None) -> dict[str, Any]:
        """Return the decoder's keyword arguments for some rows: embeddings, and what the family adds.

        features: (image tokens of all rows, F); None without images.
        """
        raise NotImplementedError

    # --- weights

    def checkpoint_name(self, name: str) -> str:
        """Return the name that published checkpoints use for parameter `name`."""
        return name

    def adapted_names(self, targets: Sequence[str]) -> list[str]:
        """Return the names of the linear layers that LoRA targets stand for."""
        return list(targets)

    def adapted_layers(self, targets: Sequence[str]) -> str:
        """Return a regular expression for the full names of the layers that get a LoRA adapter."""
        return rf".*{self.language_prefix.split('.')[-2]}\..*\.({'|'.join(self.adapted_names(targets))})"
