"""Vectors, words and both on questions of a person: `python -m benchmarks.retrieval_hybrid`.

115 questions about the gnuplot manual, in `retrieval_questions.tsv`: the page where the section begins that answers,
and the question. They were written from the table of contents, before any search was run.
`tools/fetch_test_documents.py` fetches the manual and MiniLM, which reads the text layer. Weights are learnt on the odd
lines and judged on the even ones.
Intervals are of 95%, by the bootstrap over questions; those of differences are paired.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.retrieval_outline import write_judgments
from recipes import retrieve
from recipes.retrieval.evaluation.scores import evaluate_run, read_qrels, read_run, resolve_qrels
from recipes.retrieval.pages.store import PageStore
from recipes.retrieval.search.exact import Hit
from recipes.retrieval.search.fusion import fuse_runs, learn_weights
from tools.fetch_test_documents import MANUAL, MODEL

QUESTIONS = Path(__file__).with_name("retrieval_questions.tsv")
METRICS = ("recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10")
CUTOFFS = (1, 5, 10)
NUM_RESAMPLES = 10_000


def per_question(run: Mapping[str, Sequence[Hit]], qrels: Mapping[str, Mapping[str, int]], metric: str) -> np.ndarray:
    """Return (Q,) scores in the order of the judgments."""
    scores = evaluate_run(run, qrels, CUTOFFS).per_query
    return np.array([scores[query][metric] for query in qrels])


def interval(values_Q: np.ndarray) -> tuple[float, float]:
    """Return the bounds of the mean."""
    rows = np.random.default_rng(0).integers(0, len(values_Q), (NUM_RESAMPLES, len(values_Q)))
    low, high = np.percentile(values_Q[rows].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def shown(values_Q: np.ndarray) -> str:
    """Return the mean with its interval."""
    low, high = interval(values_Q)
    return f"{values_Q.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def table(runs: Mapping[str, Mapping[str, Sequence[Hit]]], qrels: Mapping[str, Mapping[str, int]]) -> None:
    """Print every metric of every run, and how far the last run is from the better of the others."""
    for metric in METRICS:
        values = {name: per_question(run, qrels, metric) for name, run in runs.items()}
        print(f"{metric:<10}" + "".join(f"  {name} {shown(found)}" for name, found in values.items()))
        last = list(runs)[-1]
        others = {name: found for name, found in values.items() if name in ("vectors", "words")}
        best = max(others, key=lambda name: float(others[name].mean()))
        print(f"{'':<10}  {last} - {best}: {shown(values[last] - values[best])}")


def main() -> int:
    """Print the scores of each search and of their fusion."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("hybrid"))
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--kind", default="text")
    options = parser.parse_args()
    out, store = options.out, str(options.out / "store")
    out.mkdir(parents=True, exist_ok=True)
    lines = [line.split("\t") for line in QUESTIONS.read_text().splitlines()]
    write_judgments([(question, f"{MANUAL.name}#{page}") for page, question in lines], out)
    searches = {"vectors": ["--by", "vectors"], "words": ["--by", "words"]}
    commands = [
        ["ingest", str(MANUAL), "--out", store, "--dpi", "60"],
        ["index", store, "--model", options.model, "--kind", options.kind],
    ]
    queries = ["--queries", str(out / "queries.jsonl"), "-k", "100"]
    commands += [["run", store, *queries, "--out", str(out / f"{name}.run"), *by] for name, by in searches.items()]
    for command in commands:
        if code := retrieve.main(command):
            return code
    qrels = resolve_qrels(read_qrels(out / "qrels.tsv"), list(PageStore.open(Path(store)).pages()))
    runs = {name: read_run(out / f"{name}.run") for name in searches}
    print(f"all {len(qrels)} questions, equal weights")
    table(runs | {"hybrid": fuse_runs(list(runs.values()), [1.0, 1.0], 100)}, qrels)
    odd, even = ({query: qrels[query] for query in list(qrels)[start::2]} for start in (0, 1))

    def quality(weights: Sequence[float]) -> float:
        return evaluate_run(fuse_runs(list(runs.values()), weights, 10), odd, [10]).mean["ndcg@10"]

    weights, _ = learn_weights(2, quality)
    print(f"\n{len(even)} questions, weights {weights} learnt on the other {len(odd)}")
    table(runs | {"hybrid": fuse_runs(list(runs.values()), weights, 100)}, even)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
