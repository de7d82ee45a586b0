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
)

NARROW: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


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
