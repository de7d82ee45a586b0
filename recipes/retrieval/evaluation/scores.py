"""Rankings against relevance judgments: nDCG, MRR and Recall by pytrec_eval, with every choice pinned down.

- Ties are ordered by (-score, page id) here; the library sees ranks only.
- A judged query that the run lacks scores 0 and is counted. A query without a relevant page is left out and counted,
  and so is a query of the run that nobody judged.
- nDCG gains are the judgments themselves (linear), as in trec_eval.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.retrieval.pages.store import Page
from recipes.retrieval.search.exact import Hit
from rsgrpo.errors import InputError

Run = Mapping[str, Sequence[Hit]]
Qrels = Mapping[str, Mapping[str, int]]
QUERY_ID_KEYS = ("_id", "id", "qid", "query-id", "query_id")
QUERY_KEYS = ("text", "query", "question")
ANSWER_KEYS = ("answers", "answer")


@dataclass(frozen=True, slots=True)
class Query:
    """One query; answers are empty where the file has none."""

    id: str
    text: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RetrievalScores:
    """Scores of a run.

    mean: metric name ("ndcg@10", "mrr@10", "recall@10") -> mean over the judged queries.
    per_query: query id -> the same of one query.
    num_missing: judged queries that the run lacks. num_without_relevant, num_unjudged: left out.
    """

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]
    num_missing: int
    num_without_relevant: int
    num_unjudged: int


def evaluate_run(run: Run, qrels: Qrels, cutoffs: Sequence[int]) -> RetrievalScores:
    """Score a run.

    Raises:
        InputError: no query has a relevant page, a cutoff is < 1, or a page stands twice in a ranking.
    """
    import pytrec_eval

    if not cutoffs or min(cutoffs) < 1:
        raise InputError(f"--cutoffs must be >= 1, got {list(cutoffs)}")
    judged = {query: dict(pages) for query, pages in qrels.items() if any(grade > 0 for grade in pages.values())}
    if not judged:
        raise InputError("no query has a relevant page: is it the right qrels file?")
    ranked = {query: _ordered(query, run.get(query, ())) for query in judged}
    per_query: dict[str, dict[str, float]] = {query: {} for query in judged}
    for cutoff in cutoffs:
        # the library would order ties its own way: it is given ranks, and no more of them than the cutoff
        ranks = {
            query: {page: float(cutoff - rank) for rank, page in enumerate(pages[:cutoff])}
            for query, pages in ranked.items()
            if pages
        }
        found = pytrec_eval.RelevanceEvaluator(judged, {f"ndcg_cut.{cutoff}", "recip_rank", f"recall.{cutoff}"})
        values = found.evaluate(ranks) if ranks else {}
        names = {"ndcg": f"ndcg_cut_{cutoff}", "mrr": "recip_rank", "recall": f"recall_{cutoff}"}
        for query, scores in per_query.items():
            for short, name in names.items():
                scores[f"{short}@{cutoff}"] = values.get(query, {}).get(name, 0.0)
    names_in_order = list(next(iter(per_query.values())))
    mean = {name: sum(scores[name] for scores in per_query.values()) / len(per_query) for name in names_in_order}
    return RetrievalScores(
        mean,
        per_query,
        num_missing=sum(not pages for pages in ranked.values()),
        num_without_relevant=len(qrels) - len(judged),
        num_unjudged=len(set(run) - set(qrels)),
    )


def _ordered(query: str, hits: Sequence[Hit]) -> list[str]:
    pages = [hit.page_id for hit in sorted(hits, key=lambda hit: (-hit.score, hit.page_id))]
    if len(set(pages)) != len(pages):
        raise InputError(f"query {query}: the run ranks a page twice")
    return pages


def merge_runs(files: Sequence[Path], k: int) -> tuple[dict[str, list[Hit]], str]:
    """Return the k best pages of each query over runs of several stores, and the tag that all of them have.

    A page that several stores have counts once, with its best score.

    Raises:
        InputError: k < 1, or runs have different tags: other encoders made them, and their scores do not compare.
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
        raise InputError(f"the runs have different tags ({shown}): other encoders made them, scores do not compare")
    merged = {
        query: sorted((Hit(*pair) for pair in scores.items()), key=lambda hit: (-hit.score, hit.page_id))[:k]
        for query, scores in best.items()
    }
    return merged, next(iter(tags), "empty")


