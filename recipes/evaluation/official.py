"""The rules by which benchmarks score an answer, as pure functions; each names the source of its rule.

Where a paper and the program that published numbers were made with disagree, the program counts: its numbers are the
ones to compare with. A function takes the predicted answer, the accepted ones and the row's other columns, and returns
a number in [0, 1]. The best of several accepted answers counts, unless a rule says otherwise.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.evaluation.parts import Parts, slidevqa_parts

ANLS_THRESHOLD = 0.5
NOT_ANSWERABLE = "Not answerable"
Columns = Mapping[str, Any]
Scorer = Callable[[str, Sequence[str], Columns], float]


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a benchmark's answers are scored. version: of our reading of the rule; it changes with any score.

    parts: EM, precision, recall and F1 of an answer, where the benchmark also scores answer and pages jointly.
    abstention: what an answer that abstains is read as; "" leaves it as written.
    reads: columns that choose the rule for a row, each in its spellings.
    is_judged: what is scored is another model's mark, not the answer.
    """

    name: str
    version: str
    source: str
    scorer: Scorer
    parts: Callable[[str, Sequence[str], Columns], Parts] | None = None
    abstention: str = ""
    reads: tuple[tuple[str, ...], ...] = ()
    is_judged: bool = False


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


def anls(prediction: str, golds: Sequence[str], columns: Columns | None = None) -> float:
    """Average normalised Levenshtein similarity of one answer: case and white space do not count (arXiv 1907.00490).

    A similarity below one half is 0. Exactly one half counts, as in the programs that published numbers come from
    (MP-DocVQA's, lmms-eval's, VLMEvalKit's); the paper's formula has 0 there. The distance is divided by the length of
    the longer text as written.

    >>> anls("Anderson's", ["andersons"]), anls("12", ["13"])
    (0.9, 0.5)
    """
    best = max(
        (_similarity(_plain(prediction), _plain(gold), _longer(prediction, gold)) for gold in golds), default=0.0
    )
    return best if best >= ANLS_THRESHOLD else 0.0


def above_half(prediction: str, gold: str) -> float:
    """Return the similarity of two texts as they are; 0 where it is one half or less."""
    found = _similarity(prediction, gold, _longer(prediction, gold))
    return found if found > ANLS_THRESHOLD else 0.0


def _similarity(prediction: str, gold: str, length: int) -> float:
    return 1 - edit_distance(prediction, gold) / length if length else 1.0


def _longer(one: str, other: str) -> int:
    return max(len(one.upper()), len(other.upper()))


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
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def chartqapro(prediction: str, golds: Sequence[str], columns: Columns | None = None) -> float:
    """ChartQAPro: 5% for numbers, ANLS for texts, equality for years and choices, lists by item (arXiv 2504.05506).

    A percent sign and a full stop at the end do not count. A list is one that Python reads; a gold may lack the quotes.

    columns: `Year`, "YES" or "NO" (one per item of a list; the last of a conversation's); `Question Type`: facts to
    check and choices are exact. `year` and `question_type` are read too.

    >>> chartqapro("2019", ["2020"], {"Year": "YES"}), chartqapro("[10, 'cats']", ["[10.2, cat]"])
    (0.0, 0.875)
    """
    given = columns or {}
    kind = str(given.get("Question Type", given.get("question_type", ""))).lower()
    years = given.get("Year", given.get("year")) or ["NO"]
    years = [str(one).upper() == "YES" for one in (years if isinstance(years, list | tuple) else [years])]
    is_exact = kind in ("fact checking", "multi choice", "multiple choice")
    years = years[-1:] if kind == "conversational" else years
    return max((_chartqapro(prediction, gold, years, is_exact=is_exact) for gold in golds), default=0.0)


def _chartqapro(prediction: str, gold: str, years: Sequence[bool], *, is_exact: bool) -> float:
    found, wanted = _items(prediction.strip(".").strip("\n")), _items(gold.strip(".").strip("\n"), may_lack_quotes=True)
    years = [*years] * len(wanted) if len(years) < len(wanted) else years
    scores = [
        float(given.strip().lower() == target.strip().lower()) if is_exact or exact else _close(given, target)
        for given, target, exact in zip(found, wanted, years, strict=False)
    ]
    return sum(scores) / max(len(wanted), len(found))


