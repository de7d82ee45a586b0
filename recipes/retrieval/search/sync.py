"""Bring a store's indexes in line with it, as one step for everything that searches."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from recipes.retrieval.encoders.base import PageEncoder
from recipes.retrieval.pages.store import PageStore
from recipes.retrieval.search.faiss import KINDS, state_of
from recipes.retrieval.search.index import VectorIndex
from recipes.retrieval.search.retriever import SearchSettings
from recipes.retrieval.search.update import UpdateReport, encode_here, fill_index
from recipes.retrieval.search.words import FILE, WordIndex
from rsgrpo.records.console import Console

SHARD_PAGES, BATCH_PAGES = 2_048, 64
SHARED_PAGES = 8  # encoded in one turn, where others wait


def bring_in_line(
    store: Path,
    index: Path,
    encoder: PageEncoder | None,
    search: SearchSettings,
    console: Console,
    *,
    turn: AbstractContextManager[Any] | None = None,
) -> dict[str, UpdateReport]:
    """Encode what the indexes of a search lack, and delete what is gone from the store; make the first index if needed.

    FAISS files that were in line before are built again (a reranker needs none), and so is the one of the first index
    that the search uses. The words are updated if there are any, or the search uses them.

    Args:
        turn: entered whenever an encoder works on a few pages, for encoders that others use, too.

    Returns:
        What was done, by the index.

    Raises:
        InputError: another encoder made an index, a page cannot be encoded, the disk is full, or another process is
            writing.
    """
    opened = PageStore.open(store)
    reports: dict[str, UpdateReport] = {}
    pairs = [] if encoder is None else [(encoder, index)]
    for second, folder in [*pairs, *search.further, *([search.reranker] if search.reranker else [])]:
        reports[str(folder)] = update_index(opened, folder, second, console, turn=turn)
    for _, folder in [*pairs, *search.further]:
        vectors = VectorIndex.open(folder)
        for kind in KINDS if len(vectors) else ():
            if (folder == index and kind == search.backend) or state_of(folder / f"faiss-{kind}.bin"):
                vectors.build_faiss(kind, only_if_older=True)
    if search.by != "vectors" or (store / FILE).exists():
        words = WordIndex(store)
        added, removed = words.update(opened, console)
        reports["words"] = UpdateReport(added, removed, len(words))
        words.close()
    return reports


def update_index(
    store: PageStore,
    folder: Path,
    encoder: PageEncoder,
    console: Console,
    *,
    turn: AbstractContextManager[Any] | None = None,
) -> UpdateReport:
    """Bring one index in line with its store; as `bring_in_line`."""
    index = VectorIndex.create(folder, encoder.identity)
    stream = partial(encode_here, encoder, batch_pages=SHARED_PAGES if turn else BATCH_PAGES, turn=turn)
    return fill_index(store, index, stream, shard_pages=SHARD_PAGES, console=console)
