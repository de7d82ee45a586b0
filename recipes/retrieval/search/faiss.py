"""Candidates from FAISS beyond what a scan can read: fp16 in memory, exact or by inverted lists. The home of faiss.

FAISS only proposes; `search.rerank` then scores its candidates from the index itself.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recipes.retrieval.pages.store import replace_file, writing
from recipes.retrieval.search.exact import Hit, rerank
from recipes.retrieval.search.index import VectorIndex, id_array, save_array
from rsgrpo.errors import InputError

Kind = Literal["flat", "ivf"]
MARGIN = 16  # candidates beyond 2k, so that rounding in FAISS does not cut a page that belongs
POINTS_PER_LIST = 39  # FAISS asks for so many training vectors a list
ADD_VECTORS = 65_536


class FaissError(InputError):
    """There is no FAISS file for this index as it is now, or none can be made."""


def build(index: VectorIndex, kind: Kind) -> Path:
    """Write INDEX/faiss-KIND.bin from all pages that are not deleted; nobody else may write to the index meanwhile.

    A process that dies on the way leaves the files that were there, or none that `FaissSearch` would take.

    Raises:
        FaissError: the index has several vectors a page, or is empty.
        StoreError: another process writes to the index, or the disk is full.
    """
    if index.multi_vector:
        raise FaissError("FAISS proposes pages by one vector each; search this index exactly, or --rerank by it")
    with index.locked():
        if not len(index):
            raise FaissError(f"{index.folder} is empty; index some pages first")
        return _build(index, kind)


def _build(index: VectorIndex, kind: Kind) -> Path:
    import faiss

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
        _write(built, temporary)
        file.with_suffix(".json").unlink(missing_ok=True)  # from here on nothing is valid until it is there again
        os.replace(temporary, file)
        save_array(file.with_suffix(".ids.npy"), np.concatenate(ids))
        replace_file(file.with_suffix(".json"), json.dumps({"state": index.state}).encode())
    return file


def _write(built: Any, file: Path) -> None:
    """Write a FAISS index to the disk; FAISS's own writer says nothing of a full disk but its own words."""
    import faiss

    with open(file, "wb") as stream:
        faiss.write_index(built, faiss.PyCallbackIOWriter(stream.write))  # type: ignore[attr-defined]
        stream.flush()
        os.fsync(stream.fileno())


def build_if_older(index: VectorIndex, kind: Kind) -> None:
    """Build the FAISS file anew unless it is of the index as it is now.

    Raises:
        FaissError: as `build`.
    """
    if _state(index.folder / f"faiss-{kind}.bin") != index.state:
        build(index, kind)


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
        state = _state(file)
        if not state:
            raise FaissError(f"{index.folder} has no FAISS file of kind {kind}; {remedy}")
        if state != index.state:
            raise FaissError(f"{file} is older than the index; {remedy}")
        self._index = index
        try:
            self._ids = np.load(file.with_suffix(".ids.npy"), mmap_mode="r")
            with open(file, "rb") as stream:  # FAISS itself opens no path that is not UTF-8
                self._faiss = faiss.read_index(faiss.PyCallbackIOReader(stream.read))  # type: ignore[attr-defined]
        except (OSError, ValueError, EOFError, RuntimeError) as error:
            raise FaissError(f"{file} is damaged ({' '.join(str(error).split())}); {remedy}") from error
        if self._faiss.ntotal != len(self._ids):
            raise FaissError(f"{file} has {self._faiss.ntotal} vectors for {len(self._ids)} pages; {remedy}")
        if kind == "ivf":
            faiss.ParameterSpace().set_index_parameter(self._faiss, "nprobe", num_probes)

    def search(self, queries: Sequence[np.ndarray], k: int) -> list[list[Hit]]:
        """Return the k best of FAISS's candidates, scored by the index."""
        _, rows_QC = self._faiss.search(np.stack(queries).astype(np.float32), min(len(self._ids), 2 * k + MARGIN))
        candidates = [[self._ids[row].decode() for row in rows_C if row >= 0] for rows_C in rows_QC]
        return rerank(self._index, queries, candidates, k)


def _state(file: Path) -> str:
    """Return the state of the index that a FAISS file was built from; "" where there is none."""
    try:
        return json.loads(file.with_suffix(".json").read_text())["state"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _sample(index: VectorIndex, num_vectors: int) -> np.ndarray:
    """Return about so many vectors, evenly from all shards: the same ones every time."""
    stride = max(1, len(index) // num_vectors)
    parts = []
    for shard in index.shards():
        rows = np.flatnonzero(shard.alive_P)[::stride]
        parts.append(np.asarray(shard.vectors_VD[rows], dtype=np.float32))
    return np.concatenate(parts)
