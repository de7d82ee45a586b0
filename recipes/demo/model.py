"""Make a small, randomly initialised Qwen2.5-VL in the ordinary Hugging Face layout.

The classes are transformers' own, so everything that works on this folder works on a hub checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

MIN_PIXELS, MAX_PIXELS = 28 * 28, 28 * 28 * 64  # one to 64 merged vision tokens

# In the order in which Qwen2.5 numbers them, right after the base vocabulary.
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip

# Qwen's pre-tokenisation: each digit is a token, and punctuation takes the newlines that follow it, so the ">" of a tag
# fuses with what comes after it.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] -%}
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


def train_tokenizer(corpus: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Qwen's pre-tokenisation, special tokens and chat template.

    vocab_size: upper bound on the number of tokens, special ones included; at least 256 bytes + 14 specials.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS,
        model_max_length=32_768,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def text_ids(ids: Mapping[str, int]) -> dict[str, int]:
    """Return what a language model's configuration says of its special tokens; ids: the tokenizer's vocabulary."""
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    return {"bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad}


def vision_ids(ids: Mapping[str, int]) -> dict[str, Any]:
    """Return what a model's configuration says of the tokens around pages."""
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{name}_token_id": ids[f"<|{token}|>"] for name, token in names.items()}


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    vision_hidden_size: int = 128,
    vision_depth: int = 2,
    vocab_size: int | None = None,
    init_std: float = 0.04,
    seed: int = 0,
) -> Qwen2_5_VLForConditionalGeneration:
    """Return a float32 Qwen2.5-VL with random weights; the defaults have 1.7 M parameters."""
    ids = tokenizer.get_vocab()
    pairs = hidden_size // num_heads // 2
    side = 3 * pairs // 8  # Qwen2.5-VL splits 64 pairs into 16 (time), 24 (height), 24 (width)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size or len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [pairs - 2 * side, side, side],
                "rope_theta": 10_000.0,
            },
            "tie_word_embeddings": False,
            **text_ids(ids),
            "initializer_range": init_std,
        },
        vision_config={
            "depth": vision_depth,
            "hidden_size": vision_hidden_size,
            "intermediate_size": 2 * vision_hidden_size,
            "num_heads": 4,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": [vision_depth - 1],
            "initializer_range": init_std,
        },
        **vision_ids(ids),
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


def image_processor(max_pixels: int = MAX_PIXELS) -> Qwen2VLImageProcessor:
    """Return the model's image processor."""
    return Qwen2VLImageProcessor(min_pixels=MIN_PIXELS, max_pixels=max_pixels)


def save_model_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    *,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Write weights, tokenizer and processor as a folder that `from_pretrained` loads."""
    processor = Qwen2_5_VLProcessor(
        image_processor=image_processor(max_pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(min_pixels=MIN_PIXELS, max_pixels=max_pixels),
        chat_template=CHAT_TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # transformers 5 writes processor_config.json only; older tools look for preprocessor_config.json.
    processor.image_processor.save_pretrained(folder)
