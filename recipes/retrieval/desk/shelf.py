"""Where the page desk takes its pages from: a store with its index, or the pages that a row names.

Everything that episodes share is loaded once per process: the store, the index, its encoder, and the results.
"""

from __future__ import annotations

import functools
import io
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from recipes.retrieval.desk.calls import Box
from recipes.retrieval.encoders.base import EncoderSettings
from recipes.retrieval.encoders.choice import load_encoder
from recipes.retrieval.search.origin import recall
from recipes.retrieval.search.retriever import By, Retriever, SearchSettings
from rollout.inputs.images import decode, thumbnail

CACHED_SEARCHES, CACHED_THUMBNAILS, CACHED_CROPS = 16_384, 4_096, 128


@dataclass(frozen=True, slots=True)
class Sheet:
    """A page on the desk.

    page_id: of its content. place: where it is, in words. image: its file. score: of a search.
    """

    page_id: str
    place: str
    image: str
    score: float = 0.0


class StoreShelf:
    """A page store. Several threads may search at once: they take turns, and equal queries share a result."""

    def __init__(self, retriever: Retriever, k: int) -> None:
        self._retriever, self._k = retriever, k
        self._searching = threading.Lock()
        self._search = functools.lru_cache(CACHED_SEARCHES)(self._search_now)

    def search(self, query: str) -> Sequence[Sheet]:
        """Return the best pages, best first; InputError for a query that cannot be searched."""
        with self._searching:
            return self._search(query)

    def _search_now(self, query: str) -> tuple[Sheet, ...]:
        (found,) = self._retriever.search([query], self._k, distinct=True)
        return tuple(Sheet(page.page_id, page.place, page.image, page.score) for page in found)


_OPENING = threading.Lock()


def store_shelf(store: str, index: str, by: By, k: int) -> StoreShelf:
    """Return a store's shelf, opened once in this process.

    index: the folder; "" is the store's own. It is searched by the encoder that made it.

    Raises:
        InputError: there is no such store or index, or its encoder cannot be loaded.
    """
    with _OPENING:
        return _opened(store, index, by, k)


@functools.lru_cache(8)
def _opened(store: str, index: str, by: By, k: int) -> StoreShelf:
    folder = Path(index) if index else Path(store) / "index"
    encoder = None if by == "words" else load_encoder(recall(folder, EncoderSettings("")))
    return StoreShelf(Retriever(Path(store), folder, encoder, SearchSettings(by=by)), k)


@functools.lru_cache(CACHED_THUMBNAILS)
def small(image: str, max_side: int) -> bytes:
    """Return a page's thumbnail as PNG; PromptError if it cannot be read."""
    return _png(thumbnail(image, max_side))


@functools.lru_cache(CACHED_CROPS)
def part(image: str, box: Box) -> bytes:
    """Return a part of a page at the file's full resolution as PNG, at least one pixel each way.

    Raises:
        PromptError: the page cannot be read.
    """
    page = decode(image)
    left, right = _pixels(box[0], box[2], page.width)
    top, bottom = _pixels(box[1], box[3], page.height)
    return _png(page.crop((left, top, right, bottom)))


def _pixels(start: float, end: float, size: int) -> tuple[int, int]:
    first = min(math.floor(start * size), size - 1)
    return first, max(math.ceil(end * size), first + 1)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
