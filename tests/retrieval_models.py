"""Small random models of every kind that reads pages or queries, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from recipes.tiny_model import CHAT_TEMPLATE

NARROW: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_qwen3(tokenizer_path: str, folder: Path) -> str:
    """Write a Qwen3-VL of three decoder layers, two of which take features of the vision tower's inside."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    token_id: Any = tokenizer.convert_tokens_to_ids
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [6, 5, 5],
            "rope_theta": 10_000.0,
            "mrope_interleaved": True,  # as the real ones say; vLLM asks, transformers takes it for granted
        },
        "initializer_range": 0.05,
        "pad_token_id": token_id("<|endoftext|>"),
    }
    vision_config = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
        "initializer_range": 0.05,
    }
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    images = Qwen2VLImageProcessor(patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 32 * 32})
    Qwen3VLProcessor(
        image_processor=images, tokenizer=tokenizer, video_processor=Qwen3VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def save_clip(tokenizer_path: str, folder: Path) -> str:
    """Write a sentence-transformers folder whose pages all become one size: a CLIP."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    token_id: Any = tokenizer.convert_tokens_to_ids
    marks = {"bos_token_id": "<|im_start|>", "eos_token_id": "<|im_end|>", "pad_token_id": "<|endoftext|>"}
    ids = {name: token_id(token) for name, token in marks.items()}
    text_config = NARROW | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    vision_config = NARROW | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=16)).save_pretrained(
        folder / "plain"
    )
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder / "plain")
    SentenceTransformer(modules=[Transformer(str(folder / "plain"))], device="cpu").save(str(folder / "clip"))
    return str(folder / "clip")


def save_bert(tokenizer_path: str, folder: Path) -> str:
    """Write a sentence-transformers folder that reads text only, by the mean of its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    torch.manual_seed(0)
    config = BertConfig(**NARROW, vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=0)
    BertModel(config).save_pretrained(folder / "plain")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "plain")
    transformer = Transformer(str(folder / "plain"))
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder / "bert"))
    return str(folder / "bert")


def save_late(model_path: str, folder: Path) -> str:
    """Write a multi-vector folder around a vision-language model, with a random projection."""
    MultiVectorEncoder(model_path, device="cpu").save(str(folder))
    return str(folder)
