"""Rankings against relevance judgments: nDCG, MRR and recall by pytrec_eval, with every choice fixed.

- Ties are ordered by (-score, page id) here; the library sees only ranks.
- A judged query that is missing from the run scores 0 and is counted. A query without a relevant page is left out and
  counted, and so is a query of the run without judgments.
- nDCG gains are the judgments themselves (linear), as in trec_eval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.retrieval.pages.store import Page
from recipes.retrieval.search.exact import Hit, rank
from recipes.retrieval.search.fusion import FUSED, FUSED_MARK
from rollout.files import read_jsonl, write_text
from rsgrpo.errors import InputError

Run = Mapping[str, Sequence[Hit]]
Qrels = Mapping[str, Mapping[str, int]]
QUERY_ID_KEYS = ("_id", "id", "qid", "query-id", "query_id")
QUERY_KEYS = ("text", "query", "question")
ANSWER_KEYS = ("answers", "answer")


@dataclass(frozen=True, slots=True)
class Query:
    """One query. answers: empty if the file has none."""

    id: str
    text: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RetrievalScores:
    """Scores of a run.

    mean: metric name ("ndcg@10", "mrr@10", "recall@10") -> mean over the judged queries.
    num_missing: judged queries that the run lacks. num_without_relevant, num_unjudged: queries left out.
    per_query: query id -> the same metrics of one query.
    """

    mean: dict[str, float]
    num_missing: int
    num_without_relevant: int
    num_unjudged: int
    per_query: dict[str, dict[str, float]]


def evaluate_run(run: Run, qrels: Qrels, cutoffs: Sequence[int]) -> RetrievalScores:
    """Score a run; InputError if no query has a relevant page, a cutoff is < 1, or a ranking contains a page twice."""
    import pytrec_eval

    if not cutoffs or min(cutoffs) < 1:
        raise InputError(f"--cutoffs must be >= 1, got {list(cutoffs)}")
    judged = {query: dict(pages) for query, pages in qrels.items() if any(grade > 0 for grade in pages.values())}
    if not judged:
        raise InputError("no query has a relevant page; check that it is the right qrels file")
    ranked = {query: pages for query in judged if (pages := _ordered(query, run.get(query, ())))}
    # the library would order ties its own way: it gets ranks
    ranks = {query: {page: -float(rank) for rank, page in enumerate(pages)} for query, pages in ranked.items()}
    listed = ",".join(map(str, sorted(set(cutoffs))))
    evaluator = pytrec_eval.RelevanceEvaluator(judged, {f"ndcg_cut.{listed}", f"recall.{listed}", "recip_rank"})
    values = evaluator.evaluate(ranks) if ranks else {}
    per_query = {query: _at_cutoffs(values.get(query, {}), cutoffs) for query in judged}
    names = next(iter(per_query.values()))
    mean = {name: sum(scores[name] for scores in per_query.values()) / len(per_query) for name in names}
    return RetrievalScores(
        mean,
        num_missing=len(judged) - len(ranked),
        num_without_relevant=len(qrels) - len(judged),
        num_unjudged=len(set(run) - set(qrels)),
        per_query=per_query,
    )


def _at_cutoffs(values: Mapping[str, float], cutoffs: Sequence[int]) -> dict[str, float]:
    """Return one query's metrics from those of trec_eval, which has no cutoff for the reciprocal rank."""
    scores, reciprocal = {}, values.get("recip_rank", 0.0)
    for cutoff in cutoffs:
        scores[f"ndcg@{cutoff}"] = values.get(f"ndcg_cut_{cutoff}", 0.0)
        scores[f"mrr@{cutoff}"] = reciprocal if reciprocal * (cutoff + 0.5) > 1 else 0.0
        scores[f"recall@{cutoff}"] = values.get(f"recall_{cutoff}", 0.0)
    return scores


def _ordered(query: str, hits: Sequence[Hit]) -> list[str]:
    pages = [hit.page_id for hit in _sorted(hits)]
    if len(set(pages)) != len(pages):
        raise InputError(f"query {query}: the run contains a page twice; remove one of the lines")
    return pages


def _sorted(hits: Iterable[Hit]) -> list[Hit]:
    return sorted(hits, key=lambda hit: (-hit.score, hit.page_id))


def merge_runs(files: Sequence[Path], k: int) -> tuple[dict[str, list[Hit]], str]:
    """Return the k best pages of each query over runs of several stores, and the tag that all of them share.

    A page that is in several stores counts once, with its best score.

    Raises:
        InputError: k < 1, or scores are not comparable: runs have different tags, because different encoders made them,
            or several of them are fused, and a score tells the ranks in one store.
    """
    if k < 1:
        raise InputError(f"k must be >= 1, got {k}")
    best: dict[str, dict[str, float]] = {}
    tags: dict[str, Path] = {}
    for file in files:
        for query, hits in read_run(file).items():
            scores = best.setdefault(query, {})
            for hit in hits:
                scores[hit.page_id] = max(hit.score, scores.get(hit.page_id, hit.score))
        tags |= {line.split()[-1]: file for _, line in _lines(file)}
    if len(tags) > 1:
        shown = ", ".join(f"{tag} in {file}" for tag, file in tags.items())
        raise InputError(f"the runs have different tags ({shown}); merge only runs that one encoder made")
    tag = next(iter(tags), "empty")
    if len(files) > 1 and (FUSED_MARK in tag or tag == FUSED):
        raise InputError(
            f"the runs are of a fused search ({tag}), whose scores tell the ranks in one store only; merge the runs of "
            "each search over all stores, then `fuse` the merged ones"
        )
    return {query: rank(scores, scores.values(), k) for query, scores in best.items()}, tag


