"""The demo's model in another family than Qwen2.5-VL: about the same size, in that family's own layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from recipes.demo.items import DemoFamily
from recipes.demo.model import CHAT_TEMPLATE, build_model, image_processor, save_model_folder, text_ids, vision_ids

_PATCH = 16  # pixels; a page of 28 x 56 becomes one of 32 x 64, again two image tokens

# Rotary pairs of a head for time, height and width; the real Qwen3.5 turns a quarter of its heads of 256.
_TEXT: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"rope_parameters": {"mrope_section": [6, 5, 5], "mrope_interleaved": True}},
    "qwen3_5": {
        "rope_parameters": {"mrope_section": [3, 3, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.5},
        # Of four layers, three carry a state and the last attends.
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
}
_VISION: dict[str, dict[str, Any]] = {"qwen3_vl": {"deepstack_visual_indexes": [0, 1]}, "qwen3_5": {}}


def build_demo_model(family: DemoFamily, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Return a float32 model of this family with random weights, hidden size 128 and four layers."""
    if family == "qwen2_5_vl":
        return build_model(tokenizer, seed=seed)
    ids = tokenizer.get_vocab()
    text = dict(_TEXT[family])
    rope = {"rope_type": "default", "rope_theta": 10_000.0, **text.pop("rope_parameters")}
    config = AutoConfig.for_model(
        family,
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "rope_parameters": rope,
            "initializer_range": 0.04,
            **text_ids(ids),
            **text,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": _PATCH,
            "num_position_embeddings": 64,
            "initializer_range": 0.04,
            **_VISION[family],
        },
        **vision_ids(ids),
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    from_config: Any = AutoModelForImageTextToText.from_config
    model: Any = from_config(config).float()
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            _remember(parameter)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    trained: PreTrainedModel = model
    return trained


@torch.no_grad()
def _remember(bias_N: torch.Tensor) -> None:
    """Let a state fade over ten to a thousand tokens at first; as initialised, it would forget within one.

    As in Mamba-2 and Gated DeltaNet: log-uniform time steps between 0.001 and 0.1, through softplus' inverse.
    """
    steps = torch.exp(torch.empty_like(bias_N).uniform_(-6.9, -2.3))
    bias_N.copy_(steps + torch.log(-torch.expm1(-steps)))


def demo_image_processor(family: DemoFamily) -> Qwen2VLImageProcessor:
    """Return the image processor of the family's small model."""
    if family == "qwen2_5_vl":
        return image_processor()
    return Qwen2VLImageProcessor(patch_size=_PATCH, min_pixels=4 * _PATCH**2, max_pixels=256 * _PATCH**2)


def save_demo_model(
    family: DemoFamily, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write weights, tokenizer and processor as a folder that `from_pretrained` loads."""
    if family == "qwen2_5_vl":
        save_model_folder(model, tokenizer, folder)
        return
    processor = Qwen3VLProcessor(
        image_processor=demo_image_processor(family),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(patch_size=_PATCH),
        chat_template=CHAT_TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
