"""Let a teacher write questions that a page answers: `python -m recipes.synthesize queries --in STORE --out FILE`.

The rows train a retriever (`query`, `image`), and are questions with answers and relevant pages for its evaluation.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.answers.batch import rewrite
from recipes.answers.questions import IMAGE_MARK
from recipes.answers.types import Answerer
from recipes.files.layouts import portable_image
from recipes.retrieval.pages.documents import IMAGES
from recipes.synthesize.retries import KEPT, Line, RetryConfig, ask_and_report, fault_of
from rewards.text import normalise
from rollout.files import write_text
from rollout.keys import at_least
from rollout.types import Prompt
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console

NO_LIST = "no JSON list of objects with question and answer"
NOTHING_USABLE = "no usable pair in the list"
SURPLUS = "more than asked for"
EMPTY = "question or answer is empty"
LONG = "question or answer is too long"
REPEATED = "repeated on its page"
POINTS_AT_PAGE = "speaks of the page instead of its content"
SEVERAL_PAGES = "asked of several pages"

REQUEST = """Write questions that somebody could ask who searches a large collection and whom this page answers.

- At most {max_pairs} of them, about different things that the page says or shows; none where it holds nothing.
- Each must be clear without seeing the page: name what it is about, and never write "this page" or "the figure above".
- Each has one answer, short and exact, that is written on the page: a name, a number, a phrase.

