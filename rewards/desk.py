"""The rewards of a policy that looks for its pages, from the facts that the page desk notes about each turn.

An environment that notes `call`, `page`, `number` and `box` as the desk does can use them too. What a row lacks makes a
reward not apply. A reward that reads the whole way to the answer is decided at the response's end, unless its score
cannot change any more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rewards.api import Response, RewardError, Turn, reward
from rewards.evisrag import ANSWERED, NO_EVIDENCE, block_text
from rewards.text import Mode, normalise, set_f1

BAD_CALL = "bad_call"
Box = Sequence[float]
_SLOT = re.compile(r"\[(\d{1,6})\]:")


@reward(determined=ANSWERED, short="acc", leading=True)
def answer_f1(response: Response, *, normalise: Mode = "paper") -> float | None:
    """Set-token F1 of the answer block against the gold answer, best of several; 0 without a closed answer block."""
    golds = [str(gold) for gold in response.truth.get("answers") or ()]
    if not golds:
        return None
    answer = block_text(response.text, "answer")
    return 0.0 if answer is None else max(set_f1(answer, gold, normalise) for gold in golds)


def all_opened(response: Response) -> int | None:
    """Return the character behind the turn that opened the last of the gold pages; None if one was never opened."""
    missing = set(response.truth.get("gold_pages") or ())
    for turn in response.turns:
        missing.discard(_opened(turn))
        if not missing:
            return turn.span.end
    return None


@reward(determined=all_opened, short="found", leading=True)
def gold_opened(response: Response) -> float | None:
    """Share of the row's `gold_pages` that were opened, or zoomed in on; decided by the turn that opened the last."""
    gold = set(response.truth.get("gold_pages") or ())
    if not gold:
        return None
    return len(gold & {_opened(turn) for turn in response.turns}) / len(gold)


@reward(short="cited")
def cites_opened(response: Response) -> float:
    """Share of the pages cited as evidence that were opened; 0 where nothing is cited.

    A slot `[n]:` of the evidence block that claims something cites page n. A page that a search showed small is not
    opened.
    """
    cited = cited_numbers(response.text)
    opened = {turn.facts.get("number") for turn in response.turns if _opened(turn)}
    return sum(number in opened for number in cited) / len(cited) if cited else 0.0


def cited_numbers(text: str) -> set[int]:
    """Return the numbers of the pages that the evidence block claims something of."""
    _, *slots = _SLOT.split(block_text(text, "evidence") or "")
    pairs = zip(slots[::2], slots[1::2], strict=True)
    return {int(number) for number, slot in pairs if normalise(slot) not in ("", NO_EVIDENCE)}


@reward(short="iou")
def region_overlap(response: Response) -> float | None:
    """Largest overlap (intersection over union) of a zoom on a gold page with the row's `gold_box`.

    gold_box: left, top, right and bottom, as shares of the page. 0 without a zoom.
    """
    gold = response.truth.get("gold_box")
    if gold is None:
        return None
    pages = set(response.truth.get("gold_pages") or ())
    boxes = [turn.facts["box"] for turn in response.turns if "box" in turn.facts and turn.facts.get("page") in pages]
    return max((overlap(box, gold) for box in boxes), default=0.0)


@reward(short="cost")
def call_cost(response: Response, *, cost: float = 0.05, free: int = 0) -> float:
    """Minus `cost` for each call beyond the first `free` ones, malformed ones included."""
    if cost < 0 or free < 0:
        raise RewardError(f"call_cost needs cost >= 0 and free >= 0, got cost={cost}, free={free}")
    return -cost * max(0, num_calls(response) - free)


def first_fault(response: Response) -> int | None:
    """Return the character behind the first malformed call; None if there is none."""
    return next((turn.span.end for turn in response.turns if turn.fault == BAD_CALL), None)


@reward(determined=first_fault, short="bad")
def well_called(response: Response) -> float:
    """-1 when a call is malformed or names an unknown page, decided by the first one; else 0."""
    return -float(first_fault(response) is not None)


@reward
def calls(response: Response) -> float:
    """Monitor: calls per response."""
    return float(num_calls(response))


@reward
def zooms(response: Response) -> float:
    """Monitor: zooms per response."""
    return float(sum(turn.facts.get("call") == "zoom" for turn in response.turns))


def num_calls(response: Response) -> int:
    """Return how many turns called something, whether or not it could be done."""
    return sum(bool(turn.facts.get("call") or turn.fault) for turn in response.turns)


def overlap(one: Box, other: Box) -> float:
    """Return the intersection over union of two boxes (left, top, right, bottom); 0 where a box has no area.

    >>> overlap((0, 0, 1, 1), (0.5, 0, 1, 1))
    0.5
    """
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(area) - width * height)


def _opened(turn: Turn) -> Any:
    """Return the id of the page that a turn showed in full or in part; None if it showed none."""
    return turn.facts.get("page") if not turn.fault else None
