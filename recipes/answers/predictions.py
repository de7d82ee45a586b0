"""Prediction files: one model output per question id, as this project or others write them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recipes.answers.harness_files import SUFFIXES, from_lmms, is_lmms, table_rows
from rsgrpo.errors import InputError

ID_KEYS = ("id", "qid", "query_id", "question_id", "uid")
TEXT_KEYS = ("raw", "pred", "prediction", "predict", "response", "output", "generated_text", "completion", "answer")
KINDS_OF_TOKENS = ("prompt", "response", "observation", "image")
FAILED = "error"  # as finish_reason: the question could not be asked


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model wrote for one question.

    finish_reason: "stop", "length", or "" where the file does not say.
    error: why there is no output; "" where there is one.
    steps: what an environment did between the turns, as `recipes.infer` writes it; None where there was none.
    num_tokens: "prompt", "response", "observation", "image" -> tokens, as far as the file says.
    """

    id: str
    text: str
    finish_reason: str = ""
    error: str = ""
    steps: tuple[Mapping[str, Any], ...] | None = None
    num_tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Predictions:
    """A prediction file. Of several lines with one id the last counts; num_repeated says how many did not."""

    by_id: Mapping[str, Prediction]
    num_repeated: int = 0


def load_predictions(path: str | Path) -> Predictions:
    """Read a prediction file: .jsonl, .json with rows or a map from id to output, lmms-eval's samples, or a table.

    A table is VLMEvalKit's .tsv or .xlsx (`recipes.answers.harness_files`).

    A row names its question as `id`, `qid` or the like (ID_KEYS), and the model's whole output as `raw`, `pred`,
    `response` or the like (TEXT_KEYS, the first that is there).

    Raises:
        InputError: the file or a row cannot be read; file and line are named.
    """
    path = Path(path)
    by_id: dict[str, Prediction] = {}
    num_rows = 0
    for place, row in table_rows(path) if path.suffix in SUFFIXES else _rows(path):
        prediction = _prediction(place, from_lmms(row) if is_lmms(row) else row)
        by_id[prediction.id] = prediction
        num_rows += 1
    if not by_id:
        raise InputError(f"predictions={path} has no rows")
    return Predictions(by_id, num_rows - len(by_id))


def placed(predictions: Predictions, ids: Sequence[str]) -> Predictions:
    """Return the predictions under the benchmark's ids where the file only counts the questions, from 0 or from 1.

    ids: of the benchmark's questions, in order. lmms-eval's `doc_id` and VLMEvalKit's `index` are such counts.
    """
    found = predictions.by_id
    if any(row_id in found for row_id in ids) or not all(re.fullmatch(r"\d+", row_id) for row_id in found):
        return predictions
    numbers = {int(row_id): prediction for row_id, prediction in found.items()}
    first = 0 if 0 in numbers else 1
    if len(numbers) != len(found) or max(numbers) - first >= len(ids):
        return predictions
    moved = {ids[number - first]: replace(one, id=ids[number - first]) for number, one in numbers.items()}
    return Predictions(moved, predictions.num_repeated)


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"predictions={path} cannot be read: {error}") from error
    if path.suffix == ".json":
        content = _parse(text, str(path))
        if isinstance(content, dict):
            content = [
                {"id": key} | (value if isinstance(value, dict) else {"raw": value}) for key, value in content.items()
            ]
        if not isinstance(content, list):
            raise InputError(f"{path} must hold a list of rows or a map from id to output")
        yield from ((f"row {number} of {path}", row) for number, row in enumerate(content, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"line {number} of {path}"
            yield place, _parse(line, place)


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not valid JSON: {error}") from error


def _prediction(place: str, row: Any) -> Prediction:
    if not isinstance(row, dict):
        raise InputError(f"{place} must be a JSON object, got {type(row).__name__}")
    row_id = next((row[key] for key in ID_KEYS if row.get(key) is not None), None)
    if row_id is None:
        raise InputError(f"{place} names no question: it needs one of {', '.join(ID_KEYS)}; it has {', '.join(row)}")
    if row.get("finish_reason") == FAILED:
        errors = row.get("errors") or ["unknown error"]
        return Prediction(_writable(row_id), "", FAILED, "; ".join(map(str, errors)))
    key = next((key for key in TEXT_KEYS if _is_output(row.get(key), key)), None)
    if key is None:
        raise InputError(f"{place} has no output: it needs one of {', '.join(TEXT_KEYS)}; it has {', '.join(row)}")
    text = row[key][0] if isinstance(row[key], list) else row[key]
    steps = row.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) and "at_char" in step for step in steps):
        steps = None  # of another program
    found = None if steps is None else tuple(steps)
    counts = {kind: row.get(f"num_{kind}_tokens") for kind in KINDS_OF_TOKENS}
    num_tokens = {kind: count for kind, count in counts.items() if type(count) is int}
    reason = str(row.get("finish_reason") or "")
    return Prediction(_writable(row_id), _writable(text), reason, steps=found, num_tokens=num_tokens)


def _writable(value: Any) -> str:
    """Return a text; half a character in it, which no file can hold, becomes a question mark."""
    return str(value).encode(errors="replace").decode()


def _is_output(value: Any, key: str) -> bool:
    """Whether a column holds an output: a text or number, or a list of one; a list of `answer` is the gold."""
    if isinstance(value, list):
        return key != "answer" and len(value) == 1 and isinstance(value[0], str)
    return isinstance(value, str | int | float)
