"""The rewards of evidence-guided answering, and two monitors.

Blocks and markers are the first occurrence of their tag, found in characters. A reward whose gold column the row does
not have returns None: it did not apply. Formulas are those of the released code (EVisRAG, arXiv 2510.09733).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rewards.api import Credit, Response, RewardError, Span, between, closed, reward
from rewards.text import Mode, containment, normalise, set_f1
from rewards.truth import GoldError, is_texts, plain

NO_EVIDENCE = "no relevant information"
INSUFFICIENT = "insufficient to answer"
BLOCKS = ("observe", "evidence", "think", "answer")

OBSERVED = closed(("<observe>", "</observe>"))
READ = closed(("<evidence>", "</evidence>"))
ANSWERED = closed(("<answer>", "</answer>"))
"""Where a reward that reads one block is decided."""

RELEVANT_WEIGHT = 3
SHORT_GOLD_WORDS = 5

_FOUR_BLOCKS = re.compile(r"\s*".join(rf"<{name}>.*?</{name}>" for name in BLOCKS), re.DOTALL)
_INDEX = re.compile(r"\[\d+\]")
_SLOT_LABEL = re.compile(r"\[([1-9][0-9]{0,3})\]:")
_GOLD_TAG = re.compile(r"</?(answer|evidence)>")
_PLAIN_HINT = "; for rows with plain answers, set data.gold=rewards.gold:plain"


@reward(scope=between("<think>", None), determined=ANSWERED, short="acc", leading=True)
def accuracy(response: Response, *, normalise: Mode = "paper") -> float | None:
    """Set-token F1 of the answer block against the gold answer, best of several; 0 without a closed answer block."""
    golds = _golds(response.truth, "answers")
    if not golds:
        return None
    answer = block_text(response.text, "answer")
    return 0.0 if answer is None else max(set_f1(answer, gold, normalise) for gold in golds)


@reward(scope=between(None, "<think>"), determined=READ, short="evid", leading=True)
def evidence(response: Response, *, normalise: Mode = "paper") -> float | None:
    """Weighted mean of the slot scores, in [0, 1]: slots with evidence weigh 3, slots without weigh 1.

    A slot scores as in `slot_score`; all score 0 without a closed evidence block.
    """
    golds = _golds(response.truth, "evidence")
    if not golds:
        return None
    weights = [1 if _is_irrelevant(gold) else RELEVANT_WEIGHT for gold in golds]
    scores = _slot_scores(response.text, golds, normalise)
    return sum(weight * score for weight, score in zip(weights, scores, strict=True)) / sum(weights)


@reward(short="fmt", leading=True)
def well_formed(response: Response) -> float:
    """1 when the response is the four blocks in order, each tag once and only white space between them; else 0."""
    once = all(response.text.count(tag) == 1 for name in BLOCKS for tag in (f"<{name}>", f"</{name}>"))
    return float(once and _FOUR_BLOCKS.fullmatch(response.text) is not None)


@reward
def overlong(response: Response, *, min_tokens: int = 200, max_tokens: int = 1536, buffer_tokens: int = 512) -> float:
    """-1 under `min_tokens`, then 0 up to `max_tokens - buffer_tokens`, then linear down to -1 at `max_tokens`."""
    limit = max_tokens - buffer_tokens
    if buffer_tokens < 1 or limit < min_tokens:
        raise RewardError(
            f"overlong needs buffer_tokens >= 1 and min_tokens <= max_tokens - buffer_tokens, got "
            f"min_tokens={min_tokens}, max_tokens={max_tokens}, buffer_tokens={buffer_tokens}"
        )
    if response.num_tokens < min_tokens:
        return -1.0
    return max(min(limit - response.num_tokens, 0) / buffer_tokens, -1.0)


@reward(scope=between(None, "<evidence>"), determined=OBSERVED)
def no_early_index(response: Response) -> float:
    """-1 when the observe block already cites a page index such as [2]; else 0."""
    return -1.0 if _INDEX.search(block_text(response.text, "observe") or "") else 0.0


@reward(scope=between("<think>", "<answer>"), determined=closed(("<think>", "</think>"), ("<answer>", "</answer>")))
def think_differs(response: Response) -> float:
    """-1 when the think block equals the answer block, except for outer white space (no derivation); else 0."""
    think, answer = block_text(response.text, "think"), block_text(response.text, "answer")
    return -1.0 if think is not None and answer is not None and think.strip() == answer.strip() else 0.0


@reward(scope=between(None, "<think>"), determined=READ, short="perc", leading=True)
def perception(response: Response, *, normalise: Mode = "paper") -> float | None:
    """Unweighted mean over slots, as the paper writes it: token F1, or 1 if a page without evidence is marked so."""
    golds = _golds(response.truth, "evidence")
    if not golds:
        return None
    total = 0.0
    for gold, slot in zip(golds, _slot_texts(response.text, len(golds)), strict=True):
        if slot is not None:
            total += float(_is_irrelevant(slot)) if _is_irrelevant(gold) else set_f1(slot, gold, normalise)
    return total / len(golds)


@reward(scope=between("<evidence>", "</evidence>"))
def evidence_slots(response: Response, *, normalise: Mode = "paper") -> tuple[Credit, ...] | None:
    """One credit per page: the slot's score (`slot_score`), taught to that slot's own characters, label included.

    A missing slot scores 0 and teaches nothing. Spans do not overlap, even where slots are written out of order. All
    are determined where the block is closed: before that, every slot could still count for nothing.
    """
    golds = _golds(response.truth, "evidence")
    if not golds:
        return None
    scores = _slot_scores(response.text, golds, normalise)
    spans = _slot_spans(response.text, len(golds))
    starts = sorted(span.start for span in spans if span is not None)
    credits = []
    for number, (score, span) in enumerate(zip(scores, spans, strict=True), start=1):
        if span is not None:
            span = Span(span.start, min([start for start in starts if start > span.start] + [span.end]))
        credits.append(Credit(f"slot{number}", score, span, READ(response)))
    return tuple(credits)


@reward
def marked_rate(response: Response) -> float | None:
    """Monitor: share of the written evidence slots that claim evidence; None without a closed evidence block.

    An empty slot claims nothing, and a block without slots counts as 0. Watch it: a policy that learns to mark no page
    still earns a fair evidence score.
    """
    slots = written_slots(response.text)
    if slots is None:
        return None
    return sum(bool(slot.strip()) and not _is_irrelevant(slot) for slot in slots.values()) / max(len(slots), 1)


@reward
def abstained(response: Response) -> float:
    """Monitor: 1 when the answer block says that the pages are insufficient to answer; else 0."""
    return containment(block_text(response.text, "answer") or "", INSUFFICIENT)


def slot_score(slot: str | None, gold: str, mode: Mode = "paper") -> float:
    """Score one slot: token F1 for a gold of five words or more, else 1 if it contains the gold; 0 if missing."""
    if slot is None:
        return 0.0
    return (containment if len(gold.split()) < SHORT_GOLD_WORDS else set_f1)(slot, gold, mode)


def gold_response(truth: Mapping[str, Any]) -> str:
    """Return the shortest well-formed response that says the gold evidence and the (first) gold answer.

    Every reward gives it its maximum; for `overlong` that depends on its length in tokens. Without gold evidence the
    evidence block is empty.

    Raises:
        RewardError: there is no gold answer, or a gold text has a tag or slot label in it, so that no response can
            repeat it.
    """
    golds, answers = _golds(truth, "evidence") or (), _golds(truth, "answers")
    if not answers:
        raise RewardError(f"a gold response needs truth with 'answers', got the columns {sorted(truth)}")
    slots = "".join(f"[{number}]: {gold.strip()}\n" for number, gold in enumerate(golds, start=1))
    answer = answers[0].strip()
    text = (
        "<observe>The pages are read one by one with the question in mind.</observe>\n"
        f"<evidence>\n{slots}</evidence>\n"
        f"<think>What the evidence leads to: {answer}</think>\n"
        f"<answer>{answer}</answer>"
    )
    if not well_formed(Response(text)):
        raise RewardError(f"a gold text contains a block tag. Remove it from the row: {text!r:.400}")
    for number, (gold, slot) in enumerate(zip(golds, _slot_texts(text, len(golds)), strict=True), start=1):
        if slot is None or slot.strip() != gold.strip():
            raise RewardError(
                f"the gold evidence of page {number} cannot be read back, because a gold text contains a slot label "
                f"such as [{number + 1}]:. Remove it from the row: {golds!r:.400}"
            )
    return text


def parse_gold(text: str) -> dict[str, list[str]]:
    """Return the truth columns of gold text: `evidence` if it has a closed block, and `answers`.

    Text without an answer block (and without evidence) is the answer itself.

    >>> parse_gold("<evidence>[1]: 16%</evidence><answer>16%</answer>")
    {'evidence': ['16%'], 'answers': ['16%']}
    """
    truth: dict[str, list[str]] = {}
    block = _block_span(text, "evidence")
    if block is not None:
        num_slots, position = 0, block.start
        while (position := text.find(f"[{num_slots + 1}]:", position, block.end)) >= 0:
            num_slots += 1
        truth["evidence"] = [(slot or "").strip() for slot in _slot_texts(text, num_slots)]
    answer = block_text(text, "answer")
    if answer is not None:
        truth["answers"] = [answer.strip()]
    elif block is None:
        truth["answers"] = [text.strip()]
    return truth


def has_gold_tags(answer: Any) -> bool:
    """Whether an answer column, a text or a list of texts, writes a tag of gold text."""
    return _GOLD_TAG.search(" ".join(answer) if is_texts(answer) else str(answer)) is not None


def read_gold(answer: Any, columns: Mapping[str, Any], num_images: int) -> dict[str, Any]:
    """Return a row's truth (`rewards.truth`): its columns with `answers`, `evidence` (if known) and `gold` (if text).

    answer: text with <evidence> and <answer> blocks; or, beside an `evidence` column, plain text; or a list of accepted
        plain answers.
    columns: the row's other ones; `evidence`, a list of one text per image, counts where the answer has no such block.

    Raises:
        GoldError: there is no gold answer, it lacks its tags, or the evidence is not one text per image.
    """
    evidence = columns.get("evidence")
    truth = plain(answer, {name: value for name, value in columns.items() if name != "evidence"})
    is_text = isinstance(answer, str)
    if not is_text and has_gold_tags(answer):
        raise GoldError("unusable gold", f"a list of answers must hold plain texts, got {answer!r:.80}")
    if is_text and (evidence is None or has_gold_tags(answer)):
        if block_text(answer, "answer") is None:
            raise GoldError("gold answer without <answer> tags", f"got {answer!r:.80}{_PLAIN_HINT}")
        truth.update(parse_gold(answer))
        if not any(truth["answers"]):
            raise GoldError("no gold answer", f"the answer in its tags is empty: {answer[-80:]!r}")
    if "evidence" not in truth:
        if evidence is not None and not is_texts(evidence):
            raise GoldError(
                "unusable gold", f"column 'evidence' must be a list, one text per image, got {evidence!r:.80}"
            )
        if evidence is None and is_text:
            raise GoldError("gold answer without <evidence> tags", f"got {answer!r:.80}{_PLAIN_HINT}")
        if evidence is not None:
            truth["evidence"] = list(evidence)
    entries = truth.get("evidence")
    if entries is not None and len(entries) != num_images:
        raise GoldError(
            "evidence entries differ from images", f"gold evidence has {len(entries)} entries for {num_images} images"
        )
    return truth


def _golds(truth: Mapping[str, Any], column: str) -> list[str] | None:
    """Return a gold column as texts; None where the row (or one of its entries) has none. A bare value is one gold."""
    value = truth.get(column)
    golds = [value] if value is None or isinstance(value, str | int | float) else list(value)
    return None if None in golds else [str(gold) for gold in golds]


def _is_irrelevant(text: str) -> bool:
    """Whether a slot says exactly that its page holds no evidence; a slot that says more claims something."""
    return normalise(text) == NO_EVIDENCE


def _block_span(text: str, name: str) -> Span | None:
    """Return the characters inside the first block of a name; None if it is not opened, or not closed after that."""
    start = text.find(f"<{name}>")
    end = text.find(f"</{name}>", start)
    return Span(start + len(name) + 2, end) if 0 <= start < end else None


def block_text(text: str, name: str) -> str | None:
    """Return what is inside the first block of a name; None if it is not opened, or not closed after that."""
    span = _block_span(text, name)
    return None if span is None else text[span.start : span.end]


def written_slots(text: str) -> dict[int, str] | None:
    """Return page number -> what its slot says, ascending; None without a closed evidence block."""
    block = _block_span(text, "evidence")
    if block is None:
        return None
    numbers = sorted({int(label) for label in _SLOT_LABEL.findall(text, block.start, block.end)})
    return {number: _slot_text(text, _slot_span(text, block, number)) or "" for number in numbers}


def _slot_span(text: str, block: Span, number: int) -> Span | None:
    """Return slot `[number]:`, label included: from its first label to the next `[number + 1]:`, else to the end."""
    start = text.find(f"[{number}]:", block.start, block.end)
    if start < 0:
        return None
    end = text.find(f"[{number + 1}]:", start, block.end)
    return Span(start, end if end >= 0 else block.end)


def _slot_text(text: str, span: Span | None) -> str | None:
    """Return what a slot says, without its label; None for a missing slot."""
    return None if span is None else text[text.index("]:", span.start) + 2 : span.end]


def _slot_spans(text: str, num_slots: int) -> list[Span | None]:
    block = _block_span(text, "evidence")
    return [block and _slot_span(text, block, number) for number in range(1, num_slots + 1)]


def _slot_texts(text: str, num_slots: int) -> Iterator[str | None]:
    return (_slot_text(text, span) for span in _slot_spans(text, num_slots))


def _slot_scores(text: str, golds: list[str], mode: Mode) -> list[float]:
    return [slot_score(slot, gold, mode) for gold, slot in zip(golds, _slot_texts(text, len(golds)), strict=True)]
