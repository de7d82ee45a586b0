"""What an answer is based on and what is wrong with it: the cited pages with their evidence, and the faults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes.retrieval.answers.generation import Answered
from recipes.retrieval.search.found import FoundPage

CUT_OFF = "cut off at the token limit: raise --max-tokens"
_NEXT_SLOT = re.compile(r"\[[1-9][0-9]{0,3}\][ \t]*[:\uff1a]")
_TAG = re.compile(r"</?(observe|evidence|think|answer)>", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CitedPage:
    """A page that an answer cites. number: by which the answer names it. text: what the answer says it read there."""

    number: int
    page: FoundPage
    text: str


def cited_pages(answered: Answered) -> list[CitedPage]:
    """Return the cited pages in order of rank, each with the evidence of its own slot and nothing of another one."""
    texts = {slot["index"]: _own_text(slot["text"]) for slot in answered.line["evidence"] if slot["relevant"]}
    numbered = [(answered.index_of(page), page) for page in answered.cited]
    return [CitedPage(number, page, texts.get(number, "")) for number, page in numbered]


def faults_of(line: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with an answer's result line, in words.

    An answer without any of the four blocks is not told that they are missing: its prompt may not have asked for them.
    """
    faults = list(line["errors"])
    if line["finish_reason"] != "error" and not _TAG.search(line["raw"]):
        faults = [fault for fault in faults if "citation" in fault or "answer is empty" in fault]
    if line["finish_reason"] == "length":
        faults.append(CUT_OFF)
    return faults


def _own_text(slot: str) -> str:
    """Return a slot's text up to the label of another slot, which belongs to another page (or to none)."""
    found = _NEXT_SLOT.search(slot)
    return (slot[: found.start()] if found else slot).strip()
