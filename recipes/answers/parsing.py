"""Split a model's text into its four blocks, evidence slots and citations. Never raises, whatever the text is.

The strict reader sees what the rewards see (`rewards.evisrag`): the first closed block of each name. The lenient one
also keeps what can be recovered from a truncated, repeated or nested output. Both list the same faults.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rewards.api import Response
from rewards.evisrag import BLOCKS, INSUFFICIENT, NO_EVIDENCE, block_text, well_formed, written_slots
from rewards.text import containment, normalise
from rollout.inputs.packed import PackedImage
from rollout.types import ImageSource

_TAG = re.compile(rf"< ?(/?) ?({'|'.join(BLOCKS)}) ?>", re.IGNORECASE)
_PARTIAL_TAG = re.compile(r"< ?/? ?([A-Za-z]{0,8}) ?$")
_NUMBER = "([1-9][0-9]{0,3})"
_LOOSE_LABEL = re.compile(
    rf"^[ \t>*\u2022\u2013-]*\[{_NUMBER}\][*]*[ \t]*[:\uff1a.)-]?|\[{_NUMBER}\][*]*[ \t]*[:\uff1a]", re.MULTILINE
)
_PARTIAL_LABEL = re.compile(r"^[ \t]*\[[0-9]{0,4}\Z", re.MULTILINE)
_CITED = re.compile(r"\[([1-9][0-9]{0,3}(?:[ \t]*,[ \t]*[1-9][0-9]{0,3})*)\]")
_NAMED_PAGE = re.compile(rf"\b(?:page|image)s?[ \t]+{_NUMBER}\b", re.IGNORECASE)
NOT_ANSWERABLE = "not answerable"
_NOTHING_FOUND = (NO_EVIDENCE, "no relevant info", "not relevant", "irrelevant", "none", "na", "no evidence")


@dataclass(frozen=True, slots=True)
class Form:
    """What a response was asked to be, which decides what counts as a fault.

    blocks: that it needs. is_all: nothing else may be around them. every_page: the evidence has a slot for each page.
    """

    blocks: tuple[str, ...] = BLOCKS
    is_all: bool = True
    every_page: bool = True


FOUR_BLOCKS = Form()
TRAJECTORY = Form(("answer",), is_all=False, every_page=False)
"""What a policy of several turns needs: an answer, wherever it writes its calls and thoughts."""


@dataclass(frozen=True, slots=True)
class Slot:
    """What the evidence block says of one page.

    index: page number, from 1, in the order the pages were shown.
    image: that page's path; None where it is not known, or where there is no such page.
    relevant: whether the slot claims evidence: it is neither empty nor "no relevant information".
    """

    index: int
    image: str | None
    relevant: bool
    text: str


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """A response, read.

    answer, observe, think: the text of these blocks, "" where there is none.
    insufficient: the answer says that the pages do not settle the question.
    evidence: the slots, by page number, each number once.
    citations: page numbers that the reasoning or the answer names, ascending.
    format_ok: the response is the four blocks and nothing else, as the reward `well_formed` wants it.
    errors: what is wrong with the response, for people; may be non-empty when `format_ok` (a missing slot).
    """

    answer: str
    insufficient: bool
    observe: str
    evidence: tuple[Slot, ...]
    think: str
    citations: tuple[int, ...]
    format_ok: bool
    errors: tuple[str, ...]

    @property
    def claimed_pages(self) -> frozenset[int]:
        """Numbers of the pages for which the evidence block claims something."""
        return frozenset(slot.index for slot in self.evidence if slot.relevant)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return dataclasses.asdict(self) | {"evidence": [dataclasses.asdict(slot) for slot in self.evidence]}


def parse_strict(text: str, images: Sequence[ImageSource] | None = None) -> ParsedAnswer:
    """Read only what the rewards read: of each name the first opening tag up to the next closing one.

    images: the pages that were shown; None when their number is not known.
    """
    blocks = {name: block_text(text, name) for name in BLOCKS}
    return _assemble(text, blocks, written_slots(text) or {}, images)


def parse_lenient(text: str, images: Sequence[ImageSource] | None = None) -> ParsedAnswer:
    """Read all that can be read; a well-formed response reads as in `parse_strict`.

    A block without its closing tag ends at the next tag or at the end of the text. Tags may be in any case, also
    nested. Of several answers the last closed one counts, with the blocks before it. Text without any tag is an answer.
    """
    if well_formed(Response(text)):
        return parse_strict(text, images)
    blocks, is_cut = _recover(text)
    num_images = None if images is None else len(images)
    return _assemble(text, blocks, _loose_slots(blocks["evidence"] or "", num_images), images, is_cut=is_cut)


def parse_trajectory(
    text: str, last_turn: int, images: Sequence[ImageSource] | None = None, form: Form = TRAJECTORY
) -> ParsedAnswer:
    """Read the turns of a policy that an environment answered, leniently.

    Without any block the last turn is the answer, so that a call never is.

    Args:
        last_turn: where in the text the turn begins that nothing answered; at its end there is none.
        images: the pages that the policy was shown, by the numbers that it knows.
    """
    if not _TAG.search(text):
        text = text[last_turn:].strip()
    blocks, is_cut = _recover(text)
    slots = _loose_slots(blocks["evidence"] or "", None if images is None else len(images))
    return _assemble(text, blocks, slots, images, is_cut=is_cut, form=form)


def says_insufficient(answer: str) -> bool:
    """Whether an answer abstains: it says that the pages are insufficient to answer, or hold nothing relevant.

    MMLongBench-Doc's "Not answerable" abstains too.
    """
    return containment(answer, INSUFFICIENT) == 1.0 or normalise(answer) in (NO_EVIDENCE, NOT_ANSWERABLE)


def is_irrelevant(slot: str) -> bool:
    """Whether a slot's text claims no evidence."""
    return normalise(slot) in ("", NO_EVIDENCE)


