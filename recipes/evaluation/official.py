"""The rules by which benchmarks score an answer, as pure functions; each names the source of its rule.

A function takes the predicted answer, the accepted ones and the row's other columns, and returns a number in [0, 1].
The best of several accepted answers counts, unless a rule says otherwise.
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from rewards.text import normalise

ANLS_THRESHOLD = 0.5
Columns = Mapping[str, Any]
Scorer = Callable[[str, Sequence[str], Columns], float]


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a benchmark's answers are scored. version: of our reading of the rule; it changes with any score."""

    name: str
    version: str
    source: str
    scorer: Scorer


def edit_distance(first: str, second: str) -> int:
    """Return the Levenshtein distance in characters.

    >>> edit_distance("kitten", "sitting")
    3
    """
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        previous, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


def similarity(prediction: str, gold: str) -> float:
    """Return 1 - distance / longer length, 0 where that is at most one half; texts are compared as they are."""
    longer = max(len(prediction), len(gold))
    found = 1 - edit_distance(prediction, gold) / longer if longer else 1.0
    return found if found > ANLS_THRESHOLD else 0.0


def anls(prediction: str, golds: Sequence[str], columns: Columns | None = None) -> float:
    """Average normalised Levenshtein similarity of one answer: case and white space do not count (arXiv 1907.00490).

    >>> anls("Anderson's", ["andersons"])
    0.9
    """
    return max((similarity(_plain(prediction), _plain(gold)) for gold in golds), default=0.0)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def relaxed(prediction: str, golds: Sequence[str], columns: Columns | None = None) -> float:
    """ChartQA's relaxed accuracy: numbers within 5%, other texts equal but for case (arXiv 2203.10244, section 5.1).

    A percent sign divides by 100; a gold of 0 is compared as text.

    >>> relaxed("52.4", ["50"]), relaxed("53", ["50"]), relaxed("50%", ["0.5"])
    (1.0, 0.0, 1.0)
    """
    return float(any(_relaxed(prediction.strip(), gold.strip()) for gold in golds))


def _relaxed(prediction: str, gold: str) -> bool:
    value, wanted = _number(prediction), _number(gold)
    if value is not None and wanted:
        return abs(value - wanted) / abs(wanted) <= 0.05
    return prediction.lower() == gold.lower()


def _number(text: str) -> float | None:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def chartqapro(prediction: str, golds: Sequence[str], columns: Columns | None = None) -> float:
    """ChartQAPro: 5% for numbers, ANLS for texts, equality for years and choices, lists by item (arXiv 2504.05506).

    columns: `year`, "YES" or "NO" (one per item of a list); `question_type`: fact checking and choices are exact.

    >>> chartqapro("2019", ["2020"], {"year": "YES"}), chartqapro("[10, cats]", ["[10.2, cat]"])
    (0.0, 0.875)
    """
    given = columns or {}
    is_exact = str(given.get("question_type", "")).lower() in ("fact checking", "multi choice", "multiple choice")
    return max((_chartqapro(prediction, gold, given.get("year"), is_exact) for gold in golds), default=0.0)


def _chartqapro(prediction: str, gold: str, years: Any, is_exact: bool) -> float:
    wanted, found = _items(gold), _items(prediction)
    flags = [str(flag).upper() == "YES" for flag in (years if isinstance(years, list | tuple) else [years])]
    flags = flags if len(flags) == len(wanted) else [flags[0] if flags else False] * len(wanted)
    if len(found) < len(wanted):
        found = [*found, *[""] * (len(wanted) - len(found))]
    scores = []
    for index, target in enumerate(wanted):
        given = found[index]
        if is_exact or flags[index]:
            scores.append(float(given.strip().lower() == target.strip().lower()))
        elif _number(target) is not None:
            scores.append(float(_relaxed(given, target)))
        else:
            scores.append(anls(given, [target]))
    return sum(scores) / max(len(wanted), len(found), 1)


