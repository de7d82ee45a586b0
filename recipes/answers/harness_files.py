"""Files of lmms-eval (`*_samples_*.jsonl`) and VLMEvalKit (.tsv, .xlsx): predictions, and questions with their pages.

VLMEvalKit's tables are those of its ImageBaseDataset: index, question, answer, and pages as base64 (`image`: one, a
list of them, or the index of the row that has them) or as paths (`image_path`); choices are the columns A, B, C, ...
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import string
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout.files import replaced, write_text
from rsgrpo.errors import InputError

SUFFIXES = (".tsv", ".xlsx")
FAILED_REQUEST = "Failed to obtain answer via API"
"""How VLMEvalKit's table begins a prediction that it could not get."""
MAX_INDEX_CHARS = 64  # a shorter image is the index of the row that has it
XLSX_CELL_CHARS = 32_767
"""Characters of a cell; what writes such files cuts longer texts."""
_BROKEN = (KeyError, ValueError, IndexError, zipfile.BadZipFile, SyntaxError)  # of archive, sheet and XML


def from_lmms(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of lmms-eval as ours: the id of its document where it has one, else `doc_id`, and its response.

    `filtered_resps` counts before `resps`, unless it only lacks their reasoning (lmms-eval cuts `<think>` out, and with
    it what the evidence is scored by); of several responses the first does.
    """
    filtered, whole = _first(row.get("filtered_resps")), _first(row.get("resps"))
    text = whole if filtered in (None, "") or filtered == _without_reasoning(whole) else filtered
    document = row.get("doc")
    document = document if isinstance(document, Mapping) else {}
    keys = ("id", "qid", "question_id", "questionId")
    own_id = next((document[key] for key in keys if document.get(key) is not None), row.get("doc_id"))
    return {"id": own_id, "raw": text}


def _first(value: Any) -> Any:
    while isinstance(value, list):
        value = value[0] if value else ""
    return value


def _without_reasoning(text: Any) -> str:
    return re.sub(r"<think>.*?</think>", "", str(text or ""), flags=re.DOTALL).strip()


def is_lmms(row: Any) -> bool:
    """Whether a line is one of lmms-eval's samples."""
    return isinstance(row, dict) and "doc_id" in row and ("resps" in row or "filtered_resps" in row)


def table_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of a VLMEvalKit table with the columns index and prediction; an `id` counts before the index.

    Raises:
        InputError: the file cannot be read, or lacks a column.
    """
    try:
        rows = _tsv(path) if path.suffix == ".tsv" else _xlsx(path)
    except (OSError, csv.Error, *_BROKEN) as error:
        raise InputError(f"predictions={path} cannot be read: {type(error).__name__}: {error}") from error
    for number, row in enumerate(rows, start=1):
        row_id = row.get("id") or row.get("index")
        if row_id is None or "prediction" not in row:
            raise InputError(f"row {number} of {path} needs index and prediction; it has {', '.join(row)}")
        failed = {"finish_reason": "error"} if row["prediction"].startswith(FAILED_REQUEST) else {}
        yield f"row {number} of {path}", {"id": row_id, "raw": row["prediction"]} | failed


def question_rows(path: Path) -> list[dict[str, Any]]:
    """Return the questions of a VLMEvalKit table (.tsv) in our columns, other columns as they are.

    A question with choices is asked as VLMEvalKit asks it, with its hint; the letter, the text and both are accepted.

    Raises:
        InputError: the file cannot be read, or a row lacks a column.
    """
    try:
        table = _tsv(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    by_index = {row.get("index", ""): row.get("image", "") for row in table}
    found = []
    for number, row in enumerate(table, start=1):
        if not row.get("index") or not row.get("question"):
            raise InputError(f"row {number} of {path} needs index and question; it has {', '.join(row)}")
        image = row.get("image", "")
        image = by_index.get(image, "") if len(image) <= MAX_INDEX_CHARS else image
        encoded = [f"data:image/jpeg;base64,{page}" for page in _texts(image)]
        pages = encoded or _texts(row.get("image_path", ""))
        own = {name: value for name, value in row.items() if value and name not in ("index", "image_path")}
        question, answers = _asked(row)
        row_id = row.get("id") or row["index"]
        found.append(own | {"id": row_id, "image": pages, "question": question, "answer": answers})
    return found


def _asked(row: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return the text that is asked, and the accepted answers."""
    question, answers = row["question"], _texts(row.get("answer", ""))
    choices = {name: row[name] for name in string.ascii_uppercase if row.get(name)}
    if not choices:
        return question, answers
    hint = [f"Hint: {row['hint']}"] if row.get("hint") else []
    options = [f"{name}. {text}" for name, text in choices.items()]
    last = "Please select the correct answer from the options above."
    texts = [text for one in answers if (choice := choices.get(one)) for text in (choice, f"{one}. {choice}")]
    return "\n".join([*hint, f"Question: {question}", "Options:", *options, last]), [*answers, *texts]


def _texts(cell: str) -> list[str]:
    """Return the texts of a cell: of a list as Python writes it, or the one that it is."""
    try:
        value = ast.literal_eval(cell) if cell[:1] == "[" and cell[-1:] == "]" else cell
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = cell
    return [str(one) for one in value] if isinstance(value, list) else [cell] * bool(cell)


def _tsv(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(1 << 30)  # such tables hold images in base64
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [
            {name: value or "" for name, value in row.items() if name is not None}
            for row in csv.DictReader(file, dialect="excel-tab")
        ]


def _xlsx(path: Path) -> list[dict[str, str]]:
    """Read the first sheet as text; the first row is the header."""
    from openpyxl import load_workbook

    sheet = load_workbook(path, read_only=True, data_only=True).worksheets[0]
    header, *rows = [[_text(value) for value in row] for row in sheet.iter_rows(values_only=True)]
    return [dict(zip(header, row, strict=False)) for row in rows]


def _text(value: Any) -> str:
    """Return a cell's value as text; a whole number as one, however it is stored."""
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def write_lmms(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of id, question, answers and raw as lmms-eval's samples; `doc_id` counts from 0."""
    lines = [
        {
            "doc_id": number,
            "doc": {"id": row["id"], "question": row["question"]},
            "target": row["answers"][0] if row["answers"] else "",
            "resps": [[row["raw"]]],
            "filtered_resps": [row["raw"]],
        }
        for number, row in enumerate(rows)
    ]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the same rows as VLMEvalKit's table (.tsv or .xlsx): index, id, question, answer, prediction."""
    header = ["index", "id", "question", "answer", "prediction"]
    table = [
        [str(number), str(row["id"]), row["question"], row["answers"][0] if row["answers"] else "", row["raw"]]
        for number, row in enumerate(rows)
    ]
    if path.suffix == ".tsv":
        text = io.StringIO(newline="")
        csv.writer(text, dialect="excel-tab", lineterminator="\n").writerows([header, *table])
        write_text(path, text.getvalue())
        return
    _write_xlsx(path, [header, *table])


def _write_xlsx(path: Path, table: Sequence[Sequence[str]]) -> None:
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE, WriteOnlyCell

    for row in table:
        if (longest := max(map(len, row))) > XLSX_CELL_CHARS:
            raise InputError(
                f"a text of {row[1]} has {longest:,} characters, but a cell of {path} may have {XLSX_CELL_CHARS:,}. "
                "Write a .tsv."
            )
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    for row in table:
        cells = [WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("\ufffd", text)) for text in row]
        for cell in cells:
            cell.data_type = "s"  # not a formula, even if the text begins with =
        sheet.append(cells)
    with replaced(path) as unfinished:
        book.save(unfinished)
