"""One ranking from several: reciprocal rank fusion (Cormack, Clarke, Buettcher 2009), with weights that can be learnt.

    score(page) = sum over searches of weight / (CONSTANT + rank of the page in it)

Ranks alone count, so cosine, MaxSim and BM25 need no common scale. A search that does not find a page adds nothing.

The authors' constant, 60, hardly tells the first page of a search from its tenth: it suits many searches of equal
quality. With 4, a page must be near the top of one of a few. 4, and the weight of late interaction, were chosen on the
questions about the gnuplot manual and confirmed on those about Bash and R (docs/reference/retrieval.md, "Measured").
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from recipes.retrieval.search.exact import Hit, rank
from rsgrpo.errors import InputError

CONSTANT = 4.0
FUSED, FUSED_MARK = "fused", "+"  # tag of a fused run, or what is between the tags of its searches
LATE_WEIGHT = 4.0  # of late interaction, where every other search weighs 1
STEPS = 10  # of a weight from 0 to 1, when weights are learnt


def fuse(
    rankings: Sequence[Sequence[Hit]], weights: Sequence[float], k: int, *, constant: float = CONSTANT
) -> list[Hit]:
    """Return the k best pages of several rankings of one query, by (-fused score, page id).

    >>> fuse([[Hit("a", 9.0), Hit("b", 8.0)], [Hit("b", 0.4)]], [1.0, 1.0], 2)
    [Hit(page_id='b', score=0.366667), Hit(page_id='a', score=0.2)]
    """
    scores: dict[str, float] = {}
    for hits, weight in zip(rankings, weights, strict=True):
        for place, hit in enumerate(hits, start=1):
            scores[hit.page_id] = scores.get(hit.page_id, 0.0) + weight / (constant + place)
    return rank(scores, scores.values(), k)


def usual_weights(is_late: Sequence[bool]) -> list[float]:
    """Return the weights of searches that were not given any, of which some are by late interaction."""
    return [LATE_WEIGHT if late else 1.0 for late in is_late]


def parse_weights(text: str, names: Sequence[str], usual: Sequence[float]) -> list[float]:
    """Return the weights of searches from "1,0.5"; the usual ones for "".

    Raises:
        InputError: there are not as many as searches, or one is negative.
    """
    if not text:
        return list(usual)
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"weights are numbers with commas between them, such as 1,0.5; got {text!r}") from error
    if len(weights) != len(names) or min(weights) < 0 or max(weights) <= 0:
        raise InputError(
            f"{text!r} must have a weight >= 0 for each of {', '.join(names)}, in this order, and one above 0"
        )
    return weights


def learn_weights(
    num_searches: int, quality: Callable[[Sequence[float]], float], *, steps: int = STEPS
) -> tuple[list[float], float]:
    """Return the weights with the highest quality on a grid, and that quality; of equals, the most even.

    Args:
        quality: of weights on a validation set, such as the mean nDCG@10 of the fused rankings.
    """
    scored = [(quality(weights), -_unevenness(weights), weights) for weights in _grid(num_searches, steps)]
    best, _, weights = max(scored, key=lambda entry: entry[:2])
    return list(weights), best


def _grid(num_searches: int, steps: int) -> Iterator[tuple[float, ...]]:
    """Yield all weights that are multiples of 1/steps and sum to 1, and equal ones."""
    yield (1.0 / num_searches,) * num_searches
    for cuts in itertools.combinations_with_replacement(range(steps + 1), num_searches - 1):
        edges = (0, *cuts, steps)
        yield tuple((high - low) / steps for low, high in itertools.pairwise(edges))


def _unevenness(weights: Sequence[float]) -> float:
    return sum((weight - 1 / len(weights)) ** 2 for weight in weights)


def fuse_runs(
    runs: Sequence[Mapping[str, Sequence[Hit]]], weights: Sequence[float], k: int, *, constant: float = CONSTANT
) -> dict[str, list[Hit]]:
    """Return the fused ranking of every query of several runs."""
    queries = dict.fromkeys(query for run in runs for query in run)
    return {query: fuse([run.get(query, ()) for run in runs], weights, k, constant=constant) for query in queries}
