"""How two texts are compared: normalisation, token F1 and containment.

`paper` is the published normalisation. It turns 12.5 into 125 and -5 into 5; `strict` keeps what numbers mean.
"""

from __future__ import annotations

import re
import string
from typing import Literal

from rewards.api import RewardError

Mode = Literal["paper", "strict"]

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PAPER_ARTICLES = re.compile(r"\b(?:a|an|the)\b")

_DASHES_TO_MINUS = str.maketrans("\N{MINUS SIGN}\N{EN DASH}", "--")
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PUNCTUATION = f"[{re.escape(string.punctuation)}]"
_SIGN = r"(?<![^\s(\[{$€£¥=<>~:;,'\"])-(?=[$€£¥]?\.?\d)"
_POINT = r"(?<![^\W\d])\.(?=\d)"
_STRICT_PUNCTUATION = re.compile(
    rf"(?P<keep>{_SIGN}|{_POINT})|(?P<gap>(?<=\d){_PUNCTUATION}+?(?=\d|{_SIGN}))|{_PUNCTUATION}"
)
_STRICT_ARTICLES = re.compile(r"\b(?:an|the)\b")


def normalise(text: str, mode: Mode = "paper") -> str:
    """Return the text as it is compared.

    paper: lower-case, delete ASCII punctuation, replace the words a/an/the by a space, collapse white space.
    strict: the same, but minus signs and decimal points of numbers stay, other punctuation between two digits becomes a
        space (10-12, 9:30; a thousands comma is deleted), and the word "a" stays, because it can be an answer.

    Raises:
        RewardError: unknown mode.

    >>> normalise("The  rate: -12.5%"), normalise("The  rate: -12.5%", "strict")
    ('rate 125', 'rate -12.5')
    """
    text = text.lower()
    if mode == "paper":
        text = _PAPER_ARTICLES.sub(" ", text.translate(_DELETE_PUNCTUATION))
    elif mode == "strict":
        text = _THOUSANDS_COMMA.sub("", text.translate(_DASHES_TO_MINUS))
        text = _STRICT_PUNCTUATION.sub(lambda match: match["keep"] or (" " if match["gap"] else ""), text)
        text = _STRICT_ARTICLES.sub(" ", text)
    else:
        raise RewardError(f"normalise must be 'paper' or 'strict', got {mode!r}")
    return " ".join(text.split())


def set_f1(prediction: str, gold: str, mode: Mode = "paper") -> float:
    """Return the F1 of the two sets of normalised tokens, in [0, 1].

    A gold that normalises to nothing ("A", "The") is compared raw: 1.0 if equal except for case and outer white space.

    >>> set_f1("a growth of 16 percent", "16 percent")  # 2 shared of {growth, of, 16, percent} and {16, percent}
    0.6666666666666666
    """
    gold_tokens = set(normalise(gold, mode).split())
    if not gold_tokens:
        return _same_raw(prediction, gold)
    prediction_tokens = set(normalise(prediction, mode).split())
    num_shared = len(gold_tokens & prediction_tokens)
    if num_shared == 0:
        return 0.0
    precision, recall = num_shared / len(prediction_tokens), num_shared / len(gold_tokens)
    return 2 * precision * recall / (precision + recall)


def containment(prediction: str, gold: str, mode: Mode = "paper") -> float:
    """Return 1.0 if the normalised prediction contains the normalised gold, else 0.0.

    paper looks for the characters (16 is found in 2016), strict for whole words. A gold that normalises to nothing is
    compared raw, as in `set_f1`.
    """
    gold_words = normalise(gold, mode)
    if not gold_words:
        return _same_raw(prediction, gold)
    words = normalise(prediction, mode)
    return float(f" {gold_words} " in f" {words} " if mode == "strict" else gold_words in words)


def _same_raw(prediction: str, gold: str) -> float:
    return float(prediction.strip().casefold() == gold.strip().casefold())
