"""EM, precision, recall and F1 of an answer, of the pages that it rests on, and of boxes; each names its source."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from rewards.text import normalise


@dataclass(frozen=True, slots=True)
class Parts:
    """Exact match, precision, recall and F1 of an answer or of its pages."""

    em: float
    precision: float
    recall: float
    f1: float


def answer_parts(prediction: str, golds: Sequence[str]) -> Parts:
    """EM and F1 of an answer as SQuAD normalises it: the gold with the best F1 (arXiv 1606.05250).

    >>> answer_parts("the 16 percent", ["16 percent", "16"])
    Parts(em=1.0, precision=1.0, recall=1.0, f1=1.0)
    """
    return _best_parts(prediction, golds, lambda text: normalise(text, "paper"))


def slidevqa_parts(prediction: str, golds: Sequence[str], columns: Mapping[str, Any] | None = None) -> Parts:
    """SlideVQA's EM and F1 of an answer, as its evaluate.py normalises it (arXiv 2301.04883).

    Number words up to nineteen become numbers; "percent", fillers and the unit that the question names ("how many
    countries", "which year") are left out; an answer that begins with yes or no is its first word.

    columns: `question`, in the case that it is written in.

    >>> slidevqa_parts("Nine countries", ["9"], {"question": "In how many countries is it sold?"}).f1
    1.0
    """
    question = str((columns or {}).get("question", ""))
    found = _best_parts(prediction, golds, lambda text: _slidevqa_words(text, question))
    return found if found.f1 else Parts(0.0, 0.0, 0.0, 0.0)


_SLIDEVQA_SWAPS = {
    "this is ": "", "it is ": "", "&": ",", "and": ",", "percent": "", "organisation": "organization",
    "because of": "", "because": "", "due to": "", "hours": "hrs", "minites": "min",
}  # fmt: skip
_NUMBER_WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip


def _slidevqa_words(text: str, question: str) -> str:
    text = text.lower()
    for old, new in _SLIDEVQA_SWAPS.items():
        text = text.replace(old, new)
    for asked in ("how many", "which"):
        if unit := question.partition(asked)[2].split():
            text = text.replace(unit[0], "")
    text = re.sub(r"\b(?:an?|the)\b", " ", "".join(one for one in text if one not in string.punctuation))
    words = text.split()[:1] if text.startswith(("yes", "no")) else text.split()
    return " ".join(str(_NUMBER_WORDS.index(word)) if word in _NUMBER_WORDS else word for word in words)


def _best_parts(prediction: str, golds: Sequence[str], normalised: Callable[[str], str]) -> Parts:
    words = normalised(prediction).split()
    best = Parts(0.0, 0.0, 0.0, 0.0)
    for gold in golds:
        wanted = normalised(gold).split()
        shared = (Counter(words) & Counter(wanted)).total()
        precision, recall = (shared / len(words), shared / len(wanted)) if shared else (0.0, 0.0)
        found = Parts(float(words == wanted), precision, recall, _harmonic(precision, recall))
        best = max(best, found, key=lambda parts: (parts.f1, parts.em))
    return best


def page_parts(claimed: Set[int], right: Set[int]) -> Parts:
    """EM, precision, recall and F1 of the pages that an answer rests on; no pages for none are right.

    >>> page_parts({1, 2}, {2})
    Parts(em=0.0, precision=0.5, recall=1.0, f1=0.6666666666666666)
    """
    if not claimed and not right:
        return Parts(1.0, 1.0, 1.0, 1.0)
    hits = len(claimed & right)
    precision, recall = hits / len(claimed) if claimed else 0.0, hits / len(right) if right else 0.0
    return Parts(float(claimed == right), precision, recall, _harmonic(precision, recall))


def joint_parts(answer: Parts, pages: Parts) -> Parts:
    """SlideVQA's joint scores: EM, precision and recall are products, F1 is theirs (HotpotQA, arXiv 1809.09600)."""
    precision, recall = answer.precision * pages.precision, answer.recall * pages.recall
    return Parts(answer.em * pages.em, precision, recall, _harmonic(precision, recall))


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, in any unit."""


def box_parts(claimed: Sequence[Box], right: Sequence[Box], threshold: float = 0.5) -> Parts:
    """Precision, recall and F1 of boxes: a claimed box hits the unmatched one that it overlaps most.

    Overlap is intersection over union, at least `threshold` (PASCAL VOC, IJCV 2010, section 4.2). EM: all boxes are
    hit, and there are no others.

    >>> box_parts([(0, 0, 2, 2)], [(0, 0, 2, 3), (5, 5, 6, 6)]).recall
    0.5
    """
    left = list(right)
    for box in claimed:
        best = max(left, key=lambda other: overlap(box, other), default=None)
        if best is not None and overlap(box, best) >= threshold:
            left.remove(best)
    hits = len(right) - len(left)
    if not claimed and not right:
        return Parts(1.0, 1.0, 1.0, 1.0)
    precision, recall = hits / len(claimed) if claimed else 0.0, hits / len(right) if right else 0.0
    return Parts(float(hits == len(claimed) == len(right)), precision, recall, _harmonic(precision, recall))


def overlap(first: Box, second: Box) -> float:
    """Return intersection over union of two boxes, 0 where both are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return shared / (sum(areas) - shared) if sum(areas) - shared > 0 else 0.0