def _items(text: str) -> list[str]:
    """Return the items of a list that is written in brackets; any other text is one item."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return [text]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text[1:-1].split(",")
    return [str(item).strip().strip("'\"") for item in (value if isinstance(value, list) else [value])]


def mmlongbench(prediction: str, golds: Sequence[str], columns: Columns | None = None) -> float:
    """MMLongBench-Doc's rules for an extracted answer (arXiv 2407.01523, appendix; its eval_score.py).

    columns: `answer_format`: Int, Float, Str, List or None. Int: equal as whole numbers. Float: within 1%, also times
    or by 100. Str and None: similarity; addresses, dates, times and numbers must be equal. List: as many items,
    sorted; the worst similarity, or equality where the first gold item is a number or such a text.

    >>> mmlongbench("12.5%", ["0.125"], {"answer_format": "Float"}), mmlongbench("7", ["7"], {"answer_format": "Int"})
    (1.0, 1.0)
    """
    kind = str((columns or {}).get("answer_format") or "Str").lower()
    rule = {"int": _whole_equal, "float": _float_equal, "list": _lists_equal}.get(kind, _strings_equal)
    return max((rule(prediction, gold) for gold in golds), default=0.0)


def _whole_equal(prediction: str, gold: str) -> float:
    try:
        return float(int(gold) == int(float(prediction)))
    except (ValueError, OverflowError):
        return 0.0


def _float_equal(prediction: str, gold: str) -> float:
    try:
        value, wanted = float(_clean(prediction)), float(_clean(gold))
    except ValueError:
        return 0.0
    return float(any(math.isclose(value, one, rel_tol=0.01) for one in (wanted / 100, wanted, wanted * 100)))


def _strings_equal(prediction: str, gold: str) -> float:
    value, wanted = _clean(prediction), _clean(gold)
    return float(value == wanted) if _must_be_equal(wanted) else similarity(value, wanted)


def _lists_equal(prediction: str, gold: str) -> float:
    found, wanted = sorted(map(_clean, _items(prediction))), sorted(map(_clean, _items(gold)))
    if len(found) != len(wanted):
        return 0.0
    if _number(wanted[0]) is not None or _must_be_equal(wanted[0]):
        return float(found == wanted)
    return min(similarity(left, right) for left, right in zip(found, wanted, strict=True))


def _clean(text: str) -> str:
    """Lower case, without what is in parentheses, quotes around it, a leading dollar and a trailing percent sign."""
    text = re.sub(r"\s*\([^)]*\)", "", text.lower().strip()).strip()
    text = re.sub(r"^['\"]|['\"]$", "", text).strip()
    return text.lstrip("$").strip().rstrip("%").strip()


def _must_be_equal(text: str) -> bool:
    return (
        "https://" in text
        or text.endswith((".py", "ipynb"))
        or text.startswith("page")
        or "a.m." in text
        or "p.m." in text
        or re.fullmatch(r"\d+(-\d+|\s\d+)?|\d{4}[-\s]\d{2}([-\s]\d{2})?", text) is not None
        or re.fullmatch(r"[\w.%+-]+@[\w.-]+\.[a-z]{2,}", text) is not None
    )


@dataclass(frozen=True, slots=True)
class Parts:
    """Exact match, precision, recall and F1 of an answer or of its pages."""

    em: float
    precision: float
    recall: float
    f1: float


def answer_parts(prediction: str, golds: Sequence[str]) -> Parts:
    """SlideVQA's EM and F1 of an answer, as SQuAD normalises it: the gold with the best F1 (arXiv 2301.04883).

    >>> answer_parts("the 16 percent", ["16 percent", "16"])
    Parts(em=1.0, precision=1.0, recall=1.0, f1=1.0)
    """
    words = normalise(prediction, "paper").split()
    best = Parts(0.0, 0.0, 0.0, 0.0)
    for gold in golds:
        wanted = normalise(gold, "paper").split()
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


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("anls", "1", "arXiv 1907.00490; DocVQA, InfographicVQA, MP-DocVQA", anls),
        Protocol("relaxed", "1", "arXiv 2203.10244, section 5.1; ChartQA", relaxed),
        Protocol("chartqapro", "1", "arXiv 2504.05506; ChartQAPro", chartqapro),
        Protocol("mmlongbench", "1", "arXiv 2407.01523, eval_score.py; MMLongBench-Doc", mmlongbench),
        Protocol("slidevqa", "1", "arXiv 2301.04883; SlideVQA's F1 of answers", lambda p, g, c: answer_parts(p, g).f1),
    )
}
