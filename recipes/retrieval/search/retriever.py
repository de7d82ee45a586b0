"""A store, its index and an encoder put together: questions in, ranked pages out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.answers.options import check_options
from recipes.retrieval.encoders.base import PageEncoder
from recipes.retrieval.pages.store import Page, PageStore
from recipes.retrieval.search.exact import Hit
from recipes.retrieval.search.index import Backend, IndexFault, VectorIndex
from rollout.keys import key
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

    reranker: a second encoder and its index, which reorder the first `candidates` pages.
    """

    backend: Backend = key("exact", "scan the index, or take candidates from a FAISS file")
    num_probes: int = key(32, "lists read per query (ivf)", ge=1)
    candidates: int = key(100, "number of pages to rerank", ge=1)
    reranker: tuple[PageEncoder, Path] | None = None

    def __post_init__(self) -> None:
        check_options(self)


EXACT = SearchSettings()


class Retriever:
    """Searches one store. Create it once: the encoder and the index stay loaded."""

    def __init__(self, store: Path, index: Path, encoder: PageEncoder, search: SearchSettings = EXACT) -> None:
        """Open everything; RsgrpoError if something is missing, or another encoder made an index."""
        self.store, self.index, self.encoder = PageStore.open(store), _opened(index, encoder), encoder
        self._num_candidates = search.candidates
        self._search = self.index.searcher(search.backend, search.num_probes)
        self._reranker = None
        if search.reranker is not None:
            second, folder = search.reranker
            self._reranker = (second, _opened(folder, second))

    def hits(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the ids and scores of the k best pages of each query.

        Raises:
            InputError: a query is empty or not valid text, or k < 1.
        """
        for query in queries:
            if not query.strip():
                raise InputError("a query is empty; describe what the page should show")
            if any("\ud800" <= character <= "\udfff" for character in query):
                raise InputError(f"the query {query!r} is not valid UTF-8")
        vectors = self.encoder.encode_queries(queries)
        if self._reranker is None:
            return self._search(vectors, k)
        second, index = self._reranker
        found = self._search(vectors, max(k, self._num_candidates))
        candidates = [[hit.page_id for hit in hits] for hits in found]
        return index.rerank(second.encode_queries(queries), candidates, k)

    def search(self, queries: Sequence[str], k: int) -> list[list[FoundPage]]:
        """Return the k best pages of each query.

        Raises:
            IndexFault: a page of the index is not in the store: the index is behind.
        """
        found = self.hits(queries, k)
        pages = self.store.find(hit.page_id for hits in found for hit in hits)
        gone = [hit.page_id for hits in found for hit in hits if hit.page_id not in pages]
        if gone:
            raise IndexFault(
                f"page {gone[0]} is in {self.index.folder} but no longer in {self.store.folder}; update the index: "
                "python -m recipes.retrieve index STORE (with the same --model)"
            )
        return [found_pages(hits, pages) for hits in found]


def found_pages(hits: Sequence[Hit], pages: Mapping[str, Page]) -> list[FoundPage]:
    """Return hits with their pages."""
    found = []
    for rank, hit in enumerate(hits, start=1):
        page = pages[hit.page_id]
        found.append(FoundPage(rank, hit.score, hit.page_id, page.document, page.number, page.image, page.text))
    return found


def _opened(folder: Path, encoder: PageEncoder) -> VectorIndex:
    index = VectorIndex.open(folder)
    index.require(encoder.identity)
    return index