def write_run(file: Path, run: Run, tag: str) -> None:
    """Write a TREC run file: query Q0 page rank score tag."""
    lines = []
    for query, hits in run.items():
        if any(character.isspace() for character in query) or not query:
            raise InputError(f"query id {query!r} is empty or has white space, which a TREC run file cannot hold")
        lines += [f"{query} Q0 {hit.page_id} {place} {hit.score:.6f} {tag}\n" for place, hit in enumerate(hits, 1)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(lines))


def read_run(file: Path) -> dict[str, list[Hit]]:
    """Read a TREC run file; scores decide, not the rank column. InputError if a line is malformed."""
    run: dict[str, list[Hit]] = {}
    for number, line in _lines(file):
        fields = line.split()
        try:
            query, _, page, _, score, _ = fields
            if not math.isfinite(float(score)):
                raise ValueError("the score is not finite")
            run.setdefault(query, []).append(Hit(page, float(score)))
        except ValueError as error:
            wanted = "a run line is 'query Q0 page rank score tag'"
            raise InputError(f"{file}:{number}: {wanted}, got {line.strip()!r}") from error
    return {query: _sorted(hits) for query, hits in run.items()}


def read_qrels(file: Path) -> dict[str, dict[str, int]]:
    """Read judgments, separated by tabs or spaces.

    Either BEIR's 'query page grade' (with or without a header) or TREC's 'query 0 page grade'.

    Raises:
        InputError: a line is malformed, or a pair has two different judgments.
    """
    qrels: dict[str, dict[str, int]] = {}
    for number, line in _lines(file):
        fields = line.rstrip("\n").split("\t") if "\t" in line else line.split()
        if number == 1 and not fields[-1].lstrip("-").isdigit():
            continue  # the header
        try:
            if len(fields) not in (3, 4):
                raise ValueError(f"{len(fields)} columns")
            query, page, grade = fields[0], fields[-2], int(fields[-1])
        except ValueError as error:
            raise InputError(f"{file}:{number}: a judgment is 'query page grade', got {line.strip()!r}") from error
        if qrels.setdefault(query, {}).setdefault(page, grade) != grade:
            raise InputError(f"{file}:{number}: query {query} and page {page} have two different judgments")
    return qrels


def read_queries(file: Path) -> list[Query]:
    """Read queries from jsonl: an id, a text and, optionally, answers.

    Raises:
        InputError: a line is malformed, or an id occurs twice.
    """
    queries: dict[str, Query] = {}
    for number, row in read_jsonl(file):
        query_id, text, answers = (_first(row, keys) for keys in (QUERY_ID_KEYS, QUERY_KEYS, ANSWER_KEYS))
        if query_id is None or not isinstance(text, str):
            raise InputError(f"{file}, line {number}: a query needs _id and text (a string), got {', '.join(row)}")
        if str(query_id) in queries:
            raise InputError(f"{file}, line {number}: query id {query_id} occurs twice")
        listed = answers if isinstance(answers, list) else [] if answers is None else [answers]
        queries[str(query_id)] = Query(str(query_id), text, tuple(map(str, listed)))
    return list(queries.values())


def _first(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def resolve_qrels(qrels: Qrels, pages: Sequence[Page]) -> dict[str, dict[str, int]]:
    """Return judgments by page id.

    A judged page may be named by its id, its document, document#number, or its document's name without extension; also
    by the name of a copy of its document, and with the root in front, which tells documents of equal names apart.

    Raises:
        InputError: a relevant page is not in the store, or a name matches several pages.
    """
    names: dict[str, set[str]] = {}
    for page in pages:
        names.setdefault(page.page_id, set()).add(page.page_id)
        known = [page.document, *page.copies]
        for document in {*known, *(f"{page.root}/{name}" for name in known)}:
            stem = document.rpartition(".")[0] or document
            for name in {document, f"{document}#{page.number}", stem}:
                names.setdefault(name, set()).add(page.page_id)
    resolved: dict[str, dict[str, int]] = {}
    for query, judged in qrels.items():
        resolved[query] = {}
        for name, grade in judged.items():
            found = names.get(name, set())
            if len(found) > 1:
                raise InputError(f"qrels: {name!r} matches {len(found)} pages; name one by document#number or page id")
            if grade > 0 and not found:
                raise InputError(f"qrels: page {name!r} of query {query} is not in the store; ingest its document")
            for page_id in found:
                resolved[query][page_id] = max(grade, resolved[query].get(page_id, grade))
    return resolved


def top_rows(
    queries: Sequence[Query], run: Run, qrels: Qrels, images: Mapping[str, str], k: int
) -> list[dict[str, Any]]:
    """Return the rows of a `topK_test.jsonl` as EVisRAG reads them.

    `is_sufficient` is true if every relevant page is among the k.
    """
    rows = []
    for query in queries:
        top = [hit.page_id for hit in run.get(query.id, ())][:k]
        relevant = {page for page, grade in qrels.get(query.id, {}).items() if grade > 0}
        rows.append(
            {
                "qid": query.id,
                "query": query.text,
                "image": [images[page] for page in top],
                "answer": list(query.answers),
                "is_sufficient": bool(relevant) and relevant <= set(top),
            }
        )
    return rows


def _lines(file: Path) -> list[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
