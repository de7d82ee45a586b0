"""Bring an index in line with a store: new pages are encoded, pages that are gone are deleted.

Owns the order of things and the shards; what encodes, and where, is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np

from recipes.retrieval.encoders.base import Encoder, EncoderIdentity, ModelEncoder, PageInput
from recipes.retrieval.pages.store import Page, PageStore
from recipes.retrieval.search.index import VectorIndex, missing_pages
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console

LOADING_THREADS = 2  # decode the next batch while one is encoded

EncodeStream = Callable[[Iterable[Page]], Iterator[tuple[str, np.ndarray]]]
"""Gives the id and the vectors of every page that it takes, in any order, and takes no more than it must."""


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What one update did, in pages."""

    num_added: int
    num_deleted: int
    num_pages: int


def update_index(
    store: PageStore, encoder: Encoder, index: VectorIndex, *, shard_pages: int, batch_pages: int, console: Console
) -> UpdateReport:
    """Bring an index in line, with an encoder of this process; `batch_pages` pages are given to it at once.

    Raises:
        As `fill_index`.
    """

    def stream(pages: Iterable[Page]) -> Iterator[tuple[str, np.ndarray]]:
        return encode_here(encoder, pages, batch_pages)

    return fill_index(store, encoder, index, stream, shard_pages=shard_pages, console=console)


def fill_index(
    store: PageStore,
    encoder: EncoderIdentity,
    index: VectorIndex,
    stream: EncodeStream,
    *,
    shard_pages: int,
    console: Console,
) -> UpdateReport:
    """Encode what the index lacks, a shard at a time; a process that dies repeats at most what had no shard yet.

    Args:
        encoder: whose vectors `stream` gives.
        shard_pages: pages a shard.

    Raises:
        InputError: the encoder is not the index's, a page cannot be encoded, or the disk is full.
    """
    if shard_pages < 1:
        raise InputError(f"--shard-pages must be >= 1, got {shard_pages}")
    with index.locked():
        index.require(encoder)
        missing, surplus = missing_pages(index, store.page_ids())
        num_deleted = index.remove(surplus)
        with console.phase("encode", total=len(missing)) as bar:
            encoded = stream(page for page in store.pages() if page.page_id in missing)
            page_ids: list[str] = []
            vectors: list[np.ndarray] = []
            for page_id, vector in encoded:
                page_ids.append(page_id)
                vectors.append(vector)
                bar.advance()
                if len(page_ids) == shard_pages:
                    index.add(page_ids, vectors)
                    page_ids, vectors = [], []
            index.add(page_ids, vectors)
    return UpdateReport(len(missing), num_deleted, len(index))


def encode_here(encoder: Encoder, pages: Iterable[Page], batch_pages: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield pages with their vectors, in order; a batch is loaded while the one before it is encoded."""
    remaining = iter(pages)
    batches = iter(lambda: list(islice(remaining, batch_pages)), [])
    if not isinstance(encoder, ModelEncoder):
        for batch in batches:
            yield from zip([page.page_id for page in batch], encoder.encode_pages(batch), strict=True)
        return
    with ThreadPoolExecutor(LOADING_THREADS, thread_name_prefix="pages") as pool:
        waiting: tuple[list[str], list[Future[PageInput]]] | None = None
        for batch in batches:
            loading = [pool.submit(encoder.loader, page) for page in batch]
            if waiting:
                yield from _encoded(encoder, *waiting)
            waiting = [page.page_id for page in batch], loading
        if waiting:
            yield from _encoded(encoder, *waiting)


def _encoded(
    encoder: ModelEncoder, page_ids: list[str], loading: list[Future[PageInput]]
) -> Iterator[tuple[str, np.ndarray]]:
    vectors = encoder.encode_loaded([future.result() for future in loading], page_ids)
    return zip(page_ids, vectors, strict=True)
