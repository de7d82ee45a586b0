"""Models of real shape with random weights, and pages and rows for them, written into a step's folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu_day.day import Day
from benchmarks.learner_sides import SHAPES, Shape, build_model
from recipes.demo.model import CHAT_TEMPLATE, SPECIAL_TOKENS, save_model_folder, train_tokenizer

WORDS = ["page", "1", "shows", "a", "code", "4", "and", "an", "amount", "7", "what", "is", "on", "it", "no", "answer"]
TINY = replace(SHAPES["small"], layers=2, vocab=1024)
TOKEN_PIXELS = 28 * 28


def tokenizer_of(shape: Shape) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with as many tokens as the model has: those that no text needs are made-up words.

    So whatever a random model samples is text.
    """
    small = train_tokenizer([" ".join(WORDS)] * 20, vocab_size=400)
    content = json.loads(small.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for token_id, word in zip(range(len(small), shape.vocab), _made_up_words(vocabulary), strict=False):
        vocabulary[word] = token_id
    filled = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS,
        model_max_length=131_072,
        clean_up_tokenization_spaces=False,
    )
    filled.chat_template = CHAT_TEMPLATE
    return filled


def _made_up_words(taken: dict[str, int]) -> Iterator[str]:
    for letters in product(ascii_lowercase, repeat=4):
        word = "Ġ" + "".join(letters)  # a space and the letters, as byte-level vocabularies write it
        if word not in taken:
            yield word


def shaped_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, device: torch.device, dtype: torch.dtype) -> object:
    """Return a random model whose special tokens are the tokenizer's."""
    return build_model(shape, device, dtype, tokenizer.get_vocab())


def model_folder(day: Day, size: str, *, image_tokens: int) -> str:
    """Return a folder with a random model of that shape in bfloat16 (rehearsals: a tiny one), made once."""
    folder = day.work / f"model_{size}"
    if not (folder / "preprocessor_config.json").exists():  # written last
        shape = day.pick(SHAPES[size], TINY)
        tokenizer = tokenizer_of(shape)
        model = shaped_model(shape, tokenizer, day.device, torch.bfloat16)
        save_model_folder(model, tokenizer, folder, max_pixels=image_tokens * TOKEN_PIXELS)  # type: ignore[arg-type]
    return str(folder)


def pages(folder: Path, count: int, image_tokens: int) -> list[str]:
    """Write pages that are `image_tokens` merged vision tokens each: pale paper with dark bars, which compress well."""
    folder.mkdir(parents=True, exist_ok=True)
    height = max(h for h in range(1, int(image_tokens**0.5) + 1) if image_tokens % h == 0)
    rng = np.random.default_rng(0)
    paths = []
    for index in range(count):
        page = np.full((28 * height, 28 * image_tokens // height, 3), 250 - index, dtype=np.uint8)
        for top in rng.integers(0, page.shape[0] - 8, 12):
            page[top : top + 6, : int(rng.integers(1, page.shape[1]))] = 40
        path = folder / f"page{index}.png"
        Image.fromarray(page).save(path)
        paths.append(str(path.resolve()))
    return paths


def rows(folder: Path, num_rows: int, images: int, image_tokens: int, words: int) -> str:
    """Write rows of several pages and a question of that many words; no two rows share a page."""
    rng = np.random.default_rng(1)
    found = pages(folder / "pages", num_rows * images, image_tokens)
    path = folder / "rows.jsonl"
    with open(path, "w") as file:
        for index in range(num_rows):
            mine = found[index * images : (index + 1) * images]
            prompt = "<image>" * images + " ".join(rng.choice(WORDS, words))
            file.write(json.dumps({"id": f"row{index}", "prompt": prompt, "answer": "7", "image": mine}) + "\n")
    return str(path)
