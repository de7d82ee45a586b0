"""Answer many questions into one jsonl file, which grows with every answer and from which the same command resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.answers.batch import read_lines
from recipes.answers.predictions import FAILED
from recipes.answers.reader import Reader
from recipes.retrieval.answers.generation import AskedQuestion, Setting, answer_each
from recipes.retrieval.pages.store import writing
from rsgrpo.errors import RsgrpoError


def answer_file(
    questions: Sequence[AskedQuestion], setting: Setting, reader: Reader, out: Path, limits: Sequence[Any] = ()
) -> tuple[list[dict[str, Any]], int]:
    """Answer every question that `out` does not answer yet, adding a line for each as it is finished.

    A line is reused if the same model was asked the same question in the same way over the same pages; lines of failed
    questions are asked again. Lines of other questions are kept in the file until the caller replaces it.

    Args:
        limits: further settings that decide an answer, such as the longest response.

    Returns:
        The result lines in the order of the questions, with the ids of the pages as `pages`, and how many were reused.

    Raises:
        InputError: `out` was not written by this program.
        RsgrpoError: the answerer gave up; what was finished is in `out`.
    """
    keys = {asked.id: _key(asked, setting, reader, limits) for asked in questions}
    rows = {
        name: line
        for name, line in read_lines(out).items()
        if line.get("asked") == keys.get(name) and line["model"] == reader.answerer.name
        if line["finish_reason"] != FAILED
    }
    num_reused = len(rows)
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("ab") as file:
            remaining = [asked for asked in questions if asked.id not in rows]
            try:
                for answered in answer_each(remaining, setting, reader) if remaining else ():
                    name = answered.asked.id
                    row = answered.line | {
                        "asked": keys[name],
                        "pages": [page.page_id for page in answered.asked.pages],
                    }
                    if answered.weights:
                        row["weights"] = list(answered.weights)
                    rows[name] = row
                    file.write(line_of(row))
                    file.flush()
            except RsgrpoError as error:
                kept = f"{len(rows)} of {len(questions)} answers are kept in {out}; run the same command to resume"
                raise RsgrpoError(f"{error}\n{kept}") from error
    return [rows[asked.id] for asked in questions], num_reused


def line_of(row: dict[str, Any]) -> bytes:
    """Return a row as one line of the file; paths need not be valid text."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _key(asked: AskedQuestion, setting: Setting, reader: Reader, limits: Sequence[Any]) -> str:
    """Return a digest of everything that decides what a model is asked; a page's id follows from its content."""
    template = reader.text_template if setting == "text" and reader.text_template else reader.template
    pages = [page.page_id for page in asked.pages]
    parts: list[Any] = [asked.question, setting, template, reader.system, pages, [str(limit) for limit in limits]]
    if setting == "weighted":
        parts.append([page.score for page in asked.pages])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
