"""When an answer counts as correct, by VisRAG's rule for each data set."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

RELATIVE_TOLERANCE = 0.05
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)")


def exact(prediction: str, golds: Sequence[str]) -> bool:
    """Say whether the prediction is one of the golds, ignoring case, outer punctuation and spacing."""
    return any(_plain(prediction) == _plain(gold) for gold in golds)


def relaxed(prediction: str, golds: Sequence[str]) -> bool:
    """Say whether the prediction is one of the golds; numbers may differ by 5% of the gold.

    >>> relaxed("95%", ["100"]), relaxed("94", ["100"]), relaxed("1,000", ["1000"]), relaxed("0.01", ["0"])
    (True, False, True, False)
    """
    value = _number(prediction)
    for gold in golds:
        target = _number(gold)
        if value is not None and target is not None:
            if abs(value - target) <= RELATIVE_TOLERANCE * abs(target) + 1e-12:
                return True
        elif exact(prediction, [gold]):
            return True
    return False


def first_letter(prediction: str, golds: Sequence[str]) -> bool:
    """Say whether the prediction begins with the letter of the right choice.

    >>> first_letter("(B) the second", ["B"]), first_letter("Because", ["B"])
    (True, False)
    """
    letter = _choice(prediction)
    return letter is not None and any(letter == _choice(gold) for gold in golds)


RULES: Mapping[str, Callable[[str, Sequence[str]], bool]] = {
    "ArxivQA": first_letter,
    "ChartQA": relaxed,
    "PlotQA": relaxed,
    "MP-DocVQA": exact,
    "InfoVQA": exact,
    "SlideVQA": exact,
}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'()[]")


def _number(text: str) -> float | None:
    plain = text.strip().rstrip(".").replace(",", "").strip("$€£% ")
    return float(plain) if _NUMBER.fullmatch(plain) else None


def _choice(text: str) -> str | None:
    match = re.match(r"\W*([A-Za-z])(?![A-Za-z])", text)
    return match[1].upper() if match else None
