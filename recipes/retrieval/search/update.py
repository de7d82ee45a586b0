"""Bring an index in line with a store: new pages are encoded, pages that are gone are deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from recipes.retrieval.encoders.base import ModelEncoder, PageEncoder, PageInput
from recipes.retrieval.pages.store import Page, PageStore
from recipes.retrieval.search.index import VectorIndex
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console

LOADING_THREADS = 2  # decode the next batch while one is encoded


@dataclass(frozen=True, slots=True)
class Lag:
    """How an index differs from its store. missing: ids of pages that it lacks. surplus: of pages that are gone."""

    index: str
    missing: frozenset[str]
    surplus: frozenset[str]

    def __str__(self) -> str:
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing):,} pages of the store are not in it and cannot be found")
        if self.surplus:
            parts.append(f"{len(self.surplus):,} of its pages are no longer wanted and are skipped")
        return f"the index {self.index} is behind its store: {'; '.join(parts)}"


def lag_of(store: PageStore, index: VectorIndex) -> Lag | None:
    """Return how an index differs from its store, None if it does not."""
    missing, surplus = index.missing_pages(wanted_pages(store, index))
    return Lag(str(index.folder), frozenset(missing), frozenset(surplus)) if missing or surplus else None


def wanted_pages(store: PageStore, index: VectorIndex) -> list[str]:
    """Return the ids of the pages that belong in an index: one of texts has no place for pages without text."""
    return store.page_ids(with_text=index.reads_text)


EncodeStream = Callable[[Iterable[Page]], Iterator[tuple[str, np.ndarray]]]
"""Yields the id and the vectors of every page that it takes, in any order, and takes no more pages than it needs."""


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What one update did, in pages."""

    num_added: int
    num_deleted: int
    num_pages: int


def fill_index(
    store: PageStore, index: VectorIndex, stream: EncodeStream, *, shard_pages: int, console: Console
) -> UpdateReport:
    """Encode what the index lacks, one shard at a time; a process that dies repeats at most one unfinished shard.

    Args:
        stream: yields the vectors of the encoder that made the index.
        shard_pages: pages per shard.

    Raises:
        InputError: a page cannot be encoded, or the disk is full.
    """
    if shard_pages < 1:
        raise InputError(f"--shard-pages must be >= 1, got {shard_pages}")
    with index.locked():
        missing, surplus = index.missing_pages(wanted_pages(store, index))
        num_deleted = index.remove(surplus)
        with console.phase("encode", total=len(missing)) as bar:
            page_ids: list[str] = []
            vectors: list[np.ndarray] = []
            for page_id, vector in stream(page for page in store.pages() if page.page_id in missing):
                page_ids.append(page_id)
                vectors.append(vector)
                bar.advance()
                if len(page_ids) == shard_pages:
                    index.add(page_ids, vectors)
                    page_ids, vectors = [], []
            index.add(page_ids, vectors)
    return UpdateReport(len(missing), num_deleted, len(index))


def encode_here(
    encoder: PageEncoder, pages: Iterable[Page], batch_pages: int, *, turn: AbstractContextManager[Any] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield pages with their vectors, in order; a batch is loaded while the one before it is encoded.

    turn: entered while a batch is encoded.
    """
    turn, remaining = turn or nullcontext(), iter(pages)
    batches = iter(lambda: list(islice(remaining, batch_pages)), [])
    if not isinstance(encoder, ModelEncoder):
        for batch in batches:
            with turn:
                vectors = encoder.encode_pages(batch)
            yield from zip([page.page_id for page in batch], vectors, strict=True)
        return
    with ThreadPoolExecutor(LOADING_THREADS, thread_name_prefix="pages") as pool:
        waiting: list[tuple[str, Future[PageInput]]] = []
        for batch in chain(batches, [[]]):  # the last turn encodes the last batch
            loading = [(page.page_id, pool.submit(encoder.identity.loader, page)) for page in batch]
            if waiting:
                page_ids, inputs = [page_id for page_id, _ in waiting], [loaded.result() for _, loaded in waiting]
                with turn:
                    vectors = encoder.encode_loaded(inputs, page_ids)
                yield from zip(page_ids, vectors, strict=True)
            waiting = loading
