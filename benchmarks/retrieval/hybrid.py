"""Vectors, late interaction, words, and fusions on questions of a person: `python -m benchmarks.retrieval.hybrid`.

Two sets, each over documents of its own: 115 questions about the gnuplot manual (`questions_gnuplot.tsv`), and 139
about the manuals of Bash and R (`questions_shell.tsv`). A line is the page where the section begins that
answers, and the question. They were written from the tables of contents, before any search was run.

`tools/fetch_test_documents.py` fetches the manuals and MiniLM, which reads the text layer: as one vector per page, and
as one per token (late interaction for which it was not trained). The constant and the weights of `--by hybrid` were
chosen on the first set and confirmed on the second; weights are also learnt on one set and judged on the other.
Intervals are of 95%, by the bootstrap over questions; those of differences are paired. What is finished is kept: the
same command resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.retrieval.outline import write_judgments
from recipes import retrieve
from recipes.retrieval.evaluation.scores import evaluate_run, read_qrels, read_run, resolve_qrels
from recipes.retrieval.pages.store import PageStore
from recipes.retrieval.search.exact import Hit
from recipes.retrieval.search.fusion import CONSTANT, fuse_runs, learn_weights, usual_weights
from tools.fetch_test_documents import FURTHER, MANUAL, MANUALS, MODEL

Run = Mapping[str, Sequence[Hit]]

HERE = Path(__file__).parent
METRICS = ("recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10")
CUTOFFS = (1, 5, 10)
DEPTH = 100
NUM_RESAMPLES = 10_000
POOLED_CANDIDATES = 30  # a tenth of the pages
TEXTBOOK = 60.0  # the constant of the authors of the fusion, for comparison
FUSIONS = {
    "vectors + words": ("vectors", "words"),
    "late + words": ("late", "words"),
    "vectors + late": ("vectors", "late"),
    "all three": ("vectors", "late", "words"),
}
USUAL = {name: usual_weights([part == "late" for part in parts]) for name, parts in FUSIONS.items()}


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Questions and the documents that they are about. page: what a line's page is preceded by in judgments."""

    name: str
    file: Path
    documents: tuple[Path, ...]
    page: str = ""


SETS = (
    QuestionSet("gnuplot", HERE / "questions_gnuplot.tsv", (MANUAL,), f"{MANUAL.name}#"),
    QuestionSet(
        "bash and R",
        HERE / "questions_shell.tsv",
        tuple(MANUALS / name for names in FURTHER.values() for name in names),
    ),
)


def per_question(run: Run, qrels: Mapping[str, Mapping[str, int]], metric: str) -> np.ndarray:
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


def table(runs: Mapping[str, Run], fusions: Mapping[str, Run], qrels: Mapping[str, Mapping[str, int]]) -> None:
    """Print every metric of every run, and how far each fusion is from the best of its parts."""
    for metric in METRICS:
        values = {name: per_question(run, qrels, metric) for name, run in {**runs, **fusions}.items()}
        print(f"{metric:<10}" + "".join(f"  {name} {shown(found)}" for name, found in values.items()))
        for name in fusions:
            best = max(FUSIONS[name], key=lambda part: float(values[part].mean()))
            print(f"{'':<10}  {name} - {best}: {shown(values[name] - values[best])}")


def make_late(folder: Path, model: str) -> None:
    """Write MiniLM as a late-interaction model: its tokens' vectors as they are."""
    if folder.exists():
        return
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Transformer

    MultiVectorEncoder(modules=[Transformer(model), MultiVectorMask()], device="cpu").save(str(folder))


def search(questions: QuestionSet, out: Path, model: str) -> tuple[dict[str, Run], dict[str, dict[str, int]]]:
    """Ingest, index and search; return the runs by name and the judgments.

    Raises:
        SystemExit: a command fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    store, late = str(out / "store"), str(out / "late")
    lines = [line.split("\t") for line in questions.file.read_text().splitlines()]
    write_judgments([(question, f"{questions.page}{page}") for page, question in lines], out)
    make_late(out / "late-model", model)
    by_late = ["--index", late]
    searches = {
        "vectors": [],
        "late": by_late,
        "late, pooled first": [*by_late, "--backend", "flat", "--candidates", str(POOLED_CANDIDATES)],
        "words": ["--by", "words"],
    }
    asked = ["--queries", str(out / "queries.jsonl"), "-k", str(DEPTH)]
    files = {name: out / f"{name.replace(', ', '-').replace(' ', '-')}.run" for name in searches}
    commands = [
        ["ingest", *map(str, questions.documents), "--out", store, "--dpi", "60"],
        ["index", store, "--model", model, "--kind", "text", "--shard-pages", "64"],
        ["index", store, "--model", str(out / "late-model"), "--kind", "late", *by_late, "--shard-pages", "64"],
        ["index", store, *by_late, "--faiss", "flat"],
    ]
    commands += [["run", store, *asked, "--out", str(files[name]), *by] for name, by in searches.items()]
    for command in commands:
        if code := retrieve.main(command):
            raise SystemExit(code)
    qrels = resolve_qrels(read_qrels(out / "qrels.tsv"), list(PageStore.open(Path(store)).pages()))
    return {name: read_run(file) for name, file in files.items()}, qrels


def fused(
    runs: Mapping[str, Run], weights: Mapping[str, Sequence[float]], constant: float = CONSTANT
) -> dict[str, Run]:
    """Return the fusions."""
    return {
        name: fuse_runs([runs[part] for part in parts], weights[name], DEPTH, constant=constant)
        for name, parts in FUSIONS.items()
    }


def learnt(runs: Mapping[str, Run], qrels: Mapping[str, Mapping[str, int]]) -> dict[str, list[float]]:
    """Return the weights of each fusion that suit judgments best."""
    found = {}
    for name, parts in FUSIONS.items():
        chosen = [runs[part] for part in parts]

        def quality(weights: Sequence[float], chosen: Sequence[Run] = chosen) -> float:
            return evaluate_run(fuse_runs(chosen, weights, 10), qrels, [10]).mean["ndcg@10"]

        found[name] = learn_weights(len(parts), quality)[0]
    return found


def main() -> int:
    """Print the scores of each search and of their fusions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("hybrid"))
    parser.add_argument("--model", default=str(MODEL))
    options = parser.parse_args()
    found = [search(questions, options.out / questions.name.replace(" ", "-"), options.model) for questions in SETS]
    for questions, (runs, qrels) in zip(SETS, found, strict=True):
        equal = {name: [1.0] * len(parts) for name, parts in FUSIONS.items()}
        print(f"\n{questions.name}: {len(qrels)} questions, constant {TEXTBOOK:g} and equal weights")
        table(runs, fused(runs, equal, TEXTBOOK), qrels)
        print(f"\n{questions.name}: {len(qrels)} questions, as --by hybrid fuses")
        table(runs, fused(runs, USUAL), qrels)
        pairs = [(runs["late"][query][:10], runs["late, pooled first"][query][:10]) for query in qrels]
        shared = np.mean([len({hit.page_id for hit in one} & {hit.page_id for hit in two}) for one, two in pairs])
        print(f"of the 10 best pages by late interaction, {shared:.2f} are among {POOLED_CANDIDATES} pooled candidates")
    for questions, (runs, qrels), (other_runs, other_qrels) in zip(SETS, found, reversed(found), strict=True):
        weights = learnt(other_runs, other_qrels)
        print(f"\n{questions.name}: weights {weights} learnt on the other set")
        table(runs, fused(runs, weights), qrels)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
