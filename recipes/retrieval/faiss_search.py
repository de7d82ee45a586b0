"""Candidates from FAISS beyond what a scan can read: fp16 in memory, exact or by inverted lists. The home of faiss.

FAISS only proposes; `search.rerank` then scores its candidates from the index itself.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from recipes.retrieval.index import VectorIndex, id_array, save_array
from recipes.retrieval.search import Hit, rerank
from recipes.retrieval.store import replace_file, writing
from rsgrpo.errors import InputError

Kind = Literal["flat", "ivf"]
MARGIN = 16  # candidates beyond 2k, so that rounding in FAISS does not cut a page that belongs
POINTS_PER_LIST = 39  # FAISS asks for so many training vectors a list
ADD_VECTORS = 65_536


class FaissError(InputError):
    """There is no FAISS file for this index as it is now, or none can be made."""


def build(index: VectorIndex, kind: Kind) -> Path:
    """Write INDEX/faiss-KIND.bin from all pages that are not deleted.

    Raises:
        FaissError: the index has several vectors a page, or is empty.
    """
    import faiss

    if index.multi_vector:
        raise FaissError("FAISS proposes pages by one vector each; search this index exactly, or --rerank by it")
    if not len(index):
        raise FaissError(f"{index.folder} is empty; index some pages first")
    num_lists = max(1, min(int(4 * math.sqrt(len(index))), len(index) // POINTS_PER_LIST))
    layout = "SQfp16" if kind == "flat" else f"IVF{num_lists},SQfp16"
    built = faiss.index_factory(index.dim, layout, faiss.METRIC_INNER_PRODUCT)
    built.train(_sample(index, 2 * POINTS_PER_LIST * num_lists))
    ids = []
    for shard in index.shards():
        rows = np.flatnonzero(shard.alive_P)
        ids.append(id_array(shard.page_ids[row] for row in rows))
        for start in range(0, len(rows), ADD_VECTORS):
            built.add(np.asarray(shard.vectors_VD[rows[start : start + ADD_VECTORS]], dtype=np.float32))
    file = index.folder / f"faiss-{kind}.bin"
    with writing(index.folder):
        temporary = file.with_name(f".{file.name}.writing")
        faiss.write_index(built, os.fspath(temporary))
        os.replace(temporary, file)
        save_array(file.with_suffix(".ids.npy"), np.concatenate(ids))
        replace_file(file.with_suffix(".json"), json.dumps({"state": index.state}).encode())
    return file


class FaissSearch:
    """A loaded FAISS file."""

    def __init__(self, index: VectorIndex, kind: Kind, *, num_probes: int = 32) -> None:
        """Load it; `num_probes` lists are read per query (ivf).

        Raises:
            FaissError: there is none, or the index has changed since.
        """
        import faiss

        file = index.folder / f"faiss-{kind}.bin"
        remedy = f"run: python -m recipes.retrieve index STORE --faiss {kind} (with the same --index and --model)"
        if not (file.with_suffix(".json").exists() and file.with_suffix(".ids.npy").exists()):
            raise FaissError(f"{index.folder} has no FAISS file of kind {kind}; {remedy}")
        written = json.loads(file.with_suffix(".json").read_text())
        if written["state"] != index.state:
            raise FaissError(f"{file} is older than the index; {remedy}")
        self._index, self._ids = index, np.load(file.with_suffix(".ids.npy"), mmap_mode="r")
        self._faiss = faiss.read_index(os.fspath(file))
        if kind == "ivf":
            faiss.ParameterSpace().set_index_parameter(self._faiss, "nprobe", num_probes)

    def search(self, queries: Sequence[np.ndarray], k: int) -> list[list[Hit]]:
        """Return the k best of FAISS's candidates, scored by the index."""
        _, rows_QC = self._faiss.search(np.stack(queries).astype(np.float32), min(len(self._ids), 2 * k + MARGIN))
        candidates = [[self._ids[row].decode() for row in rows_C if row >= 0] for rows_C in rows_QC]
        return rerank(self._index, queries, candidates, k)


def _sample(index: VectorIndex, num_vectors: int) -> np.ndarray:
    """Return about so many vectors, evenly from all shards: the same ones every time."""
    stride = max(1, len(index) // num_vectors)
    parts = []
    for shard in index.shards():
        rows = np.flatnonzero(shard.alive_P)[::stride]
        parts.append(np.asarray(shard.vectors_VD[rows], dtype=np.float32))
    return np.concatenate(parts)
