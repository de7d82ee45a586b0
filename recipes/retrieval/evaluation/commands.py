"""The commands of `recipes.retrieve` for sets of queries: run, merge, evaluate, top, generate, unpack."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.answers.predictions import FAILED
from recipes.retrieval.answers.answer_file import answer_file, line_of
from recipes.retrieval.answers.generation import AskedQuestion
from recipes.retrieval.command_line import (
    add_answerer,
    add_encoder,
    add_search_options,
    add_sync,
    open_reader,
    open_retriever,
)
from recipes.retrieval.evaluation import scores
from recipes.retrieval.evaluation.answer_rules import RULES
from recipes.retrieval.evaluation.visrag_sets import write_visrag_set
from recipes.retrieval.pages.store import PageStore
from recipes.retrieval.search.exact import Hit
from recipes.retrieval.search.found import found_pages
from recipes.retrieval.search.fusion import FUSED, fuse_runs, learn_weights, parse_weights
from rollout.files import write_bytes, write_text
from rsgrpo.errors import InputError

QUERIES_AT_ONCE = 256


def add_evaluation(commands: Any) -> None:
    """Add the commands."""
    run = commands.add_parser("run", help="search for every query of a file; write a TREC run file")
    add_encoder(run)
    run.add_argument("--queries", type=Path, required=True, help="jsonl with _id and text")
    run.add_argument("--out", type=Path, required=True, metavar="RUN", help="TREC run file to write")
    add_search_options(run)
    add_sync(run)
    run.set_defaults(run=_run)
    fuse = commands.add_parser("fuse", help="fuse run files of several searches by reciprocal rank")
    fuse.add_argument("run_files", type=Path, nargs="+", metavar="RUN", help="of the same queries, searched in any way")
    fuse.add_argument("--out", type=Path, required=True, metavar="RUN", help="TREC run file to write")
    fuse.add_argument("-k", type=int, default=100, help="number of pages; each run should have at least as many")
    fuse.add_argument("--weights", default="", help="one per run, such as 4,1; default: all 1")
    fuse.add_argument(
        "--learn-from", type=Path, metavar="QRELS", help="choose the weights with the best nDCG@10 on these judgments"
    )
    fuse.add_argument("--store", type=Path, help="allows qrels to name pages by document instead of page id")
    fuse.set_defaults(run=_fuse)
    merge = commands.add_parser("merge", help="merge the run files of several stores into one")
    merge.add_argument("run_files", type=Path, nargs="+", metavar="RUN", help="of the same queries and encoder")
    merge.add_argument("--out", type=Path, required=True, metavar="RUN", help="TREC run file to write")
    merge.add_argument("-k", type=int, default=10, help="number of pages; each run should have at least as many")
    merge.set_defaults(run=_merge)
    evaluate = commands.add_parser("evaluate", help="score a run file against judgments")
    evaluate.add_argument("run_file", type=Path, metavar="RUN", help="that run, fuse or merge wrote")
    evaluate.add_argument("--qrels", type=Path, required=True, help="BEIR or TREC judgments")
    evaluate.add_argument("--store", type=Path, help="allows qrels to name pages by document instead of page id")
    evaluate.add_argument("--cutoffs", type=int, nargs="+", default=[1, 3, 5, 10], help="pages that count")
    evaluate.add_argument("--out", type=Path, help="JSON of all scores, also per query; default: RUN with .scores.json")
    evaluate.set_defaults(run=_evaluate)
    top = commands.add_parser("top", help="write a topK_test.jsonl of questions with their retrieved pages")
    top.add_argument("store", type=Path, metavar="STORE", help="folder that ingest made")
    top.add_argument("run_file", type=Path, metavar="RUN", help="that run, fuse or merge wrote")
    top.add_argument("--queries", type=Path, required=True, help="jsonl with _id, text and answers")
    top.add_argument("--qrels", type=Path, required=True, help="BEIR or TREC judgments")
    top.add_argument("--out", type=Path, required=True, help="jsonl file to write")
    top.add_argument("-k", type=int, default=3, help="number of pages per question")
    top.set_defaults(run=_top)
    generate = commands.add_parser("generate", help="answer every query of a file from a run's pages, and score")
    generate.add_argument("store", type=Path, metavar="STORE", help="folder that ingest made")
    generate.add_argument("--queries", type=Path, required=True, help="jsonl with _id, text and answers")
    pages = generate.add_mutually_exclusive_group(required=True)
    pages.add_argument("--run-file", type=Path, metavar="RUN", help="answer from the first K pages of this run")
    pages.add_argument("--oracle", type=Path, metavar="QRELS", help="answer from the relevant pages themselves")
    generate.add_argument("--out", type=Path, required=True, help="jsonl of answers")
    generate.add_argument("--rule", choices=RULES, help="data set whose rule decides what is correct")
    generate.add_argument("-k", type=int, default=3, help="number of pages per question")
    generate.add_argument("--device", default="", help="default: a GPU if there is one")
    add_answerer(generate)
    generate.set_defaults(run=_generate)
    unpack = commands.add_parser("unpack", help="turn VisRAG-Ret-Test-* parquet into documents, queries and qrels")
    unpack.add_argument("source", help="folder or hub name")
    unpack.add_argument("--out", type=Path, required=True, help="folder to write")
    unpack.set_defaults(run=_unpack)


def _run(options: argparse.Namespace) -> None:
    queries = scores.read_queries(options.queries)
    if not queries:
        raise InputError(f"{options.queries} has no queries")
    retriever = open_retriever(options)
    run = {}
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        batch = queries[start : start + QUERIES_AT_ONCE]
        for query, hits in zip(batch, retriever.hits([query.text for query in batch], options.k), strict=True):
            run[query.id] = hits
    scores.write_run(options.out, run, tag=retriever.tag)
    print(f"{len(run)} queries, up to {options.k} pages each: {options.out}")


def _fuse(options: argparse.Namespace) -> None:
    if options.k < 1:
        raise InputError(f"k must be >= 1, got {options.k}")
    runs = [scores.read_run(file) for file in options.run_files]
    names = [str(file) for file in options.run_files]
    weights = parse_weights(options.weights, names, [1.0] * len(names))
    if options.learn_from is not None:
        qrels = _qrels(options.learn_from, PageStore.open(options.store) if options.store else None)
        judged = [{query: hits for query, hits in run.items() if query in qrels} for run in runs]

        def quality(weights: Sequence[float]) -> float:
            return scores.evaluate_run(fuse_runs(judged, weights, 10), qrels, [10]).mean["ndcg@10"]

        weights, best = learn_weights(len(runs), quality)
        print(f"weights {','.join(f'{weight:g}' for weight in weights)}: nDCG@10 {best:.4f} on {options.learn_from}")
    run = fuse_runs(runs, weights, options.k)
    scores.write_run(options.out, run, tag=FUSED)
    print(f"{len(run)} queries of {len(runs)} runs, up to {options.k} pages each: {options.out}")


def _merge(options: argparse.Namespace) -> None:
    run, tag = scores.merge_runs(options.run_files, options.k)
    scores.write_run(options.out, run, tag)
    print(f"{len(run)} queries of {len(options.run_files)} runs, up to {options.k} pages each: {options.out}")


def _evaluate(options: argparse.Namespace) -> None:
    qrels = _qrels(options.qrels, PageStore.open(options.store) if options.store else None)
    run = scores.read_run(options.run_file)
    found = scores.evaluate_run(run, qrels, options.cutoffs)
    ranked = {hit.page_id for hits in run.values() for hit in hits}
    if not options.store and ranked.isdisjoint(page for pages in qrels.values() for page in pages):
        print("warning: no judged page is in the run; if judgments name documents, add --store STORE", file=sys.stderr)
    out = options.out or options.run_file.with_suffix(".scores.json")
    write_text(out, json.dumps(asdict(found) | {"num_queries": len(found.per_query)}, indent=1) + "\n")
    print("\n".join(f"{name:<10} {value:.4f}" for name, value in found.mean.items()))
    print(
        f"{len(found.per_query)} queries ({found.num_missing} missing from the run count as 0; left out: "
        f"{found.num_without_relevant} without a relevant page, {found.num_unjudged} not judged): {out}"
    )


def _top(options: argparse.Namespace) -> None:
    store = PageStore.open(options.store)
    run = scores.read_run(options.run_file)
    images = {page_id: page.image for page_id, page in _found(store, run, options.k).items()}
    rows = scores.top_rows(scores.read_queries(options.queries), run, _qrels(options.qrels, store), images, options.k)
    _write_lines(options.out, rows)
    print(f"{len(rows)} questions, {sum(row['is_sufficient'] for row in rows)} with every relevant page: {options.out}")


def _generate(options: argparse.Namespace) -> None:
    rule = RULES[options.rule] if options.rule else None
    queries = scores.read_queries(options.queries)
    asked = _asked(options, queries)
    reader = open_reader(options, max(len(question.pages) for question in asked))
    with closing(reader.answerer):
        limits = (options.max_tokens, options.max_prompt_tokens, options.answer_max_pixels)
        rows, num_reused = answer_file(asked, options.setting, reader, options.out, limits)
    for query, row in zip(queries, rows, strict=True):
        row["answers"] = list(query.answers)
        row.pop("right", None)
        if rule and query.answers:
            row["right"] = rule(row["answer"] or row["raw"], query.answers)
    _write_lines(options.out, rows)
    judged = [row["right"] for row in rows if "right" in row]
    accuracy = f", {sum(judged) / len(judged):.4f} correct by the rule of {options.rule}" if judged else ""
    print(f"{len(rows)} answers ({num_reused} from before){accuracy}: {options.out}")
    for fault, count in _common_faults(rows).items():
        print(f"  {count} {fault}")


def _common_faults(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return how many answers have each fault that makes them unusable or misleading."""
    return {
        fault: count
        for fault, count in {
            "failed": sum(row["finish_reason"] == FAILED for row in rows),
            "cut off at the token limit (raise --max-tokens)": sum(row["finish_reason"] == "length" for row in rows),
            "empty": sum(not (row["answer"] or row["raw"]).strip() for row in rows),
            "that cite a page that was not given": sum("names no page" in " ".join(row["errors"]) for row in rows),
        }.items()
        if count
    }


