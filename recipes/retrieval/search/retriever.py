"""A store, its indexes and their encoders put together: questions in, ranked pages out."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from recipes.answers.options import check_options
from recipes.retrieval.encoders.base import PageEncoder, PatchEncoder
from recipes.retrieval.pages.store import PageStore
from recipes.retrieval.search.distinct import distinct_pages
from recipes.retrieval.search.exact import Hit
from recipes.retrieval.search.faiss import state_of
from recipes.retrieval.search.found import FoundPage, found_pages, why_no_words, why_nothing
from recipes.retrieval.search.fusion import FUSED_MARK, fuse, parse_weights, usual_weights
from recipes.retrieval.search.index import CANDIDATES, Backend, VectorIndex
from recipes.retrieval.search.keep import NO_FILTERS, Filters, Keep, contents_of
from recipes.retrieval.search.update import Lag, lag_of
from recipes.retrieval.search.words import WordIndex
from rollout.keys import key
from rsgrpo.errors import InputError

By = Literal["vectors", "words", "hybrid"]
NEAR_MARGIN = 4  # times k pages are fetched where near-duplicates are dropped


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How pages are searched.

    reranker: a second encoder and its index, which reorder the first `candidates` pages. further: more encoders and
    their indexes, whose results are fused with those of the first.
    """

    by: By = key("vectors", "what finds pages: an index, the words of the text layer (BM25, no model), or both, fused")
    backend: Backend = key("exact", "scan the index, or take candidates from a FAISS file")
    num_probes: int = key(32, "lists read per query (ivf)", ge=1)
    candidates: int = key(
        CANDIDATES, "number of pages to fuse, to rerank, or to score by late interaction (flat, ivf)", ge=1
    )
    weights: str = key(
        "", "weights of the fused searches, such as 1,0.5: indexes in order, then words; default: 4 for late "
        "interaction, else 1",
    )  # fmt: skip
    reranker: tuple[PageEncoder, Path] | None = None
    further: tuple[tuple[PageEncoder, Path], ...] = ()

    def __post_init__(self) -> None:
        check_options(self)
        if self.by == "words" and self.further:
            raise InputError("--with-index needs an index to be fused with; use --by vectors or --by hybrid")


EXACT = SearchSettings()


class Source(Protocol):
    """One search over the store's pages."""

    @property
    def name(self) -> str:
        """Return what messages call it."""

    @property
    def index(self) -> Sized:
        """Return what is searched."""

    def hits(self, queries: Sequence[str], k: int, keep: Keep) -> list[list[Hit]]:
        """Return the best k pages of each query; see `Retriever.hits`."""
        ...


class VectorSource:
    """An index with its encoder."""

    def __init__(self, folder: Path, encoder: PageEncoder, search: SearchSettings, *, backend: Backend) -> None:
        """Open the index; RsgrpoError if it is missing, or another encoder made it."""
        self.name, self.encoder = str(folder), encoder
        self.index = VectorIndex.open(folder)
        self.index.require(encoder.identity)
        self._search = self.index.searcher(backend, search.num_probes, search.candidates)

    @property
    def is_late(self) -> bool:
        """Whether its pages have several vectors each."""
        return self.index.multi_vector

    def hits(self, queries: Sequence[str], k: int, keep: Keep) -> list[list[Hit]]:
        """Encode the queries and search; see `Source`."""
        return self._search(self.encoder.encode_queries(queries), k, keep)


class WordSource:
    """The words of the text layer."""

    name = "words"

    def __init__(self, store: PageStore) -> None:
        """Open the words and bring them in line with the store."""
        self.index = WordIndex(store.folder)
        self.index.update(store)

    def hits(self, queries: Sequence[str], k: int, keep: Keep) -> list[list[Hit]]:
        """See `Source`."""
        return self.index.search(queries, k, keep)


