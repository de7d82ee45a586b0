"""Where the page desk takes its pages from: a store with its index, or the pages that a row names.

Everything that episodes share is loaded once per process: the store, the index, its encoder, and the results. What is
kept belongs to the files as they are: a store, an index or a page that changes is read again.
"""

from __future__ import annotations

import functools
import io
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from recipes.retrieval.desk.calls import Box
from recipes.retrieval.encoders.base import EncoderSettings, PageEncoder
from recipes.retrieval.encoders.choice import load_encoder
from recipes.retrieval.search.origin import FILE as ENCODER_FILE
from recipes.retrieval.search.origin import recall
from recipes.retrieval.search.retriever import By, Retriever, SearchSettings
from rollout.files import Stamp, stamp
from rollout.inputs.images import decode, thumbnail
from rsgrpo.errors import InputError

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


class Shelf(Protocol):
    """What the desk searches."""

    def search(self, query: str) -> Sequence[Sheet]:
        """Return the best pages, best first; InputError for a query that cannot be searched."""
        ...


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
_LENT: dict[tuple[str, str, By, int], Shelf] = {}


@contextmanager
def lent(shelf: Shelf, store: str, index: str, by: By, k: int) -> Iterator[None]:
    """Let desks of this process that name these arguments search `shelf`: a program has the store open already."""
    _LENT[store, index, by, k] = shelf
    try:
        yield
    finally:
        del _LENT[store, index, by, k]


def store_shelf(store: str, index: str, by: By, k: int) -> Shelf:
    """Return a store's shelf: the one that was lent, else one that is opened once in this process.

    index: the folder; "" is the store's own. It is searched by the encoder that made it.

    Raises:
        InputError: there is no such store or index, its encoder cannot be loaded, or no page can be found; says why.
    """
    if (shelf := _LENT.get((store, index, by, k))) is not None:
        return shelf
    folder = Path(index) if index else Path(store) / "index"
    files = (Path(store) / "pages.parquet", folder / "manifest.json")
    with _OPENING:
        return _opened(store, folder, by, k, tuple(map(stamp, files)))


@functools.lru_cache(8)
def _opened(store: str, folder: Path, by: By, k: int, _: tuple[Stamp, ...]) -> StoreShelf:
    encoder = None if by == "words" else _encoder(folder, stamp(folder / ENCODER_FILE))
    retriever = Retriever(Path(store), folder, encoder, SearchSettings(by=by))
    if not retriever.num_pages:  # every search would only say that no page was found
        raise InputError(f"the page desk cannot search {store}: {retriever.why_none}")
    return StoreShelf(retriever, k)


@functools.lru_cache(2)
def _encoder(folder: Path, _: Stamp) -> PageEncoder:
    return load_encoder(recall(folder, EncoderSettings("")))


def small(image: str, max_side: int) -> bytes:
    """Return a page's thumbnail as PNG; PromptError if it cannot be read."""
    return _small(image, max_side, stamp(image))


@functools.lru_cache(CACHED_THUMBNAILS)
def _small(image: str, max_side: int, _: Stamp) -> bytes:
    return _png(thumbnail(image, max_side))


def part(image: str, box: Box) -> bytes:
    """Return a part of a page at the file's full resolution as PNG, at least one pixel each way.

    Raises:
        PromptError: the page cannot be read.
    """
    return _part(image, box, stamp(image))


@functools.lru_cache(CACHED_CROPS)
def _part(image: str, box: Box, _: Stamp) -> bytes:
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
