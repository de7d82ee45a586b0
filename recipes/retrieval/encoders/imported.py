"""An encoder that looks vectors up in the files of another program, such as `visrag_ret.py` beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recipes.retrieval.encoders.base import EncoderError, EncoderIdentity, EncoderSettings, unit_rows
from recipes.retrieval.pages.store import Page


class ImportedEncoder:
    """Vectors that another program made, looked up by page id and by query.

    The folder holds `encoder.json` (anything that names the model: it is the fingerprint), `pages.npy` (N, D) with
    `page_ids.txt` (one id per line), and `queries.npy` (M, D) with `queries.jsonl` (one JSON string per line).
    """

    def __init__(self, settings: EncoderSettings) -> None:
        folder = self.folder = Path(settings.model)
        try:
            description = {"imported": json.loads((folder / "encoder.json").read_text())}
            self._pages = self._table("pages.npy", (folder / "page_ids.txt").read_text().splitlines())
            lines = (folder / "queries.jsonl").read_text().split("\n") if (folder / "queries.jsonl").exists() else []
            queries = [json.loads(line) for line in lines if line.strip()]
            self._queries = self._table("queries.npy", queries) if queries else ({}, np.zeros((0, 0)))
        except (OSError, ValueError) as error:
            files = "encoder.json, pages.npy, page_ids.txt, queries.npy and queries.jsonl"
            raise EncoderError(f"imported vectors in {folder} cannot be read: {error}; it needs {files}") from error
        self.identity = EncoderIdentity(description=description, settings=settings)

    def _table(self, name: str, keys: list[str]) -> tuple[dict[str, int], np.ndarray]:
        vectors_ND = np.load(self.folder / name, mmap_mode="r")
        if vectors_ND.ndim != 2 or len(vectors_ND) != len(keys):
            raise ValueError(f"{name} has shape {vectors_ND.shape}, but there are {len(keys)} keys")
        return {key: row for row, key in enumerate(keys)}, vectors_ND

    def encode_pages(self, pages: Sequence[Page]) -> list[np.ndarray]:
        """Return (D,) per page."""
        return self._find(self._pages, [page.page_id for page in pages], "page")

    def encode_queries(self, queries: Sequence[str]) -> list[np.ndarray]:
        """Return (D,) per query."""
        return self._find(self._queries, queries, "query")

    def _find(self, table: tuple[dict[str, int], np.ndarray], keys: Sequence[str], what: str) -> list[np.ndarray]:
        rows, vectors_ND = table
        missing = [key for key in keys if key not in rows]
        if missing:
            raise EncoderError(
                f"{self.folder} has no vector for {len(missing)} of {len(keys)} {what} keys, such as {missing[0]!r}; "
                "encode them with the other program and add them to its files"
            )
        return unit_rows(vectors_ND[[rows[key] for key in keys]], keys)
