"""First-stage late interaction at scale: `python -m benchmarks.retrieval.late --pages 100000`.

Times the exact MaxSim scan of an index on disk, and FAISS over pooled vectors whose candidates are scored by all of
their vectors, with recall@10 of the second against the first. Each runs in a process of its own, whose memory counts;
seconds are its CPU seconds, with OMP_NUM_THREADS=1.

Pages are synthetic: each has 8 passages, whose vectors lie around one of 20,000 centres. A query is made of 12 vectors
of one page, with noise, so that one page is right and pages that share its passages come next.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.retrieval.scale import SYNTHETIC, ids_of, peak_mb, timed
from recipes.retrieval.search.index import Backend, VectorIndex

CENTRES = 20_000
PASSAGES = 8
SHARD = 2_000
QUERY_VECTORS = 12
K = 10


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors of length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def write(folder: Path, num_pages: int, num_vectors: int, dim: int, num_queries: int) -> None:
    """Write an index, and queries from pages of all its parts with the numbers of these pages."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CENTRES, dim), dtype=np.float32)
    index = VectorIndex.create(folder / "index", replace(SYNTHETIC, multi_vector=True))
    queries, right = [], []
    for start in range(0, num_pages, SHARD):
        count = min(SHARD, num_pages - start)
        passages = np.repeat(rng.integers(0, CENTRES, (count, PASSAGES)), num_vectors // PASSAGES, axis=1)
        pages = unit(centres[passages] + rng.standard_normal((*passages.shape, dim), dtype=np.float32))
        index.add([f"{start + row:09d}" for row in range(count)], list(pages))
        for _ in range(max(1, num_queries * count // num_pages)):
            row = int(rng.integers(count))
            chosen = pages[row][rng.integers(0, pages.shape[1], QUERY_VECTORS)]
            queries.append(unit(chosen + 0.15 * rng.standard_normal(chosen.shape, dtype=np.float32)))
            right.append(f"{start + row:09d}")
    np.save(folder / "queries.npy", np.stack(queries[:num_queries]))
    (folder / "right.json").write_text(json.dumps(right[:num_queries]))


def build(folder: Path) -> tuple[float, float]:
    """Build the FAISS file; return CPU seconds and its size in MB."""
    seconds, file = timed(lambda: VectorIndex.open(folder / "index").build_faiss("flat"))
    return seconds, os.path.getsize(file) / 2**20


def search(folder: Path, backend: Backend, candidates: int) -> tuple[float, float, list[list[str]]]:
    """Search in a fresh process; return CPU seconds of all queries, memory in MB, and the ids found."""
    queries, before = list(np.load(folder / "queries.npy")), peak_mb()
    find = VectorIndex.open(folder / "index").searcher(backend, candidates=candidates)
    if backend != "exact":
        find(queries[:1], K)  # places of the pages are read
    seconds, found = timed(lambda: find(queries, K))
    return seconds, peak_mb() - before, ids_of(found)


def rows(
    num_pages: int, num_vectors: int, dim: int, num_queries: int, candidates: list[int]
) -> Iterator[dict[str, Any]]:
    """Time both searches."""
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as fresh,
    ):
        folder = Path(scratch)
        fresh.submit(write, folder, num_pages, num_vectors, dim, num_queries).result()
        right = json.loads((folder / "right.json").read_text())
        size = sum(file.stat().st_size for file in (folder / "index").rglob("*")) >> 20
        yield {"pages": num_pages, "vectors": num_vectors, "dim": dim, "disk_mb": size}
        exact_s, memory, exact = fresh.submit(search, folder, "exact", 0).result()

        def row(found: list[list[str]], seconds: float) -> dict[str, Any]:
            shared = [len(set(one) & set(other)) / K for one, other in zip(found, exact, strict=True)]
            first = [one[:1] == [other] for one, other in zip(found, right, strict=True)]
            return {
                "query_s": round(seconds / num_queries, 3),
                "ratio": round(exact_s / seconds, 1),
                "recall@10": round(float(np.mean(shared)), 3),
                "right_first": round(float(np.mean(first)), 3),
            }

        yield {"search": "exact", "memory_mb": round(memory)} | row(exact, exact_s)
        build_s, built_mb = fresh.submit(build, folder).result()
        yield {"build_s": round(build_s, 1), "faiss_mb": round(built_mb)}
        for count in candidates:
            seconds, memory, found = fresh.submit(search, folder, "flat", count).result()
            yield {"search": "flat", "candidates": count, "memory_mb": round(memory)} | row(found, seconds)


def main() -> None:
    """Print one JSON line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=100_000)
    parser.add_argument("--vectors", type=int, default=64, help="per page")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--candidates", type=int, nargs="+", default=[50, 100, 400])
    options = parser.parse_args()
    for row in rows(options.pages, options.vectors, options.dim, options.queries, options.candidates):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