class Retriever:
    """Searches one store. Create it once: the encoders and the indexes stay loaded.

    Attributes:
        lags: how far each index is behind the store, for those that are.
    """

    def __init__(
        self,
        store: Path,
        index: Path,
        encoder: PageEncoder | None,
        search: SearchSettings = EXACT,
        filters: Filters = NO_FILTERS,
    ) -> None:
        """Open everything; RsgrpoError if something is missing, or another encoder made an index.

        Args:
            encoder: None for a search by words.
        """
        self.store, self.encoder, self._candidates = PageStore.open(store), encoder, search.candidates
        vectors: list[VectorSource] = []
        if search.by != "words":
            if encoder is None:
                raise InputError("a search by vectors needs an encoder; name it, or use --by words")
            vectors.append(VectorSource(index, encoder, search, backend=search.backend))
        for second, folder in search.further:
            has_file = search.backend != "exact" and state_of(folder / f"faiss-{search.backend}.bin")
            vectors.append(VectorSource(folder, second, search, backend=search.backend if has_file else "exact"))
        self._sources: list[Source] = [*vectors]
        if search.by != "vectors":
            self._sources.append(WordSource(self.store))
        usual = usual_weights([isinstance(source, VectorSource) and source.is_late for source in self._sources])
        self._weights = parse_weights(search.weights, [source.name for source in self._sources], usual)
        self._reranker = None
        if search.reranker is not None:
            second, folder = search.reranker
            self._reranker = VectorSource(folder, second, search, backend="exact")
        opened = [*vectors, *([self._reranker] if self._reranker else [])]
        self._late = next((source for source in opened if source.is_late), None)
        self.lags: list[Lag] = [lag for source in opened if (lag := lag_of(self.store, source.index))]
        gone, contents = {lag.index: lag.surplus for lag in self.lags}, contents_of(self.store, filters)
        self._keeps = [Keep(contents, gone.get(source.name, frozenset())) for source in self._sources]

    @property
    def num_pages(self) -> int:
        """How many pages can be found, at most."""
        return max(len(source.index) for source in self._sources)

    @property
    def why_none(self) -> str:
        """Why a query has found nothing, with the remedy; "" where that is not known."""
        if not self.num_pages:
            return why_nothing(self.store)
        if not self._by_words_alone:
            return ""
        if self._keeps[0].contents is not None:
            return "no page of the documents that pass the filters has any of these words"
        return why_no_words(self.store)

    @property
    def tag(self) -> str:
        """Return a name of this way of searching for run files: scores of equal names compare."""
        tags = [source.encoder.identity.fingerprint[:8] for source in self._sources if isinstance(source, VectorSource)]
        tags += ["words"] * (len(tags) < len(self._sources))
        return FUSED_MARK.join(tags)

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
        if self._reranker is None:
            return self._found(queries, k)
        found = self._found(queries, max(k, self._candidates))
        vectors, ids = self._reranker.encoder.encode_queries(queries), [[hit.page_id for hit in hits] for hits in found]
        reranked = self._reranker.index.rerank(vectors, ids, max(k, self._candidates))
        return [_in_their_places(first, second)[:k] for first, second in zip(found, reranked, strict=True)]

    def search(self, queries: Sequence[str], k: int, *, distinct: bool = False) -> list[list[FoundPage]]:
        """Return the k best pages of each query; pages that are gone from the store are left out.

        Args:
            distinct: leave out near-duplicates of better pages, see `distinct_pages`.
        """
        found = self.hits(queries, NEAR_MARGIN * k if distinct else k)
        pages = self.store.find(hit.page_id for hits in found for hit in hits)
        results = [found_pages(hits, pages) for hits in found]
        return [distinct_pages(result, k) for result in results] if distinct else results

    @property
    def has_late(self) -> bool:
        """Whether one of the indexes is of late interaction, so that similarities have places on the page."""
        return self._late is not None

    def search_with_maps(self, query: str, k: int) -> tuple[list[FoundPage], dict[str, np.ndarray], str]:
        """Return the distinct pages of a query, their `similarity_maps`, and why none was found."""
        (found,) = self.search([query], k, distinct=True)
        maps = self.similarity_maps(query, [page.page_id for page in found])
        return found, maps, "" if found else self.why_none

    def similarity_maps(self, query: str, page_ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Return page id -> (rows, columns) float32: where on the page the first late-interaction index finds a query.

        Pages that this index lacks, and all pages without such an index, have no map; see `PatchEncoder`.
        """
        if self._late is None or not isinstance(self._late.encoder, PatchEncoder):
            return {}
        pages, vectors = self.store.find(page_ids), self._late.index.vectors(page_ids)
        found = {
            page_id: self._late.encoder.similarity_map(query, pages[page_id], vectors[page_id])
            for page_id in page_ids
            if page_id in pages and page_id in vectors
        }
        return {page_id: similarities for page_id, similarities in found.items() if similarities is not None}

    @property
    def _by_words_alone(self) -> bool:
        return len(self._sources) == 1 and isinstance(self._sources[0], WordSource)

    def _found(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        if len(self._sources) == 1:
            return self._sources[0].hits(queries, k, self._keeps[0])
        depth = max(k, self._candidates)
        pairs = zip(self._sources, self._keeps, strict=True)
        found = [source.hits(queries, depth, keep) for source, keep in pairs]
        return [fuse(rankings, self._weights, k) for rankings in zip(*found, strict=True)]


def _in_their_places(first: Sequence[Hit], reranked: Sequence[Hit]) -> list[Hit]:
    """Return pages in the order of the second search; those that it does not know keep the place of the first.

    Scores are those of the second search; a page that it does not know gets the score of the page before it (or, at the
    top, after it).

    >>> _in_their_places([Hit("new", 9.0), Hit("a", 8.0), Hit("b", 7.0)], [Hit("b", 0.9), Hit("a", 0.1)])
    [Hit(page_id='new', score=0.9), Hit(page_id='b', score=0.9), Hit(page_id='a', score=0.1)]
    """
    known, ordered = {hit.page_id for hit in reranked}, iter(reranked)
    merged = [hit if hit.page_id not in known else next(ordered) for hit in first]
    score = reranked[0].score if reranked else 0.0
    placed = []
    for hit in merged:
        score = hit.score if hit.page_id in known else score
        placed.append(Hit(hit.page_id, score))
    return placed