def _assemble(
    text: str,
    blocks: dict[str, str | None],
    slots: dict[int, str],
    images: Sequence[ImageSource] | None,
    *,
    is_cut: bool = False,
    form: Form = FOUR_BLOCKS,
) -> ParsedAnswer:
    """Put the pieces together. is_cut: the evidence block stops in the middle of its last slot."""
    answer, think = (blocks["answer"] or "").strip(), (blocks["think"] or "").strip()
    last_written = list(slots)[-1] if slots else 0
    evidence = tuple(
        Slot(
            index=number,
            image=_name(images, number),
            relevant=not _finds_nothing(slots[number], is_cut=is_cut and number == last_written),
            text=slots[number].strip(),
        )
        for number in sorted(slots)
    )
    format_ok = well_formed(Response(text)) == 1.0
    num_images = None if images is None else len(images)
    citations = _citations(f"{think}\n{answer}", num_images)
    faults = _block_faults(text, form) if not format_ok else []
    faults += _slot_faults(evidence, citations, num_images, form)
    if not answer:
        faults.append("the answer is empty")
    return ParsedAnswer(
        answer=answer,
        insufficient=says_insufficient(answer),
        observe=(blocks["observe"] or "").strip(),
        evidence=evidence,
        think=think,
        citations=citations,
        format_ok=format_ok,
        errors=tuple(faults),
    )


def _name(images: Sequence[ImageSource] | None, number: int) -> str | None:
    source = images[number - 1] if images is not None and number <= len(images) else None
    return source.name if isinstance(source, PackedImage) else source if isinstance(source, str) else None


def _finds_nothing(slot: str, *, is_cut: bool) -> bool:
    words = normalise(slot)
    return is_irrelevant(slot) or words in _NOTHING_FOUND or (is_cut and NO_EVIDENCE.startswith(words))


def _citations(text: str, num_images: int | None) -> tuple[int, ...]:
    """Return the cited page numbers: [2], [1, 3], and "page 2" where there is such a page."""
    cited = {int(number) for numbers in _CITED.findall(text) for number in numbers.split(",")}
    named = {int(number) for number in _NAMED_PAGE.findall(text)}
    return tuple(sorted(cited | {number for number in named if number <= (num_images or 0)}))


# What can be recovered


@dataclass(frozen=True, slots=True)
class _Piece:
    """What follows one opening tag: text[start:end]; closed if its own closing tag ends it."""

    name: str
    start: int
    end: int
    closed: bool


