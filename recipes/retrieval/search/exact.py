"""Exact search: every page is scored, and the order of results depends on nothing but scores and page ids.

Scores are inner products of unit vectors, or MaxSim: the best page vector for every query vector, summed. They are
rounded to 6 decimals and ordered by (-score, page id).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recipes.retrieval.search.keep import ALL, Keep
from recipes.retrieval.search.shards import Shard

DECIMALS = 6
FLOAT32_ERROR = 2e-5  # of a score, relative, with room to spare


@dataclass(frozen=True, slots=True)
class Hit:
    """One found page."""

    page_id: str
    score: float


def rank(page_ids: Iterable[str], scores_P: Iterable[float], k: int) -> list[Hit]:
    """Return the k best pages by (-score, page id); all of them if there are fewer.

    >>> rank(["b", "a", "c"], np.array([0.5, 0.5, 0.9]), 2)
    [Hit(page_id='c', score=0.9), Hit(page_id='a', score=0.5)]
    """
    rounded = [round(float(score), DECIMALS) for score in scores_P]
    ordered = sorted(zip(rounded, page_ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
    return [Hit(page_id, score) for score, page_id in ordered[:k]]


def max_sim(query_TD: np.ndarray, pages_VD: np.ndarray, starts_P: np.ndarray) -> np.ndarray:
    """Return (P,) late-interaction scores of pages whose vectors follow one another, each from its `starts_P`.

    >>> max_sim(np.eye(2), np.array([[1.0, 0.0], [0.0, 0.5], [0.6, 0.8]]), np.array([0, 2]))
    array([1.5, 1.4])
    """
    return np.maximum.reduceat(pages_VD @ query_TD.T, starts_P, axis=0).sum(axis=1)


def scan(
    shards: Iterable[Shard], queries: Sequence[np.ndarray], k: int, *, multi_vector: bool, keep: Keep = ALL
) -> list[list[Hit]]:
    """Score every page that is kept for every query; memory is bounded by one block.

    Args:
        queries: (D,) each, or (T, D) each for an index of several vectors per page.
    """
    best: list[list[Hit]] = [[] for _ in queries]
    for shard in shards:
        for first, last in shard.blocks():
            start, alive_P = shard.offsets[first], shard.alive_P[first:last]
            if keep != ALL:
                alive_P = alive_P & keep.mask(shard.ids_P[first:last])
                if not alive_P.any():
                    continue
            block_VD = np.asarray(shard.vectors_VD[start : shard.offsets[last]], dtype=np.float32)
            if multi_vector:
                scores_QP = [max_sim(query, block_VD, shard.offsets[first:last] - start) for query in queries]
            else:
                scores_QP = list((block_VD @ np.stack(queries).T).T)
            for number, query in enumerate(queries):
                hits = best[number]
                floor = hits[-1].score if len(hits) == k else -np.inf
                rows = first + _promising(np.where(alive_P, scores_QP[number], -np.inf), k, floor)
                if len(rows):
                    found = {shard.ids_P[row].decode(): exact_score(query, shard.vectors(row)) for row in rows}
                    found |= {hit.page_id: hit.score for hit in hits}
                    best[number] = rank(found, found.values(), k)
        shard.release()
    return best


def _promising(scores_P: np.ndarray, k: int, floor: float) -> np.ndarray:
    """Return the rows that may be among the best k, by scores in float32; those that tie with the k-th included."""
    if len(scores_P) > k:
        floor = max(floor, float(np.partition(scores_P, -k)[-k]))
    margin = FLOAT32_ERROR * max(1.0, abs(floor)) if np.isfinite(floor) else 0.0
    return np.flatnonzero((scores_P >= floor - margin) & (scores_P > -np.inf))


def rank_candidates(query: np.ndarray, pages: Mapping[str, np.ndarray], k: int) -> list[Hit]:
    """Return the k best of some pages, given the (vectors, D) of each."""
    return rank(pages, [exact_score(query, page_VD) for page_VD in pages.values()], k)


def exact_score(query: np.ndarray, page_VD: np.ndarray) -> float:
    """Return one page's score in float64: the same from every search, down to the rounded digit."""
    query_TD = np.atleast_2d(query).astype(np.float64)
    return float(max_sim(query_TD, page_VD.astype(np.float64), np.array([0]))[0])
