"""From query vectors to ranked pages: exact scans, and exact scores of candidates. Knows no files and no models.

Scores are inner products of unit vectors, or MaxSim: for every query vector its best page vector, summed. They are
rounded to 6 decimals and ordered by (-score, page id), so that the order depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from recipes.retrieval.search.index import IndexFault, Shard, VectorIndex
from rsgrpo.errors import InputError

DECIMALS = 6
FLOAT32_ERROR = 2e-5  # of a score, relative, with room to spare
BLOCK_VECTORS = 16_384  # read and scored at a time


@dataclass(frozen=True, slots=True)
class Hit:
    """One found page."""

    page_id: str
    score: float


def rank(page_ids: Sequence[str], scores_P: np.ndarray, k: int) -> list[Hit]:
    """Return the k best pages by (-score, page id); all of them when there are fewer.

    >>> rank(["b", "a", "c"], np.array([0.5, 0.5, 0.9]), 2)
    [Hit(page_id='c', score=0.9), Hit(page_id='a', score=0.5)]
    """
    rounded = [round(float(score), DECIMALS) for score in scores_P]
    ordered = sorted(zip(rounded, page_ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
    return [Hit(page_id, score) for score, page_id in ordered[:k]]


def max_sim(query_TD: np.ndarray, pages_VD: np.ndarray, starts_P: np.ndarray) -> np.ndarray:
    """Return (P,) late-interaction scores of pages whose vectors lie one after another from `starts_P` on.

    >>> max_sim(np.eye(2), np.array([[1.0, 0.0], [0.0, 0.5], [0.6, 0.8]]), np.array([0, 2]))
    array([1.5, 1.4])
    """
    similarity_VT = pages_VD @ query_TD.T
    return np.maximum.reduceat(similarity_VT, starts_P, axis=0).sum(axis=1)


def exact(index: VectorIndex, queries: Sequence[np.ndarray], k: int) -> list[list[Hit]]:
    """Score every page of the index for every query; memory is bounded by one block.

    Args:
        queries: (D,) each, or (T, D) each for an index of several vectors a page.

    Raises:
        IndexFault: the vectors' lengths differ.
        InputError: k < 1.
    """
    _check(index, queries, k)
    best = [_Best(k) for _ in queries]
    for shard in index.shards():
        for ids, block_VD, starts_P in _blocks(shard):
            if index.multi_vector:
                scores_QP = [max_sim(query, block_VD, starts_P) for query in queries]
            else:
                scores_QP = list((block_VD @ np.stack(queries).T).T)
            for query, found, scores_P in zip(queries, best, scores_QP, strict=True):
                rows = found.promising(scores_P)
                ends_P = np.append(starts_P, len(block_VD))
                found.add([(ids[row], _score(query, block_VD[ends_P[row] : ends_P[row + 1]])) for row in rows])
    return [found.hits() for found in best]


def rerank(
    index: VectorIndex, queries: Sequence[np.ndarray], candidates: Sequence[Sequence[str]], k: int
) -> list[list[Hit]]:
    """Score only the candidates of each query by this index, exactly; candidates that are not in it are dropped.

    Raises:
        As `exact`.
    """
    _check(index, queries, k)
    vectors = index.vectors([page_id for ids in candidates for page_id in ids])
    results = []
    for query, ids in zip(queries, candidates, strict=True):
        known = [page_id for page_id in dict.fromkeys(ids) if page_id in vectors]
        results.append(rank(known, np.array([_score(query, vectors[page_id]) for page_id in known]), k))
    return results


def _score(query: np.ndarray, page_VD: np.ndarray) -> float:
    """Return one page's score in float64: the same from every search, down to the rounded digit."""
    query_TD = np.atleast_2d(query).astype(np.float64)
    return float(max_sim(query_TD, page_VD.astype(np.float64), np.array([0]))[0])


def _check(index: VectorIndex, queries: Sequence[np.ndarray], k: int) -> None:
    if k < 1:
        raise InputError(f"k must be >= 1, got {k}")
    for query in queries:
        if len(index) and query.shape[-1] != index.dim:
            raise IndexFault(f"the query's vector has length {query.shape[-1]}, those of {index.folder} {index.dim}")


def _blocks(shard: Shard) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
    """Yield a shard's living pages, some vectors at a time: ids, float32 vectors, where each page's start."""
    first = 0
    while first < len(shard.page_ids):
        limit = shard.offsets[first] + BLOCK_VECTORS
        last = max(first + 1, int(np.searchsorted(shard.offsets, limit, side="right")) - 1)
        vectors_VD = np.asarray(shard.vectors_VD[shard.offsets[first] : shard.offsets[last]], dtype=np.float32)
        alive_P = shard.alive_P[first:last]
        lengths_P = np.diff(shard.offsets[first : last + 1])
        ids = shard.page_ids[first:last]
        if not alive_P.all():
            vectors_VD = vectors_VD[np.repeat(alive_P, lengths_P)]
            lengths_P = lengths_P[alive_P]
            ids = [page_id for page_id, alive in zip(ids, alive_P, strict=True) if alive]
        if ids:
            yield ids, vectors_VD, np.cumsum(lengths_P) - lengths_P
        first = last


class _Best:
    """The best k of a stream. Its float32 scores only say which pages are worth a second look."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._pairs: list[tuple[str, float]] = []
        self._floor = -np.inf

    def promising(self, scores_P: np.ndarray) -> np.ndarray:
        """Return the rows that may be among the best k, those that tie with the k-th included."""
        floor = self._floor
        if len(scores_P) > self._k:
            floor = max(floor, float(np.partition(scores_P, -self._k)[-self._k]))
        if np.isinf(floor):
            return np.arange(len(scores_P))
        return np.flatnonzero(scores_P >= floor - FLOAT32_ERROR * max(1.0, abs(floor)))

    def add(self, pairs: list[tuple[str, float]]) -> None:
        """Take pages and their exact scores."""
        self._pairs += pairs
        if len(self._pairs) > 4 * self._k:
            hits = self.hits()
            self._pairs = [(hit.page_id, hit.score) for hit in hits]
            self._floor = hits[-1].score

    def hits(self) -> list[Hit]:
        """Return the best k."""
        return rank([page_id for page_id, _ in self._pairs], np.array([score for _, score in self._pairs]), self._k)
