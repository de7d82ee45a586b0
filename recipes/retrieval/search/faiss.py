"""Candidates from FAISS, for more pages than a scan can read: fp16 in memory, all of them or by inverted lists.

FAISS only proposes rows, numbered through the living pages of the shards in order; the index then scores their pages
exactly. Of pages of several vectors, pooled ones are proposed by (`pooled.py`). This is the home of faiss.

    INDEX/faiss-KIND.bin    FAISS's own file
    INDEX/faiss-KIND.json   the state of the index that it was built from; removed first and written last
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from recipes.retrieval.search.pooled import GROUPS, ROWS_PER_PAGE, best_pages, pooled
from recipes.retrieval.search.shards import Shard
from rollout.files import replaced, sync, write_text
from rsgrpo.errors import InputError

FaissKind = Literal["flat", "ivf"]
KINDS: tuple[FaissKind, ...] = ("flat", "ivf")
POINTS_PER_LIST = 39  # training vectors per list that FAISS asks for
ADD_VECTORS = 65_536
POOL_PAGES = 256  # of several vectors, at a time

Propose = Callable[[Sequence[np.ndarray], int], list[np.ndarray]]
"""Takes queries and a count; returns the rows of up to that many pages per query."""


class FaissError(InputError):
    """There is no FAISS file for this index as it is now, or none can be built."""


def write_faiss(
    file: Path, kind: FaissKind, shards: Sequence[Shard], state: str, *, multi_vector: bool = False
) -> None:
    """Write a FAISS file of all living pages.

    A process that dies leaves the old file, or one that `open_faiss` refuses.

    Args:
        state: of the index, written beside the file.
    """
    import faiss

    rows_of = [np.flatnonzero(shard.alive_P) for shard in shards]
    num_pages, dim = sum(map(len, rows_of)), shards[0].vectors_VD.shape[1]
    num_rows = num_pages * (GROUPS if multi_vector else 1)
    num_lists = max(1, min(int(4 * math.sqrt(num_rows)), num_rows // POINTS_PER_LIST))
    stride = max(1, num_rows // (2 * POINTS_PER_LIST * num_lists))
    # the training sample is even and always the same
    sample = [_rows(shard, rows[::stride], multi_vector) for shard, rows in zip(shards, rows_of, strict=True)]
    layout = "SQfp16" if kind == "flat" else f"IVF{num_lists},SQfp16"
    built = faiss.index_factory(dim, layout, faiss.METRIC_INNER_PRODUCT)
    step = POOL_PAGES if multi_vector else ADD_VECTORS
    built.train(np.concatenate(sample))
    for shard, rows in zip(shards, rows_of, strict=True):
        for start in range(0, len(rows), step):
            built.add(_rows(shard, rows[start : start + step], multi_vector))
    with replaced(file) as unfinished:
        with open(unfinished, "wb") as stream:  # FAISS's own writer does not name a full disk
            faiss.write_index(built, faiss.PyCallbackIOWriter(stream.write))  # type: ignore[attr-defined]
        sync(unfinished)
        file.with_suffix(".json").unlink(missing_ok=True)
    write_text(file.with_suffix(".json"), json.dumps({"state": state}))


def _rows(shard: Shard, rows: np.ndarray, multi_vector: bool) -> np.ndarray:
    """Return float32 vectors of some pages: one each, or GROUPS each."""
    if not multi_vector:
        return np.asarray(shard.vectors_VD[rows], dtype=np.float32)
    parts = [np.zeros((0, shard.vectors_VD.shape[1]), np.float32)]
    for start in range(0, len(rows), POOL_PAGES):
        pages = [shard.vectors(row) for row in rows[start : start + POOL_PAGES]]
        parts.append(pooled(np.concatenate(pages), np.cumsum([0, *map(len, pages[:-1])])))
    return np.concatenate(parts)


def state_of(file: Path) -> str:
    """Return the state of the index that a FAISS file was built from; "" if there is none."""
    try:
        return str(json.loads(file.with_suffix(".json").read_text())["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def open_faiss(file: Path, state: str, num_pages: int, num_probes: int, *, multi_vector: bool = False) -> Propose:
    """Load a FAISS file.

    Args:
        state, num_pages: of the index as it is now. num_probes: lists that are read per query (ivf).

    Raises:
        FaissError: there is no file, it is damaged, or the index has changed since it was built.
    """
    import faiss

    kind = file.stem.partition("-")[2]
    remedy = f"run: python -m recipes.retrieve index STORE --faiss {kind} (with the same --index and --model)"
    built_from = state_of(file)
    if not built_from:
        raise FaissError(f"{file.parent} has no FAISS file of kind {kind}; {remedy}")
    if built_from != state:
        raise FaissError(f"{file} is older than the index; {remedy}")
    try:
        with open(file, "rb") as stream:  # FAISS itself opens no path that is not UTF-8
            loaded = faiss.read_index(faiss.PyCallbackIOReader(stream.read))  # type: ignore[attr-defined]
    except (OSError, RuntimeError) as error:
        raise FaissError(f"{file} is damaged ({' '.join(str(error).split())}); {remedy}") from error
    if loaded.ntotal != num_pages * (GROUPS if multi_vector else 1):
        raise FaissError(f"{file} has {loaded.ntotal} vectors for {num_pages} pages; {remedy}")
    if kind == "ivf":
        faiss.ParameterSpace().set_index_parameter(loaded, "nprobe", num_probes)

    def propose(queries: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
        if multi_vector:
            num_rows = min(loaded.ntotal, ROWS_PER_PAGE * count)
            found = (loaded.search(query_TD.astype(np.float32), num_rows) for query_TD in queries)
            return [best_pages(similarities_TN, rows_TN, count) for similarities_TN, rows_TN in found]
        _, rows_QC = loaded.search(np.stack(queries).astype(np.float32), min(loaded.ntotal, count))
        return [rows_C[rows_C >= 0] for rows_C in rows_QC]

    return propose