def _close(prediction: str, gold: str) -> float:
    prediction, gold = prediction.strip().strip("%").strip(), gold.strip().strip("%").strip()
    value, wanted = _number(prediction), _number(gold)
    if value is None or wanted is None:
        return above_half(_plain(prediction), _plain(gold))
    return float(abs(value - wanted) / abs(wanted) <= 0.05 if wanted else value == 0)


def _items(text: str, *, may_lack_quotes: bool = False) -> list[str]:
    """Return the items of a list that Python reads; any other text is one item."""
    found = _list_of(text)
    bare = re.fullmatch(r"\[(.*\S.*)\]", text.strip())
    if not found and may_lack_quotes and bare:
        found = bare[1].split(",")
    return [str(item).strip(" '") for item in found] if found else [text]


def _list_of(text: str) -> list[Any] | None:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def mmlongbench(prediction: str, golds: Sequence[str], columns: Columns | None = None) -> float:
    """MMLongBench-Doc's rules for an extracted answer (arXiv 2407.01523, appendix; its eval_score.py).

    columns: `answer_format`: Int, Float, Str, List or None. Int: equal as whole numbers. Float: within 1%, or equal
    when both are rounded to two decimals or more, also times or by 100. Str and None: similarity; addresses, dates,
    times and numbers must be equal. List, as Python reads it: as many items, sorted; the worst similarity, or equality
    where the first gold item is a number or such a text.

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
    value, wanted = _number_in(_clean(prediction)), _number_in(_clean(gold))
    if value is None or wanted is None:
        return 0.0
    return float(any(_rounds_to(value, one) for one in (wanted / 100, wanted, wanted * 100)))


def _number_in(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _rounds_to(value: float, wanted: float) -> bool:
    """Whether two numbers are within 1%, or equal at as many decimals as the one that has fewer, but at least two."""
    decimals = max(2, min(len(str(one).partition(".")[2]) or 3 for one in (value, wanted)))
    return math.isclose(wanted, value, rel_tol=0.01) or round(value, decimals) == round(wanted, decimals)


def _strings_equal(prediction: str, gold: str) -> float:
    value, wanted = _clean(prediction), _clean(gold)
    return float(value == wanted) if _must_be_equal(wanted) else above_half(value, wanted)


def _lists_equal(prediction: str, gold: str) -> float:
    found, wanted = (_list_of(text) if text.startswith("[") else [text] for text in (prediction, gold))
    if not found or not wanted or len(found) != len(wanted):
        return 0.0
    found, wanted = (sorted(_clean(str(item)) for item in items) for items in (found, wanted))
    if _number_in(wanted[0]) is not None or _must_be_equal(wanted[0]):
        return float("-".join(found) == "-".join(wanted))
    return min(above_half(left, right) for left, right in zip(found, wanted, strict=True))


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
        or re.fullmatch(r"[a-z0-9._%+-]+@[a-z0-9.-]+\.[a-z]{2,}", text) is not None
    )


def vidoseek(mark: str, golds: Sequence[str], columns: Columns | None = None) -> float:
    """ViDoSeek: an answer is right that another model marks with 4 or 5 of 5 (arXiv 2502.18017).

    mark: its reply; the first number in it counts, and a reply without one is 0.

    >>> vidoseek("4", []), vidoseek("3.5", []), vidoseek("cannot say", [])
    (1.0, 0.0, 0.0)
    """
    found = re.search(r"\d+(?:\.\d+)?", mark)
    return float(found is not None and 4 <= float(found[0]) <= 5)


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("anls", "2", "arXiv 1907.00490; DocVQA, InfographicVQA, MP-DocVQA", anls),
        Protocol("relaxed", "1", "arXiv 2203.10244, section 5.1; ChartQA", relaxed),
        Protocol(
            "chartqapro",
            "2",
            "arXiv 2504.05506, evaluate_predictions.py; ChartQAPro",
            chartqapro,
            reads=(("Year", "year"), ("Question Type", "question_type")),
        ),
        Protocol(
            "mmlongbench",
            "2",
            "arXiv 2407.01523, eval_score.py; MMLongBench-Doc",
            mmlongbench,
            abstention=NOT_ANSWERABLE,
            reads=(("answer_format",),),
        ),
        Protocol(
            "slidevqa",
            "2",
            "arXiv 2301.04883, evaluate.py; SlideVQA",
            lambda prediction, golds, columns: slidevqa_parts(prediction, golds, columns).f1,
            parts=slidevqa_parts,
        ),
        Protocol("vidoseek", "1", "arXiv 2502.18017; ViDoSeek, judged by another model", vidoseek, is_judged=True),
    )
}
