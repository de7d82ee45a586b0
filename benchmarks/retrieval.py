"""Speed of visual retrieval: `python -m benchmarks.retrieval vectors --pages 10000 100000 --dim 2048`.

`vectors` times every kind of search on synthetic unit vectors (clusters of 100 around random centres) against one plain
numpy scan in the same run, with recall@10 against that scan. `ingest DOCS` times rendering, and `encode` a model.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from recipes.retrieval.documents import RenderSettings
from recipes.retrieval.encoders import EncoderSettings, load_encoder
from recipes.retrieval.faiss_search import FaissSearch, build
from recipes.retrieval.index import VectorIndex
from recipes.retrieval.ingest import ingest
from recipes.retrieval.search import Hit, exact
from recipes.retrieval.store import PageStore
from rsgrpo.console import Console

K = 10
CLUSTER = 100
NOISE = 0.6
SHARD = 20_000


class Synthetic:
    """Stands for an encoder in a manifest."""

    fingerprint, multi_vector = "synthetic", False
    description = {"name": "synthetic"}  # noqa: RUF012

    def encode_pages(self, pages: Any) -> list[np.ndarray]:
        """Never called."""
        raise NotImplementedError

    def encode_queries(self, queries: Any) -> list[np.ndarray]:
        """Never called."""
        raise NotImplementedError


def blocks(num_pages: int, dim: int, seed: int) -> Iterator[np.ndarray]:
    """Yield (SHARD, dim) blocks of unit vectors in clusters."""
    rng = np.random.default_rng(seed)
    for start in range(0, num_pages, SHARD):
        count = min(SHARD, num_pages - start)
        centres = rng.standard_normal((count // CLUSTER + 1, dim), dtype=np.float32)
        rows = np.repeat(centres, CLUSTER, axis=0)[:count]
        rows = rows + NOISE * rng.standard_normal(rows.shape, dtype=np.float32)
        yield rows / np.linalg.norm(rows, axis=1, keepdims=True)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def vectors(num_pages: int, dim: int, num_queries: int) -> dict[str, Any]:
    """Time every kind of search on so many vectors."""
    with tempfile.TemporaryDirectory() as scratch:
        index = VectorIndex.create(Path(scratch) / "index", Synthetic())
        row: dict[str, Any] = {"pages": num_pages, "dim": dim, "queries": num_queries}
        queries: list[np.ndarray] = []
        seconds = 0.0
        for number, block in enumerate(blocks(num_pages, dim, 0)):
            ids = [f"{number * SHARD + offset:09d}" for offset in range(len(block))]
            seconds += timed(lambda ids=ids, block=block: index.add(ids, list(block)))[0]  # type: ignore[misc]
            if not queries:
                rng = np.random.default_rng(1)
                noisy = block[:num_queries] + 0.02 * rng.standard_normal((num_queries, dim), dtype=np.float32)
                queries = list(noisy / np.linalg.norm(noisy, axis=1, keepdims=True))
        row["write_pages_per_s"] = round(num_pages / seconds)
        table = np.concatenate([np.asarray(shard.vectors_VD, dtype=np.float32) for shard in index.shards()])

        def scan() -> np.ndarray:
            return np.argsort(-(table @ np.stack(queries).T), axis=0)[:K].T

        seconds, found = timed(scan)
        wanted = [{f"{position:09d}" for position in places} for places in found]
        row["numpy_queries_per_s"] = round(num_queries / seconds, 1)
        searches: dict[str, Callable[[], list[list[Hit]]]] = {"exact": lambda: exact(index, queries, K)}
        for kind in ("flat", "ivf"):
            seconds, _ = timed(lambda kind=kind: build(index, kind))  # type: ignore[misc]
            row[f"{kind}_build_s"] = round(seconds, 1)
            loaded = FaissSearch(index, kind)
            loaded.search(queries[:1], K)  # reads the index's page ids once
            searches[kind] = lambda loaded=loaded: loaded.search(queries, K)  # type: ignore[misc]
        for name, search in searches.items():
            seconds, hits = timed(search)
            row[f"{name}_queries_per_s"] = round(num_queries / seconds, 1)
            same = [len({hit.page_id for hit in got} & want) / K for got, want in zip(hits, wanted, strict=True)]
            row[f"{name}_recall"] = round(float(np.mean(same)), 4)
        row["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        return row


def main() -> None:
    """Print one JSON line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    search = commands.add_parser("vectors")
    search.add_argument("--pages", type=int, nargs="+", default=[10_000, 100_000])
    search.add_argument("--dim", type=int, default=2_048)
    search.add_argument("--queries", type=int, default=64)
    rendering = commands.add_parser("ingest")
    rendering.add_argument("documents", type=Path)
    rendering.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    encoding = commands.add_parser("encode")
    encoding.add_argument("store", type=Path)
    encoding.add_argument("--model", required=True)
    encoding.add_argument("--kind", default="image")
    encoding.add_argument("--pages", type=int, default=64)
    encoding.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    if options.what == "vectors":
        for num_pages in options.pages:
            print(json.dumps(vectors(num_pages, options.dim, min(options.queries, num_pages))), flush=True)
    elif options.what == "ingest":
        for workers in options.workers:
            with tempfile.TemporaryDirectory() as scratch, Console() as console:
                seconds, report = timed(
                    lambda out=Path(scratch, "store"), workers=workers, console=console: ingest(  # type: ignore[misc]
                        [options.documents], out, RenderSettings(), num_workers=workers, page_timeout_s=120,
                        console=console,
                    )
                )  # fmt: skip
            row = {"workers": workers, "pages": report.num_pages, "pages_per_s": round(report.num_pages / seconds, 1)}
            print(json.dumps(row), flush=True)
    else:
        pages = [page for page, _ in zip(PageStore.open(options.store).pages(), range(options.pages), strict=False)]
        for batch_size in options.batch_sizes:
            encoder = load_encoder(EncoderSettings(options.model, options.kind, batch_size=batch_size))
            encoder.encode_pages(pages[:1])
            seconds, _ = timed(lambda encoder=encoder: encoder.encode_pages(pages))  # type: ignore[misc]
            print(json.dumps({"batch_size": batch_size, "pages_per_s": round(len(pages) / seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
