"""Prediction files of lmms-eval (`*_samples_*.jsonl`) and VLMEvalKit (.tsv, .xlsx): read and written."""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from rollout.files import write_bytes, write_text
from rsgrpo.errors import InputError

SUFFIXES = (".tsv", ".xlsx")
_SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_BROKEN = (KeyError, ValueError, zipfile.BadZipFile, ElementTree.ParseError)
_UNWRITABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def from_lmms(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of lmms-eval as ours: the id of its document where it has one, else `doc_id`, and its response.

    `filtered_resps` counts before `resps`; of several responses the first does.
    """
    found = row.get("filtered_resps")
    text = found if found not in (None, [], "") else row.get("resps")
    while isinstance(text, list):
        text = text[0] if text else ""
    document = row.get("doc")
    document = document if isinstance(document, Mapping) else {}
    keys = ("id", "qid", "question_id", "questionId")
    own_id = next((document[key] for key in keys if document.get(key) is not None), row.get("doc_id"))
    return {"id": own_id, "raw": text}


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
        yield f"row {number} of {path}", {"id": row_id, "raw": row["prediction"]}


def _tsv(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(1 << 30)  # such tables hold images in base64
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [
            {name: value or "" for name, value in row.items() if name is not None}
            for row in csv.DictReader(file, dialect="excel-tab")
        ]


def _xlsx(path: Path) -> list[dict[str, str]]:
    """Read the first sheet: shared or inline texts and numbers, the first row being the header."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        shared: list[str] = []
        if "xl/sharedStrings.xml" in names:
            root = ElementTree.fromstring(archive.read("xl/sharedStrings.xml"))
            shared = ["".join(part.text or "" for part in entry.iter(f"{_SHEET}t")) for entry in root]
        sheet = min(name for name in names if re.fullmatch(r"xl/worksheets/sheet\d+\.xml", name))
        table = [
            {
                _column(cell.get("r", "")) or str(place): _cell(cell, shared)
                for place, cell in enumerate(row.iter(f"{_SHEET}c"))
            }
            for row in ElementTree.fromstring(archive.read(sheet)).iter(f"{_SHEET}row")
        ]
    header = table[0] if table else {}
    return [{name: row.get(column, "") for column, name in header.items()} for row in table[1:]]


def _column(reference: str) -> str:
    return reference.rstrip("0123456789")


def _cell(cell: ElementTree.Element, shared: Sequence[str]) -> str:
    if cell.get("t") == "inlineStr":
        return "".join(part.text or "" for part in cell.iter(f"{_SHEET}t"))
    text = cell.findtext(f"{_SHEET}v") or ""
    if cell.get("t") == "s":
        return shared[int(text)]
    return text.removesuffix(".0")


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
    sheet_rows = "".join(f"<row>{''.join(map(_written, cells))}</row>" for cells in [header, *table])
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types"><Default Extension="rels" ContentType='
        '"application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/xl/workbook.xml" '
        f'ContentType="{kind}.sheet.main+xml"/><Override PartName="/xl/worksheets/sheet1.xml" '
        f'ContentType="{kind}.worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{office}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets><sheet name="Sheet1" sheetId="1" '
        'r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{office}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{sheet_rows}</sheetData></worksheet>',
    }
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, f'<?xml version="1.0" encoding="UTF-8"?>{part}')
    write_bytes(path, content.getvalue())


def _written(text: str) -> str:
    shown = escape(_UNWRITABLE.sub("\ufffd", text))
    return f'<c t="inlineStr"><is><t xml:space="preserve">{shown}</t></is></c>'