Reply with nothing but a JSON list: [{{"question": "...", "answer": "..."}}, ...]"""

_POINTING = re.compile(
    r"\b(?:(?:this|the (?:above|given|shown|following)) (?:page|image|picture|figure|chart|table|slide|document)"
    r"|the (?:page|image|picture|slide)|(?:figure|chart|table) above)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class QueryConfig:
    """max_pairs: per page. max_question, max_answer: characters. request: what the teacher is asked; {max_pairs}."""

    max_pairs: int = 6
    max_question: int = 300
    max_answer: int = 200
    request: str = REQUEST

    def __post_init__(self) -> None:
        limits = {"--max-pairs": self.max_pairs, "--max-question": self.max_question, "--max-answer": self.max_answer}
        at_least(1, **limits)
        try:
            self.request.format(max_pairs=self.max_pairs)
        except (KeyError, IndexError, ValueError) as error:
            raise InputError(
                f"--prompt: {error!r}; the only placeholder is {{max_pairs}}; double all other braces"
            ) from error


@dataclass(frozen=True, slots=True)
class SourcePage:
    """One page to ask about. document, number: where it is from; for a folder of images the file and 1."""

    id: str
    image: str
    document: str
    number: int = 1


@dataclass(frozen=True, slots=True)
class QueryPair:
    """One question with its answer."""

    question: str
    answer: str


def read_pages(source: Path) -> list[SourcePage]:
    """Return the pages of a store, or the images of a folder, recursively, in order.

    Raises:
        InputError: there are none.
    """
    if (source / "pages.parquet").exists():
        from recipes.retrieval.pages.store import PageStore

        pages = [SourcePage(p.page_id, p.image, p.document, p.number) for p in PageStore.open(source).pages()]
    else:
        files = sorted(file for file in source.rglob("*") if file.suffix.lower() in IMAGES and file.is_file())
        names = [file.relative_to(source).as_posix() for file in files]
        pages = [SourcePage(name, str(file), name) for name, file in zip(names, files, strict=True)]
    if not pages:
        raise InputError(f"--in {source}: neither a page store nor a folder with images")
    return pages


def read_pairs(text: str, config: QueryConfig) -> tuple[list[QueryPair] | None, Counter[str]]:
    """Return the usable pairs of a response and why others are not; None where the response is not a list of pairs.

    >>> read_pairs('[{"question": "Who won?", "answer": "Ada"}]', QueryConfig())
    ([QueryPair(question='Who won?', answer='Ada')], Counter())
    """
    rows = _json_list(text)
    if rows is None:
        return None, Counter()
    pairs: list[QueryPair] = []
    faults: Counter[str] = Counter()
    asked: set[str] = set()
    for row in rows:
        pair = QueryPair(_plain(row["question"]), _plain(row["answer"]))
        key = _key(pair.question)
        if not key or not pair.answer:
            faults[EMPTY] += 1
        elif len(pair.question) > config.max_question or len(pair.answer) > config.max_answer:
            faults[LONG] += 1
        elif _POINTING.search(pair.question):
            faults[POINTS_AT_PAGE] += 1
        elif key in asked:
            faults[REPEATED] += 1
        elif len(pairs) == config.max_pairs:
            faults[SURPLUS] += 1
        else:
            asked.add(key)
            pairs.append(pair)
    return pairs, faults


def judge(line: Line, config: QueryConfig) -> str:
    """Return KEPT, or why a response is asked for again; an empty list is an answer, of a page that holds nothing."""
    if fault := fault_of(line):
        return fault
    pairs, faults = read_pairs(line["raw"], config)
    if pairs is None:
        return NO_LIST
    return NOTHING_USABLE if not pairs and faults else KEPT


def synthesize_queries(
    pages: Sequence[SourcePage],
    answerer: Answerer,
    config: QueryConfig,
    retries: RetryConfig,
    out: Path,
    console: Console,
) -> dict[str, Any]:
    """Ask about each page; write the rows to `out` and judgments to OUT.qrels.tsv.

    The other files, errors and the report are those of `ask_and_report`.
    """
    request = f"{IMAGE_MARK}\n{config.request.format(max_pairs=config.max_pairs)}"
    prompts = [Prompt(page.id, request, (page.image,)) for page in pages]

    def write(kept: Mapping[str, Line], tried: dict[str, Any]) -> dict[str, Any]:
        rows, dropped = _rows(pages, kept, config, out)
        rewrite(out, rows)
        judged = "".join(f"{row['id']}\t{row['page_id']}\t1\n" for row in rows)
        write_text(out.with_suffix(".qrels.tsv"), f"query-id\tcorpus-id\tscore\n{judged}")
        cost = tried["cost"]
        return {
            "pages": len(pages),
            "pairs": len(rows),
            "pages_with_pairs": len({row["page_id"] for row in rows}),
            "dropped_pairs": dict(dropped.most_common()),
            **{name: value for name, value in tried.items() if name != "cost_per_kept"},
            "cost_per_pair": round(cost / len(rows), 6) if cost is not None and rows else None,
        }

    return ask_and_report(prompts, lambda _, line: judge(line, config), retries, answerer, out, console, write)


def _rows(
    pages: Sequence[SourcePage], kept: Mapping[str, Line], config: QueryConfig, out: Path
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return the rows in the order of the pages, and why pairs were dropped."""
    dropped: Counter[str] = Counter()
    found: list[tuple[SourcePage, list[QueryPair]]] = []
    for page in pages:
        if page.id in kept:
            pairs, faults = read_pairs(kept[page.id]["raw"], config)
            dropped += faults
            found.append((page, pairs or []))
    asked = Counter(_key(pair.question) for _, pairs in found for pair in pairs)
    rows = []
    for page, pairs in found:
        for number, pair in enumerate(pairs, start=1):
            if asked[_key(pair.question)] > 1:  # no page is the one that answers it
                dropped[SEVERAL_PAGES] += 1
                continue
            rows.append(
                {
                    "id": f"{page.id}-q{number}",
                    "query": pair.question,
                    "answer": [pair.answer],
                    "image": portable_image(page.image, out),
                    "page_id": page.id,
                    "document": page.document,
                    "number": page.number,
                }
            )
    return rows, dropped


def _json_list(text: str) -> list[dict[str, Any]] | None:
    """Return the list of objects with question and answer in a text, whatever surrounds it."""
    start, end = text.find("["), text.rfind("]")
    try:
        rows = json.loads(text[start : end + 1]) if 0 <= start < end else None
    except (ValueError, RecursionError):  # a response may be brackets alone
        return None
    if not isinstance(rows, list):
        return None
    shaped = all(
        isinstance(row, dict) and _is_text(row.get("question")) and _is_text(row.get("answer")) for row in rows
    )
    return rows if shaped else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _plain(value: Any) -> str:
    return " ".join(str(value).replace(IMAGE_MARK, " ").split())


def _key(question: str) -> str:
    """Return what two questions are compared by."""
    return normalise(question) or question.casefold()