def write_run(file: Path, run: Run, tag: str) -> None:
    """Write a TREC run file: query Q0 page rank score tag."""
    lines = []
    for query, hits in run.items():
        if any(character.isspace() for character in query) or not query:
            raise InputError(f"query id {query!r} has white space, which a TREC run file cannot hold")
        lines += [f"{query} Q0 {hit.page_id} {rank} {hit.score:.6f} {tag}\n" for rank, hit in enumerate(hits, start=1)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines))


def read_run(file: Path) -> dict[str, list[Hit]]:
    """Read a TREC run file; its rank column is ignored, scores decide.

    Raises:
        InputError: a line is malformed.
    """
    run: dict[str, list[Hit]] = {}
    for number, line in _lines(file):
        fields = line.split()
        try:
            query, _, page, _, score, _ = fields
            if not math.isfinite(float(score)):
                raise ValueError("a score is a finite number")
            run.setdefault(query, []).append(Hit(page, float(score)))
        except ValueError as error:
            raise InputError(
                f"{file}:{number}: a run line is 'query Q0 page rank score tag', got {line.strip()!r}"
            ) from error
    return {query: sorted(hits, key=lambda hit: (-hit.score, hit.page_id)) for query, hits in run.items()}


def read_qrels(file: Path) -> dict[str, dict[str, int]]:
    """Read judgments, separated by tabs or spaces.

    Either BEIR's 'query page grade' (with or without a header) or TREC's 'query 0 page grade'.

    Raises:
        InputError: a line is malformed, or a pair is judged twice differently.
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
            raise InputError(f"{file}:{number}: query {query} and page {page} are judged twice, differently")
    return qrels


def read_queries(file: Path) -> list[Query]:
    """Read queries from jsonl: an id, a text and, optional, answers.

    Raises:
        InputError: a line is malformed, or an id stands twice.
    """
    queries = {}
    for number, line in _lines(file):
        try:
            row = json.loads(line)
            found = _query(row)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{file}:{number}: a query is a JSON object with _id and text: {error!r}") from error
        if found.id in queries:
            raise InputError(f"{file}:{number}: query id {found.id} stands twice")
        queries[found.id] = found
    return list(queries.values())


def _query(row: Mapping[str, Any]) -> Query:
    query_id, text = _first(row, QUERY_ID_KEYS), _first(row, QUERY_KEYS)
    answers: Any = next((row[key] for key in ANSWER_KEYS if key in row), [])
    if not isinstance(text, str):
        raise TypeError("the text is not a string")
    return Query(str(query_id), text, tuple(map(str, answers if isinstance(answers, list) else [answers])))


def _first(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    for key in keys:
        if row.get(key) is not None:
            return row[key]
    raise KeyError(keys[0])


def resolve_qrels(qrels: Qrels, pages: Sequence[Page]) -> dict[str, dict[str, int]]:
    """Return judgments by page id.

    A judged page may be named by its id, its document, document#number, or its document's name without extension.

    Raises:
        InputError: a relevant page is not in the store, or a name fits several pages.
    """
    names: dict[str, set[str]] = {}
    for page in pages:
        stem = page.document.rpartition(".")[0] or page.document
        for name in {page.page_id, page.document, f"{page.document}#{page.number}", stem}:
            names.setdefault(name, set()).add(page.page_id)
    resolved: dict[str, dict[str, int]] = {}
    for query, judged in qrels.items():
        resolved[query] = {}
        for name, grade in judged.items():
            found = names.get(name, set())
            if len(found) > 1:
                raise InputError(f"qrels: {name!r} fits {len(found)} pages; name one by document#number or page id")
            if grade > 0 and not found:
                raise InputError(f"qrels: page {name!r} of query {query} is not in the store; ingest its document")
            for page_id in found:
                resolved[query][page_id] = max(grade, resolved[query].get(page_id, grade))
    return resolved


def top_rows(
    queries: Sequence[Query], run: Run, qrels: Qrels, images: Mapping[str, str], k: int
) -> list[dict[str, Any]]:
    """Return the rows of a `topK_test.jsonl` as EVisRAG reads them.

    `is_sufficient` is true when every relevant page is among the k.
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
