"""What differs between model families: where the parts are, how positions run, how image features enter.

One class in one file per family, chosen by the configuration's `model_type`. Knows nothing of sharding or losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from rsgrpo.errors import InputError
from rsgrpo.qwen3_vl import Qwen3VL
from rsgrpo.qwen25_vl import Qwen25VL


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
        """Return the decoder's keyword arguments for one row: embeddings, mask, and what the family adds."""
        ...

    def checkpoint_name(self, name: str) -> str:
        """Return the name that the hub's checkpoints use for parameter `name`."""
        ...


_FAMILIES: dict[str, type[Family]] = {"qwen2_5_vl": Qwen25VL, "qwen3_vl": Qwen3VL}


def family_of(model_type: str) -> Family:
    """Return the adapter of a configuration's `model_type`.

    Raises:
        InputError: a family without an adapter.
    """
    if model_type not in _FAMILIES:
        raise InputError(
            f"model.path holds a {model_type!r} model; the learner knows {sorted(_FAMILIES)}: "
            "add an adapter beside rsgrpo/qwen25_vl.py and a parity test"
        )
    return _FAMILIES[model_type]()