def _asked(options: argparse.Namespace, queries: Sequence[scores.Query]) -> list[AskedQuestion]:
    """Return every query with its pages: those of the run, or the relevant ones."""
    store = PageStore.open(options.store)
    if options.oracle:
        run, k = {}, None
        for query_id, judged in _qrels(options.oracle, store).items():
            run[query_id] = [Hit(page, float(grade)) for page, grade in sorted(judged.items()) if grade > 0]
    else:
        run, k = scores.read_run(options.run_file), options.k
    pages = _found(store, run, k)
    asked = []
    for query in queries:
        hits = run.get(query.id, [])[:k]
        if not hits:
            raise InputError(f"query {query.id} has no pages; remove it from {options.queries}, or search for it")
        asked.append(AskedQuestion(query.id, query.text, tuple(found_pages(hits, pages))))
    if not asked:
        raise InputError(f"{options.queries} has no queries")
    return asked


def _unpack(options: argparse.Namespace) -> None:
    num_pages, num_queries, num_judgments = write_visrag_set(options.source, options.out)
    print(f"{num_pages} pages, {num_queries} queries, {num_judgments} judgments: {options.out}")


def _qrels(file: Path, store: PageStore | None) -> scores.Qrels:
    qrels = scores.read_qrels(file)
    return qrels if store is None else scores.resolve_qrels(qrels, list(store.pages()))


def _found(store: PageStore, run: scores.Run, k: int | None) -> dict[str, Any]:
    if k is not None and k < 1:
        raise InputError(f"k must be >= 1, got {k}")
    wanted = {hit.page_id for hits in run.values() for hit in hits[:k]}
    pages = store.find(wanted)
    if missing := wanted - set(pages):
        raise InputError(f"page {min(missing)} of the run is not in {store.folder}; run the search again")
    return pages


def _write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, b"".join(map(line_of, rows)))
