"""Qwen2.5-VL, every size: features replace the embeddings of image tokens."""

from __future__ import annotations

from typing import Any

import torch

from rollout.families.base import Family


class Qwen25VL(Family):
    """The adapter of transformers' `qwen2_5_vl`."""

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
