"""Small random models of the families beside the tests' own Qwen2.5-VL, each as a folder in the Hugging Face layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from recipes.demo.model import CHAT_TEMPLATE

QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
GLM_TOKENS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
GLM_TEMPLATE = """\
[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] -%}
{% if part['type'] == 'image' %}<|begin_of_image|><|image|><|end_of_image|>
{%- elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}
{%- endfor %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif -%}"""
INTERNVL_TEMPLATE = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n")
TILE = 56
"""Side of a tile of the small InternVL: four image tokens."""

QWEN3_VISION = {
    "depth": 2,
    "num_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "out_hidden_size": 64,
    "patch_size": 16,
    "num_position_embeddings": 64,
}


HYBRID = {
    "num_hidden_layers": 4,  # three with a recurrent state, one that attends
    "head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def qwen_image_processor(vision: dict[str, Any]) -> Any:
    """The image processor of every Qwen family."""
    patch = vision["patch_size"]
    return Qwen2VLImageProcessor(patch_size=patch, size={"shortest_edge": 4 * patch**2, "longest_edge": 256 * patch**2})


@dataclass(frozen=True)
class Tiny:
    """What sets a family's small model apart.

    text, rope, vision: of the configurations. tokens: of the configuration, by its name for each.
    processor, video_processor, image_processor: classes, the last from `vision`.
    added: special tokens that the tests' tokenizer lacks, with the tokenizer's name for each where it has one.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    processor: Any
    video_processor: Any
    rope: dict[str, Any] = field(default_factory=lambda: {"mrope_section": [6, 5, 5]})
    tokens: dict[str, str] = field(default_factory=lambda: QWEN_TOKENS)
    image_processor: Callable[[dict[str, Any]], Any] = qwen_image_processor
    template: str = CHAT_TEMPLATE
    added: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


# Qwen3-VL has three decoder layers, of which two take features from inside the tower.
TINY = {
    "qwen2_vl": Tiny(
        text={"num_hidden_layers": 2, "use_sliding_window": False},
        vision={
            "depth": 2, "num_heads": 2, "embed_dim": 64, "mlp_ratio": 2, "hidden_size": 64, "patch_size": 14
        },
        processor=Qwen2VLProcessor,
        video_processor=Qwen2VLVideoProcessor,
    ),
    "qwen3_vl": Tiny(
        text={"num_hidden_layers": 3, "head_dim": 32},
        # as the real ones say; vLLM asks, transformers takes it for granted
        rope={"mrope_section": [6, 5, 5], "mrope_interleaved": True},
        vision={**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]},
        processor=Qwen3VLProcessor,
        video_processor=Qwen3VLVideoProcessor,
    ),
    "qwen3_5": Tiny(
        text=HYBRID,
        rope={"mrope_section": [6, 5, 5], "mrope_interleaved": True, "partial_rotary_factor": 1.0},
        vision=QWEN3_VISION,
        processor=Qwen3VLProcessor,
        video_processor=Qwen3VLVideoProcessor,
    ),
    "qwen3_vl_moe": Tiny(
        # norm_topk_prob: as published; vLLM asks for it
        text={"num_hidden_layers": 3, "head_dim": 32, "norm_topk_prob": True, **EXPERTS},
        rope={"mrope_section": [6, 5, 5], "mrope_interleaved": True},
        vision={**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]},
        processor=Qwen3VLProcessor,
        video_processor=Qwen3VLVideoProcessor,
    ),
    "qwen3_5_moe": Tiny(
        text={**HYBRID, **EXPERTS, "shared_expert_intermediate_size": 40},
        rope={"mrope_section": [6, 5, 5], "mrope_interleaved": True, "partial_rotary_factor": 1.0},
        vision=QWEN3_VISION,
        processor=Qwen3VLProcessor,
        video_processor=Qwen3VLVideoProcessor,
    ),
    "internvl": Tiny(
        text={"model_type": "qwen2", "num_hidden_layers": 2, "use_sliding_window": False},
        rope={},
        vision={
            "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 128,
            "image_size": TILE, "patch_size": 14,
        },
        processor=InternVLProcessor,
        video_processor=InternVLVideoProcessor,
        tokens={"image_token_id": "<IMG_CONTEXT>"},
        image_processor=lambda _: GotOcr2ImageProcessor(size={"height": TILE, "width": TILE}),
        template=INTERNVL_TEMPLATE,
        added=tuple(INTERNVL_TOKENS.values()),
        named=INTERNVL_TOKENS,
        config={"image_seq_length": (TILE // 28) ** 2, "tie_word_embeddings": False},
    ),
    "glm4v": Tiny(
        text={"num_hidden_layers": 2},
        rope={"mrope_section": [4, 2, 2], "partial_rotary_factor": 0.5},  # the real one's 8, 12, 12 exceed its 32
        vision={
            "depth": 2, "num_heads": 2, "hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 64,
            "patch_size": 14, "image_size": 56,
        },
        processor=Glm4vProcessor,
        video_processor=Glm4vVideoProcessor,
        tokens=GLM_TOKENS,
        image_processor=lambda _: Glm4vImageProcessor(),
        template=GLM_TEMPLATE,
        added=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", *GLM_TOKENS.values()),
    ),
}  # fmt: skip


def save_family(model_type: str, tokenizer_path: str, folder: Path) -> str:
    """Write a random model of this family, with the tokenizer of another folder; return the folder."""
    tiny = TINY[model_type]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, **tiny.named)
    if tiny.added:
        tokenizer.add_special_tokens({"additional_special_tokens": list(tiny.added)})
    tokenizer.chat_template = tiny.template
    token_id: Any = tokenizer.convert_tokens_to_ids
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, **tiny.rope},
        "initializer_range": 0.05,
        "pad_token_id": token_id("<|endoftext|>"),
        **tiny.text,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        text_config=text_config,
        vision_config={"initializer_range": 0.05, **tiny.vision},
        **{name: token_id(token) for name, token in tiny.tokens.items()},
        **tiny.config,
    )
    from_config: Any = AutoModelForImageTextToText.from_config
    model = from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):  # routers that choose: these start at zero
            torch.nn.init.normal_(parameter, std=0.5)
        elif name.endswith("A_log"):  # a state that still remembers the prompt in the response
            torch.nn.init.uniform_(parameter, -4.0, -1.0)
    model.save_pretrained(folder)
    options = {"image_seq_length": tiny.config["image_seq_length"]} if "image_seq_length" in tiny.config else {}
    tiny.processor(
        image_processor=tiny.image_processor(tiny.vision), tokenizer=tokenizer,
        video_processor=tiny.video_processor(), chat_template=tiny.template, **options,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)
