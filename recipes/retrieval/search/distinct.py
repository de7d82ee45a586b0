"""Near-duplicates among found pages: later ones are dropped, and the page that is kept says which they were.

Pages are near-duplicates if their images are equal byte for byte, or if their texts have the same numbers and nearly
the same words. Pages that differ in a number are never dropped: it may be the answer.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from recipes.retrieval.search.found import FoundPage

SHINGLE_WORDS = 3
NEAR = 0.9  # share of common shingles
MIN_WORDS = 8  # shorter texts must be equal
_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class _Content:
    """What is compared of a page."""

    image: str
    words: tuple[str, ...]
    numbers: Counter[str]
    shingles: frozenset[tuple[str, ...]]


def distinct_pages(pages: Iterable[FoundPage], k: int) -> list[FoundPage]:
    """Return the first k pages that are not near-duplicates of an earlier one, ranked again from 1."""
    kept: list[tuple[FoundPage, _Content]] = []
    for page in pages:
        content = _content(page)
        twin = next((place for place, (_, earlier) in enumerate(kept) if _is_near(content, earlier)), None)
        if twin is not None:
            first, earlier = kept[twin]
            kept[twin] = (replace(first, near=(*first.near, page.place)), earlier)
        elif len(kept) < k:
            kept.append((page, content))
    return [replace(page, rank=rank) for rank, (page, _) in enumerate(kept, start=1)]


def _content(page: FoundPage) -> _Content:
    words = tuple(_WORD.findall(page.text.casefold()))
    shingles = frozenset(zip(*(words[start:] for start in range(SHINGLE_WORDS)), strict=False))
    try:
        image = hashlib.sha256(Path(page.image).read_bytes()).hexdigest()
    except OSError:  # it is reported when it is shown
        image = page.page_id
    return _Content(image, words, Counter(_NUMBER.findall(page.text)), shingles)


def _is_near(one: _Content, other: _Content) -> bool:
    if one.image == other.image:
        return True
    if not one.words or one.numbers != other.numbers:
        return False
    if min(len(one.words), len(other.words)) < MIN_WORDS:
        return one.words == other.words
    return len(one.shingles & other.shingles) >= NEAR * len(one.shingles | other.shingles)
