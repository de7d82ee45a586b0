"""Bring an index in line with a store: new pages are encoded, pages that are gone are deleted."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from recipes.retrieval.encoders import Encoder
from recipes.retrieval.index import VectorIndex, missing_pages
from recipes.retrieval.store import PageStore
from rsgrpo.console import Console
from rsgrpo.errors import InputError


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What one update did, in pages."""

    num_added: int
    num_deleted: int
    num_pages: int


def update_index(
    store: PageStore, encoder: Encoder, index: VectorIndex, *, shard_pages: int, batch_pages: int, console: Console
) -> UpdateReport:
    """Encode what the index lacks, a shard at a time; a process that dies repeats at most one shard.

    Args:
        shard_pages: pages a shard. Each shard is on disk before the next one is begun.
        batch_pages: pages that the encoder is given at once.

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
            pages = (page for page in store.pages() if page.page_id in missing)
            while shard := list(islice(pages, shard_pages)):
                vectors: list[np.ndarray] = []
                for start in range(0, len(shard), batch_pages):
                    batch = shard[start : start + batch_pages]
                    vectors += encoder.encode_pages(batch)
                    bar.advance(len(batch))
                index.add([page.page_id for page in shard], vectors)
    return UpdateReport(len(missing), num_deleted, len(index))
