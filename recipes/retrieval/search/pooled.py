"""A few vectors for a page of many, so that late interaction can be searched at scale.

A page's vectors are averaged in GROUPS runs of neighbours (patches of a line, words of a passage), which FAISS holds.
Each vector of a query proposes the rows that are most like it; pages are ordered by the sum over the query's vectors
of their best row; a page that a vector did not propose counts as the last one that it did (as in Lee et al. 2023, XTR).
What is proposed is scored by MaxSim over all its vectors.
"""

from __future__ import annotations

import numpy as np

GROUPS = 16
ROWS_PER_PAGE = 8  # proposed by each vector of a query, for every page that is asked for


def pooled(vectors_VD: np.ndarray, starts_P: np.ndarray) -> np.ndarray:
    """Return (P * GROUPS, D) float32 rows of length 1, those of a page together.

    Args:
        vectors_VD: of all pages, one after another. starts_P: where each page's begin; no page is without vectors.
    """
    vectors_VD = np.asarray(vectors_VD, np.float32)
    lengths_P = np.diff([*starts_P, len(vectors_VD)])
    shares_G = np.arange(GROUPS) / GROUPS
    firsts_PG = starts_P[:, None] + (shares_G * lengths_P[:, None]).astype(np.int64)
    # a page of fewer vectors than groups repeats some: where two groups begin at one vector, both are that vector
    sums_RD = np.add.reduceat(vectors_VD, firsts_PG.ravel(), axis=0)
    lengths_R1 = np.linalg.norm(sums_RD, axis=1, keepdims=True)
    return sums_RD / np.maximum(lengths_R1, np.finfo(np.float32).tiny)


def best_pages(similarities_TN: np.ndarray, rows_TN: np.ndarray, count: int) -> np.ndarray:
    """Return the numbers of the pages that the vectors of one query propose, best first, at most `count`.

    Args:
        similarities_TN, rows_TN: of each vector of the query, the rows that are most like it, best first; -1 for none.

    >>> best_pages(np.array([[0.9, 0.8], [0.7, 0.6]]), np.array([[0, 16], [17, 32]]), 2)
    array([1, 0])
    """
    is_row_TN = rows_TN >= 0
    pages, place = np.unique(rows_TN[is_row_TN] // GROUPS, return_inverse=True)
    last_T = np.where(is_row_TN, similarities_TN, np.inf).min(axis=1)
    best_TP = np.repeat(last_T[:, None], len(pages), axis=1)
    np.maximum.at(best_TP, (np.nonzero(is_row_TN)[0], place), similarities_TN[is_row_TN])
    return pages[np.lexsort((pages, -best_TP.sum(axis=0)))][:count]
