"""Small random models of the families beside the tests' own Qwen2.5-VL, each as a folder in the Hugging Face layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from recipes.demo.model import CHAT_TEMPLATE

# Qwen3-VL has three decoder layers, of which two take features from inside the tower.
TEXT: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"num_hidden_layers": 2, "use_sliding_window": False},
    "qwen3_vl": {"num_hidden_layers": 3, "head_dim": 32},
    "qwen3_5": {
        "num_hidden_layers": 4,  # three with a recurrent state, one that attends
        "head_dim": 32,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
}
ROPE: dict[str, dict[str, Any]] = {
    "qwen2_vl": {},
    "qwen3_vl": {"mrope_interleaved": True},  # as the real ones say; vLLM asks, transformers takes it for granted
    "qwen3_5": {"mrope_interleaved": True, "partial_rotary_factor": 1.0},
}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 64, "mlp_ratio": 2, "hidden_size": 64, "patch_size": 14},
    "qwen3_vl": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "out_hidden_size": 64,
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    },
    "qwen3_5": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "out_hidden_size": 64,
        "patch_size": 16,
        "num_position_embeddings": 64,
    },
}
PROCESSORS: dict[str, tuple[Any, Any]] = {
    "qwen2_vl": (Qwen2VLProcessor, Qwen2VLVideoProcessor),
    "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
    "qwen3_5": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
}


def save_family(model_type: str, tokenizer_path: str, folder: Path) -> str:
    """Write a random model of this family, with the tokenizer of another folder; return the folder."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    token_id: Any = tokenizer.convert_tokens_to_ids
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 10_000.0, **ROPE[model_type]
        },
        "initializer_range": 0.05,
        "pad_token_id": token_id("<|endoftext|>"),
        **TEXT[model_type],
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        text_config=text_config,
        vision_config={"depth": 2, "num_heads": 2, "initializer_range": 0.05, **VISION[model_type]},
        **{
            f"{kind}_token_id": token_id(f"<|{kind.replace('image', 'image_pad').replace('video', 'video_pad')}|>")
            for kind in ("image", "video", "vision_start", "vision_end")
        },
    )
    from_config: Any = AutoModelForImageTextToText.from_config
    model = from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):  # a state that still remembers the prompt in the response
            torch.nn.init.uniform_(parameter, -4.0, -1.0)
    model.save_pretrained(folder)
    patch = VISION[model_type]["patch_size"]
    size = {"shortest_edge": 4 * patch**2, "longest_edge": 256 * patch**2}
    processor, video_processor = PROCESSORS[model_type]
    processor(
        image_processor=Qwen2VLImageProcessor(patch_size=patch, size=size), tokenizer=tokenizer,
        video_processor=video_processor(), chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)