def _recover(text: str) -> tuple[dict[str, str | None], bool]:
    """Return the text of each block, and whether the evidence block is the cut-off end of the text."""
    partial = _PARTIAL_TAG.search(text)
    if partial and any(name.startswith(partial[1].lower()) for name in BLOCKS):
        text = text[: partial.start()]
    pieces = _pieces(text)
    if not pieces:
        return {"observe": None, "evidence": None, "think": None, "answer": _TAG.sub("", text)}, False
    outer: list[_Piece] = []
    for piece in pieces:
        if not outer or piece.start >= outer[-1].end:
            outer.append(piece)
    answer = _last_written(text, [p for p in outer if p.name == "answer"] or [p for p in pieces if p.name == "answer"])
    chosen = {"answer": answer}
    for name in BLOCKS[:-1]:
        named = [p for p in outer if p.name == name] or [p for p in pieces if p.name == name]
        before = [p for p in named if answer is not None and p.start < answer.start and _says(text, p)]
        chosen[name] = _last_written(text, before or named)
    starts = sorted(piece.start for piece in chosen.values() if piece is not None)
    blocks: dict[str, str | None] = {}
    for name, chosen_piece in chosen.items():
        blocks[name] = None
        if chosen_piece is not None:
            inner = [start for start in starts if chosen_piece.start < start < chosen_piece.end]
            blocks[name] = _TAG.sub("", text[chosen_piece.start : min([chosen_piece.end, *inner])])
    evidence = chosen["evidence"]
    is_cut = evidence is not None and not evidence.closed and evidence.end == len(text)
    if is_cut:
        blocks["evidence"] = _PARTIAL_LABEL.sub("", blocks["evidence"] or "")
    return blocks, is_cut


def _pieces(text: str) -> list[_Piece]:
    """Return what follows each opening tag, in order; its end is its closing tag unless the same tag opens before."""
    tags = list(_TAG.finditer(text))
    pieces: list[_Piece] = []
    upcoming: dict[tuple[str, str], int] = {}  # (slash, name) -> the nearest such tag further on
    for index in range(len(tags) - 1, -1, -1):
        slash, name = tags[index][1], tags[index][2].lower()
        if not slash:
            close, again = upcoming.get(("/", name), len(tags)), upcoming.get(("", name), len(tags))
            closed = close < again
            last = close if closed else index + 1
            end = tags[last].start() if last < len(tags) else len(text)
            pieces.append(_Piece(name, tags[index].end(), end, closed))
        upcoming[slash, name] = index
    return pieces[::-1]


def _says(text: str, piece: _Piece) -> bool:
    return bool(_TAG.sub("", text[piece.start : piece.end]).strip())


def _last_written(text: str, pieces: Sequence[_Piece]) -> _Piece | None:
    """Return the last piece that is closed and says something, else the last that says something, else the last."""
    said = [piece for piece in pieces if _says(text, piece)]
    best = [piece for piece in said if piece.closed] or said or list(pieces)
    return best[-1] if best else None


def _loose_slots(block: str, num_images: int | None) -> dict[int, str]:
    """Return page number -> text, in the order written; of a repeated number the first that says something."""
    labels = list(_LOOSE_LABEL.finditer(block))
    slots: dict[int, str] = {}
    for place, label in enumerate(labels):
        end = labels[place + 1].start() if place + 1 < len(labels) else len(block)
        number = int(label[1] or label[2])
        if not slots.get(number, "").strip():
            slots[number] = block[label.end() : end]
    if not labels and num_images == 1 and block.strip():
        slots[1] = block
    return slots


# Faults


def _block_faults(text: str, form: Form) -> list[str]:
    faults = []
    for name in BLOCKS:
        num_open = text.count(f"<{name}>")
        if num_open == 0:
            faults += [f"no <{name}> block"] if name in form.blocks else []
        elif block_text(text, name) is None:
            faults.append(f"<{name}> is not closed")
        elif (num_open > 1 or text.count(f"</{name}>") > 1) and form.is_all:
            faults.append(f"<{name}> appears more than once")
    opened = [position for name in BLOCKS if (position := text.find(f"<{name}>")) >= 0]
    if opened != sorted(opened) and form.is_all:
        faults.append("the blocks are out of order")
    return faults or (["text outside of the blocks, or blocks inside one another"] if form.is_all else [])


def _slot_faults(slots: Sequence[Slot], citations: Sequence[int], num_images: int | None, form: Form) -> list[str]:
    faults = [f"slot [{slot.index}] is empty" for slot in slots if not slot.text]
    if num_images is not None:
        written = {slot.index for slot in slots}
        missing = [str(number) for number in range(1, num_images + 1) if number not in written]
        if missing and form.every_page:
            faults.append(f"no evidence slot for page {', '.join(missing)}")
        for what, numbers in (("slot", sorted(written)), ("citation", citations)):
            unknown = [f"[{number}]" for number in numbers if number > num_images]
            if unknown:
                faults.append(f"{what} {', '.join(unknown)} names no page; there are {num_images}")
    return faults
