"""VisRAG's test sets (corpus, queries, qrels as parquet; hub or folder) as plain files: images, jsonl, tsv."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from recipes.retrieval.pages.documents import IMAGES
from rollout.files import write_text
from rsgrpo.data.hub_folder import published_folder
from rsgrpo.errors import InputError


def write_visrag_set(source: str, out: Path) -> tuple[int, int, int]:
    """Write OUT/documents/*, OUT/queries.jsonl and OUT/qrels.tsv; return the numbers of pages, queries, judgments.

    Raises:
        InputError: a part is missing, or a row lacks a column.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = published_folder(source, local="benchmark", setting="SOURCE to benchmark")
    documents = out / "documents"
    documents.mkdir(parents=True, exist_ok=True)
    names: dict[str, str] = {}
    for row in _rows(folder, "corpus"):
        page = str(_value(row, "corpus", ("corpus-id", "_id", "id")))
        content = _value(row, "corpus", ("image",))
        image = content.get("bytes") if isinstance(content, dict) else content
        if not isinstance(image, bytes):
            raise InputError(f"{folder}: image of corpus-id {page} has no bytes")
        if page in names and (documents / names[page]).read_bytes() != image:
            raise InputError(f"{folder}: corpus-id {page} occurs twice with different images")
        names[page] = _file_name(page)
        (documents / names[page]).write_bytes(image)
    queries = [_query(row) for row in _rows(folder, "queries")]
    write_text(out / "queries.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in queries))
    lines = ["query-id\tcorpus-id\tscore\n"]
    for row in _rows(folder, "qrels"):
        page = str(_value(row, "qrels", ("corpus-id",)))
        if page not in names:
            raise InputError(f"{folder}: qrels name the page {page}, which the corpus lacks")
        grade = _value(row, "qrels", ("score",))
        if not (isinstance(grade, int) or (isinstance(grade, float) and grade.is_integer())):
            raise InputError(f"{folder}: a score in qrels must be a whole number, got {grade!r}")
        lines.append(f"{_value(row, 'qrels', ('query-id',))}\t{names[page]}\t{int(grade)}\n")
    write_text(out / "qrels.tsv", "".join(lines))
    return len(names), len(queries), len(lines) - 1


def _file_name(page: str) -> str:
    """Return the name of a page's file: readable like the id, and not hidden, because an ingest skips hidden files."""
    name = quote(page, safe=" ()+,=@")
    name = f"%2E{name[1:]}" if name.startswith(".") else name
    return name if Path(name).suffix.lower() in IMAGES else f"{name}.png"


def _query(row: dict[str, Any]) -> dict[str, Any]:
    answer, text = row.get("answer", []), _value(row, "queries", ("query", "text"))
    if not isinstance(text, str):
        raise InputError(f"queries: the text of a query must be a string, got {text!r}")
    return {
        "_id": str(_value(row, "queries", ("query-id", "_id", "id"))),
        "text": text,
        "answers": answer if isinstance(answer, list) else [str(answer)],
    }


def _rows(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    patterns = (f"{part}/*.parquet", f"{part}*.parquet", f"*/{part}*.parquet")
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    if not files:
        raise InputError(f"{folder} has no {part}/*.parquet; it must have corpus, queries and qrels")
    for file in files:
        try:
            with pq.ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=64):
                    yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file} cannot be read: {error}; download it again") from error


def _value(row: dict[str, Any], part: str, keys: tuple[str, ...]) -> Any:
    for key in keys:
        if row.get(key) is not None:
            return row[key]
    raise InputError(f"{part}: a row has no {' or '.join(keys)}; it has {', '.join(row)}")
