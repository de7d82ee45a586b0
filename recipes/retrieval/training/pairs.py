"""Training pairs of a retriever: queries with the page that answers each, from files or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rollout.files import read_jsonl
from rollout.inputs.images import MAX_ASPECT_RATIO, PromptError, read_size
from rsgrpo.data.hub_folder import published_folder
from rsgrpo.data.rows import ImageFolder
from rsgrpo.errors import InputError, listed


@dataclass(frozen=True, slots=True)
class Pair:
    """One query and the page that answers it. negatives: pages that do not. Pages are paths or compressed bytes."""

    query: str
    page: str | bytes
    negatives: tuple[str | bytes, ...] = ()


def read_pairs(source: str) -> list[Pair]:
    """Read pairs from a jsonl or parquet file, a folder of parquet files, or a data set of the hub.

    Columns: query; image (a path from the file's folder, or {bytes, path}); optionally negatives, a list of such.

    Raises:
        InputError: the source is missing or empty, or rows are unusable; it lists them.
    """
    path = Path(source)
    if not path.exists():
        path = published_folder(source, local="pairs", setting="pairs=pairs")
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    pairs, faults = [], []
    for file in files:
        for number, row in _rows(file):
            try:
                pairs.append(_pair(row, ImageFolder(file.parent)))
            except (ValueError, PromptError) as error:
                faults.append(f"{file.name}:{number}: {error}")
    if faults:
        raise InputError(f"{source}: {len(faults)} rows cannot be used:\n{listed(faults)}")
    if len({len(pair.negatives) for pair in pairs}) > 1:
        raise InputError(f"{source}: all rows must have the same number of negatives")
    if not pairs:
        raise InputError(f"{source} has no pairs; add rows with the columns query and image")
    return pairs


def _pair(row: dict[str, Any], folder: ImageFolder) -> Pair:
    query, image, negatives = row.get("query", row.get("text")), row.get("image"), row.get("negatives") or ()
    if image is None or not isinstance(query, str) or not isinstance(negatives, list | tuple):
        raise ValueError(f"a row needs query (text), image and, optionally, a list negatives; it has {', '.join(row)}")
    if not query.strip():
        raise ValueError("the query is empty")
    return Pair(query, _page(image, folder), tuple(_page(page, folder) for page in negatives))


def _page(value: Any, folder: ImageFolder) -> str | bytes:
    source = folder.resolve(value)
    assert isinstance(source, str | bytes), "there is no pack of images"
    height, width = read_size(source)
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise PromptError(f"an image of {width} x {height} pixels is too narrow for any model; crop or pad it")
    return source


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield rows with their numbers from 1: the row of a parquet file, the line of a jsonl file."""
    if file.suffix != ".parquet":
        yield from read_jsonl(file)
        return
    try:
        with pq.ParquetFile(file) as table:
            batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=64))
            yield from enumerate(chain.from_iterable(batches), start=1)
    except (OSError, ValueError) as error:  # pyarrow's errors are one or the other
        raise InputError(f"{file} cannot be read: {error}; pairs must be jsonl or parquet") from error
