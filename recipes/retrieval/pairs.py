"""Training pairs of a retriever: queries with the page that answers each, from files or the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rollout.images import PromptError, read_size
from rsgrpo.errors import InputError
from rsgrpo.hub_data import published_folder

MAX_LISTED = 10


@dataclass(frozen=True, slots=True)
class Pair:
    """One query and the page that answers it; negatives are pages that do not. Pages are paths or compressed bytes."""

    query: str
    page: str | bytes
    negatives: tuple[str | bytes, ...] = ()


def read_pairs(source: str) -> list[Pair]:
    """Read pairs from a jsonl or parquet file, a folder of parquet files, or a data set of the hub.

    Columns: query; image (a path from the file's folder, or {bytes, path}); and, optional, negatives (several such).

    Raises:
        InputError: the source is missing or empty, or rows are unusable; it lists them.
    """
    path = Path(source)
    if not path.exists():
        path = published_folder(source, local="pairs", setting="pairs=pairs")
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    pairs, faults = [], []
    for file in files:
        for number, row in enumerate(_rows(file), start=1):
            try:
                pairs.append(_pair(row, file.parent))
            except (PromptError, ValueError, KeyError, TypeError) as error:
                faults.append(f"  {file.name}:{number}: {error}")
    if faults:
        more = [f"  ... and {len(faults) - MAX_LISTED} more"] if len(faults) > MAX_LISTED else []
        raise InputError("\n".join([f"{source}: {len(faults)} rows cannot be used:", *faults[:MAX_LISTED], *more]))
    if len({len(pair.negatives) for pair in pairs}) > 1:
        raise InputError(f"{source}: all rows must have the same number of negatives")
    if not pairs:
        raise InputError(f"{source} has no pairs; it needs the columns query and image")
    return pairs


def _pair(row: dict[str, Any], folder: Path) -> Pair:
    query = row["query"] if "query" in row else row["text"]
    if not isinstance(query, str) or not query.strip():
        raise ValueError("the query is empty")
    return Pair(query, _page(row["image"], folder), tuple(_page(page, folder) for page in row.get("negatives") or ()))


def _page(value: Any, folder: Path) -> str | bytes:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        value = str(folder / value)
    if not isinstance(value, str | bytes):
        raise ValueError(f"an image is a path or {{bytes, path}}, got {type(value).__name__}")
    read_size(value)
    return value


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=64):
                yield from batch.to_pylist()
        return
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.strip():
                row = json.loads(line)
                yield row if isinstance(row, dict) else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}; pairs are jsonl or parquet") from error
