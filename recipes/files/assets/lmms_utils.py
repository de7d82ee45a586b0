"""The functions of an lmms-eval task over the rows beside this file; `python -m recipes.prepare harness` wrote it.

It needs Pillow only. The scores that lmms-eval shows are exact match and F1 of normalised words. For all others give
its samples to recipes.evaluate as predictions.
"""

import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).parent
MARK = "<image>"


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """Return the pages."""
    return [Image.open(HERE / path).convert("RGB") for path in doc["images"]]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """Return the message without its pages, for models that take them apart from it."""
    return str(doc["text"]).replace(MARK, "")


def doc_to_messages(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> list[dict[str, Any]]:
    """Return the message with its pages in place."""
    pages = iter(doc_to_visual(doc))
    content: list[dict[str, Any]] = []
    for number, piece in enumerate(doc["text"].split(MARK)):
        if number:
            content.append({"type": "image", "url": next(pages)})
        if piece:
            content.append({"type": "text", "text": piece})
    messages = [{"role": "user", "content": content}]
    if doc["system"]:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": doc["system"]}]})
    return messages


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return the scores of one answer."""
    found = re.search(r"<answer>(.*?)(</answer>|$)", results[0], re.DOTALL)
    words = _words(found[1] if found else results[0])
    golds = [_words(answer) for answer in doc["answers"]]
    return {
        "em": max(float(words == gold) for gold in golds),
        "f1": max(_f1(words, gold) for gold in golds),
    }


def _words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(words: list[str], gold: list[str]) -> float:
    shared = sum((Counter(words) & Counter(gold)).values())
    return 2 * shared / (len(words) + len(gold)) if shared else 0.0
