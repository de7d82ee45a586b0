"""A store, its index and an encoder put together: questions in, ranked pages out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recipes.retrieval.encoders.base import Encoder
from recipes.retrieval.pages.store import Page, PageStore
from recipes.retrieval.search.exact import Hit, exact, rerank
from recipes.retrieval.search.index import IndexFault, VectorIndex
from rsgrpo.errors import InputError


@dataclass(frozen=True, slots=True)
class FoundPage:
    """One page of an answer to a query. rank: from 1. number: of the page in its document. image: absolute path."""

    rank: int
    score: float
    page_id: str
    document: str
    number: int
    image: str
    text: str


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How pages are searched.

    backend: scan the index, or take candidates from FAISS. num_probes: lists that IVF reads per query.
    reranker: a second encoder and its index, which order the first `num_candidates` pages anew.
    """

    backend: Literal["exact", "flat", "ivf"] = "exact"
    num_probes: int = 32
    reranker: tuple[Encoder, Path] | None = None
    num_candidates: int = 100

    def __post_init__(self) -> None:
        for option, value in (("--num-probes", self.num_probes), ("--candidates", self.num_candidates)):
            if value < 1:
                raise InputError(f"{option} must be >= 1, got {value}")


EXACT = SearchSettings()


class Retriever:
    """Searches one store. Make it once: the encoder and the index stay loaded."""

    def __init__(self, store: Path, index: Path, encoder: Encoder, search: SearchSettings = EXACT) -> None:
        """Open everything.

        Raises:
            RsgrpoError: something is not there, or an index was made by another encoder.
        """
        self.store, self.index, self.encoder = PageStore.open(store), VectorIndex.open(index), encoder
        self.index.require(encoder)
        self._num_candidates = search.num_candidates
        self._faiss = None
        if search.backend != "exact":
            from recipes.retrieval.search.faiss import FaissSearch

            self._faiss = FaissSearch(self.index, search.backend, num_probes=search.num_probes)
        self._reranker = None
        if search.reranker is not None:
            second, folder = search.reranker
            self._reranker = (second, VectorIndex.open(folder))
            self._reranker[1].require(second)

    def hits(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the ids and scores of the k best pages of each query.

        Raises:
            InputError: a query is empty or no valid text, or k < 1.
        """
        _check_queries(queries)
        vectors = self.encoder.encode_queries(queries)
        wide = k if self._reranker is None else max(k, self._num_candidates)
        found = exact(self.index, vectors, wide) if self._faiss is None else self._faiss.search(vectors, wide)
        if self._reranker is None:
            return found
        second, index = self._reranker
        candidates = [[hit.page_id for hit in hits] for hits in found]
        return rerank(index, second.encode_queries(queries), candidates, k)

    def search(self, queries: Sequence[str], k: int) -> list[list[FoundPage]]:
        """Return the k best pages of each query.

        Raises:
            IndexFault: a page of the index is not in the store: the index is behind.
        """
        found = self.hits(queries, k)
        pages = self.store.find(hit.page_id for hits in found for hit in hits)
        results = []
        for hits in found:
            gone = [hit.page_id for hit in hits if hit.page_id not in pages]
            if gone:
                raise IndexFault(
                    f"page {gone[0]} is in {self.index.folder} but no more in {self.store.folder}; bring the index in "
                    "line: python -m recipes.retrieve index STORE (with the same --model)"
                )
            results.append([found_page(rank, hit, pages[hit.page_id]) for rank, hit in enumerate(hits, start=1)])
        return results


def _check_queries(queries: Sequence[str]) -> None:
    for query in queries:
        if not query.strip():
            raise InputError("a query is empty; write what the page should show")
        if any("\ud800" <= character <= "\udfff" for character in query):
            raise InputError(f"the query {query!r} is not valid UTF-8")


def found_page(rank: int, hit: Hit, page: Page) -> FoundPage:
    """Return a hit with its page."""
    return FoundPage(rank, hit.score, hit.page_id, page.document, page.number, page.image, page.text)
