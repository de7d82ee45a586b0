"""Speed of visual retrieval: `python -m benchmarks.retrieval vectors --pages 10000 100000 1000000 --dim 64`.

`vectors` times every kind of search on synthetic unit vectors (clusters of 100 around random centres) against one plain
numpy scan of float32 in memory, with recall@10 against that scan; each in a process of its own, whose memory counts.
Seconds of `vectors` are the process's CPU seconds: set OMP_NUM_THREADS=1, and other work on the machine matters little.
`words` times the search by words on pages of 200 random words.
`ingest DOCS` times rendering by one worker and by more, whose stores must be equal byte for byte.
`encode STORE` times a model by batch size against a plain loop that loads and encodes a page at a time with the same
model; the vectors of every batch size are checked equal to those of the loop.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.retrieval.encoders.base import EncoderIdentity, EncoderSettings
from recipes.retrieval.encoders.choice import load_encoder
from recipes.retrieval.pages.ingest import ingest
from recipes.retrieval.pages.settings import RenderSettings
from recipes.retrieval.pages.store import Page, PageStore
from recipes.retrieval.search.exact import Hit
from recipes.retrieval.search.index import VectorIndex
from recipes.retrieval.search.update import encode_here
from recipes.retrieval.search.words import WordIndex
from rsgrpo.records.console import Console

if TYPE_CHECKING:  # processes that only search load no model
    from recipes.retrieval.encoders.sentence import SentenceEncoder

K = 10
CLUSTER = 100
NOISE = 0.6
SHARD = 20_000
SEARCHES = ("exact", "flat", "ivf")
WORDS_PER_PAGE = 200
TOLERANCE = 1e-5  # of a number of a vector of length 1, in float32


SYNTHETIC = EncoderIdentity(description={"name": "synthetic"})


def blocks(num_pages: int, dim: int, seed: int) -> Iterator[np.ndarray]:
    """Yield (SHARD, dim) blocks of unit vectors in clusters."""
    rng = np.random.default_rng(seed)
    for start in range(0, num_pages, SHARD):
        count = min(SHARD, num_pages - start)
        centres = rng.standard_normal((count // CLUSTER + 1, dim), dtype=np.float32)
        rows = np.repeat(centres, CLUSTER, axis=0)[:count]
        rows = rows + NOISE * rng.standard_normal(rows.shape, dtype=np.float32)
        yield rows / np.linalg.norm(rows, axis=1, keepdims=True)


def timed(work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> tuple[float, Any]:
    """Return seconds and result."""
    started = clock()
    result = work()
    return clock() - started, result


def peak_mb() -> float:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write(folder: Path, num_pages: int, dim: int, num_queries: int) -> float:
    """Write an index of `num_pages` vectors and queries near some of them; return the seconds spent in the index."""
    index = VectorIndex.create(folder / "index", SYNTHETIC)
    seconds = 0.0
    for number, block in enumerate(blocks(num_pages, dim, 0)):
        ids = [f"{number * SHARD + offset:09d}" for offset in range(len(block))]
        seconds += timed(lambda ids=ids, block=block: index.add(ids, list(block)))[0]  # type: ignore[misc]
        if number == 0:
            rng = np.random.default_rng(1)
            noisy = block[:num_queries] + 0.02 * rng.standard_normal((num_queries, dim), dtype=np.float32)
            np.save(folder / "queries.npy", noisy / np.linalg.norm(noisy, axis=1, keepdims=True))
    return seconds


def make(folder: Path, kind: str) -> tuple[float, float]:
    """Build a FAISS file; return seconds and the memory that it took."""
    before = peak_mb()
    seconds, _ = timed(lambda: VectorIndex.open(folder / "index").build_faiss(kind))  # type: ignore[arg-type]
    return seconds, peak_mb() - before


def search(folder: Path, kind: str) -> tuple[float, float, float, list[list[str]]]:
    """Search in a fresh process; return seconds to open, seconds of all queries, memory, and the ids found."""
    queries_QD, before = np.load(folder / "queries.npy"), peak_mb()
    index = VectorIndex.open(folder / "index")

    def prepared() -> Callable[[np.ndarray], list[list[str]]]:
        if kind == "numpy":
            table_ND = np.concatenate([np.asarray(shard.vectors_VD, np.float32) for shard in index.shards])
            return lambda queries: [[f"{row:09d}" for row in best(table_ND @ query_D)] for query_D in queries]
        found_by = index.searcher(kind)  # type: ignore[arg-type]
        return lambda queries: ids_of(found_by(list(queries), K))

    def opened() -> Callable[[np.ndarray], list[list[str]]]:
        find = prepared()
        find(queries_QD[:1])  # libraries start their threads, indexes read where pages are
        return find

    opening, find = timed(opened)
    seconds, found = timed(lambda: find(queries_QD))
    return opening, seconds, peak_mb() - before, found


def best(scores_N: np.ndarray) -> np.ndarray:
    """Return the rows of the K best scores, in order."""
    rows_K = np.argpartition(-scores_N, K)[:K]
    return rows_K[np.argsort(-scores_N[rows_K])]


def ids_of(found: list[list[Hit]]) -> list[list[str]]:
    """Return the ids alone."""
    return [[hit.page_id for hit in hits] for hits in found]


def vectors(num_pages: int, dim: int, num_queries: int, searches: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Time searches over `num_pages` vectors, the numpy scan first."""
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as fresh,
    ):
        folder = Path(scratch)
        seconds = fresh.submit(write, folder, num_pages, dim, num_queries).result()
        size = sum(file.stat().st_size for file in (folder / "index").rglob("*"))
        yield {"pages": num_pages, "dim": dim, "write_pages_per_s": round(num_pages / seconds), "disk_mb": size >> 20}
        wanted: list[set[str]] = []
        for kind in ["numpy", *searches]:
            row: dict[str, Any] = {"pages": num_pages, "search": kind}
            if kind in ("flat", "ivf"):
                seconds, memory = fresh.submit(make, folder, kind).result()
                row |= {"build_s": round(seconds, 1), "build_mb": round(memory)}
            opening, seconds, memory, found = fresh.submit(search, folder, kind).result()
            wanted = wanted or [set(ids) for ids in found]  # those of the numpy scan
            recall = np.mean([len(set(ids) & want) / K for ids, want in zip(found, wanted, strict=True)])
            row |= {"open_s": round(opening, 2), "queries_per_s": round(num_queries / seconds, 1)}
            yield row | {"memory_mb": round(memory), "recall": round(float(recall), 4)}


class SyntheticPages(PageStore):
    """A store of pages of random words, as frequent as in English, that exist in memory only."""

    def __init__(self, num_pages: int) -> None:
        super().__init__(Path())
        self._ids = [f"{number:016x}-00001" for number in range(num_pages)]

    def page_ids(self, *, with_text: bool = False) -> list[str]:
        return self._ids

    def pages(self) -> Iterator[Page]:
        rng = np.random.default_rng(0)
        for page_id in self._ids:
            yield Page(page_id, "d", 1, "", 1, 1, random_words(rng, WORDS_PER_PAGE))


def random_words(rng: np.random.Generator, count: int) -> str:
    """Return words from a vocabulary of 50,000 by Zipf's law."""
    return " ".join(f"w{number % 50_000}" for number in rng.zipf(1.3, count))


def words(num_pages: int, num_queries: int) -> dict[str, Any]:
    """Time the search by words: filling its index, questions of 8 words, and finding out that nothing has changed."""
    with tempfile.TemporaryDirectory() as folder:
        index, store, rng = WordIndex(Path(folder)), SyntheticPages(num_pages), np.random.default_rng(1)
        filling, _ = timed(lambda: index.update(store))
        queries = [random_words(rng, 8) for _ in range(num_queries)]
        searching, _ = timed(lambda: index.search(queries, K))
        checking, _ = timed(lambda: index.update(store))
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    row: dict[str, Any] = {"pages": num_pages, "fill_s": round(filling, 1), "disk_mb": size >> 20}
    return row | {"query_ms": round(1000 * searching / num_queries), "check_s": round(checking, 2)}


def render(documents: Path, workers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Time ingests from nothing, by the clock and in CPU seconds of all processes.

    Raises:
        RuntimeError: stores of different numbers of workers differ.
    """
    first: tuple[float, dict[str, bytes]] | None = None
    for num_workers in workers:
        with tempfile.TemporaryDirectory() as scratch, Console() as console:
            store, before = Path(scratch, "store"), cpu_seconds()
            seconds, report = timed(
                lambda store=store, count=num_workers: ingest(  # type: ignore[misc]
                    [documents], store, RenderSettings(), num_workers=count, page_timeout_s=120, console=console
                ),
                time.perf_counter,
            )
            used = cpu_seconds() - before
            digests = {str(file.relative_to(store)): digest(file) for file in sorted(store.glob("pages/*/*/*"))}
        first = first or (seconds, digests)
        if digests != first[1]:
            raise RuntimeError(f"{num_workers} workers make another store than {workers[0]}")
        rates = {"pages_per_s": report.num_pages / seconds, "pages_per_cpu_s": report.num_pages / used}
        row = {"workers": num_workers, "pages": report.num_pages} | {n: round(rate, 1) for n, rate in rates.items()}
        yield row | {"ratio": round(first[0] / seconds, 2), "equal_files": len(digests)}


def digest(file: Path) -> bytes:
    """Return the digest of a file."""
    return hashlib.sha256(file.read_bytes()).digest()


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of those that it has ended."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def encode(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time a plain loop, then an encoder with loading and resizing as `index` does them.

    Raises:
        RuntimeError: a batch size gives other vectors.
    """
    pages = [page for page, _ in zip(PageStore.open(options.store).pages(), range(options.pages), strict=False)]
    settings = EncoderSettings(options.model, options.kind, options.encode_with, max_pixels=options.max_pixels)
    wanted_ND, loop_rate = None, 0.0
    if options.encode_with == "transformers" and options.kind in ("image", "text"):
        from recipes.retrieval.encoders.sentence import SentenceEncoder

        encoder = SentenceEncoder(settings)
        row, wanted_ND = rated(partial(one_by_one, encoder), pages)
        loop_rate = row["pages_per_cpu_s"]
        yield {"batch_size": "plain loop"} | row
    for batch_size in options.batch_sizes:
        batched = load_encoder(replace(settings, batch_size=batch_size))
        row, found_ND = rated(lambda p, e=batched, b=batch_size: vectors_of(encode_here(e, p, 8 * b)), pages)  # type: ignore[misc]
        if wanted_ND is not None:
            row |= {
                "ratio": round(row["pages_per_cpu_s"] / loop_rate, 2),
                "difference": float(np.abs(found_ND - wanted_ND).max()),
            }
            if row["difference"] > TOLERANCE:
                raise RuntimeError(f"batch size {batch_size} moves a vector by {row['difference']}, over {TOLERANCE}")
        yield {"batch_size": batch_size} | row


def rated(work: Callable[[list[Page]], np.ndarray], pages: list[Page]) -> tuple[dict[str, Any], np.ndarray]:
    """Return how fast pages are encoded, by the clock and by CPU seconds, and their vectors."""
    work(pages[:2])  # libraries start their threads
    before = time.process_time()
    seconds, vectors_ND = timed(lambda: work(pages), time.perf_counter)
    rates = {"pages_per_s": len(pages) / seconds, "pages_per_cpu_s": len(pages) / (time.process_time() - before)}
    return {"pages": len(pages)} | {name: round(rate, 2) for name, rate in rates.items()}, vectors_ND


def one_by_one(encoder: SentenceEncoder, pages: list[Page]) -> np.ndarray:
    """Return the vectors of a loop that knows neither batches nor threads."""
    import torch

    rows = []
    for page in pages:
        with torch.inference_mode():
            features = encoder.model.preprocess([encoder.identity.loader(page)])
            rows.append(encoder.model(features)["sentence_embedding"][0].numpy())
    return np.stack([row / np.linalg.norm(row) for row in rows])


def vectors_of(encoded: Iterator[tuple[str, np.ndarray]]) -> np.ndarray:
    """Return the vectors alone."""
    return np.stack([vector for _, vector in encoded])


def main() -> None:
    """Print one JSON line per measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.retrieval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True)
    searching = commands.add_parser("vectors")
    searching.add_argument("--pages", type=int, nargs="+", default=[10_000, 100_000])
    searching.add_argument("--dim", type=int, default=2_048)
    searching.add_argument("--queries", type=int, default=64)
    searching.add_argument("--searches", nargs="*", choices=SEARCHES, default=SEARCHES)
    wording = commands.add_parser("words")
    wording.add_argument("--pages", type=int, nargs="+", default=[10_000, 100_000])
    wording.add_argument("--queries", type=int, default=30)
    rendering = commands.add_parser("ingest")
    rendering.add_argument("documents", type=Path)
    rendering.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    encoding = commands.add_parser("encode")
    encoding.add_argument("store", type=Path)
    encoding.add_argument("--model", required=True)
    encoding.add_argument("--kind", default="image")
    encoding.add_argument("--encode-with", default="transformers")
    encoding.add_argument("--max-pixels", type=int, default=1_280 * 28 * 28)
    encoding.add_argument("--pages", type=int, default=64)
    encoding.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args()
    if options.what == "vectors":
        for num_pages in options.pages:
            for row in vectors(num_pages, options.dim, min(options.queries, num_pages), options.searches):
                print(json.dumps(row), flush=True)
    elif options.what == "words":
        for num_pages in options.pages:
            print(json.dumps(words(num_pages, options.queries)), flush=True)
    elif options.what == "ingest":
        for row in render(options.documents, options.workers):
            print(json.dumps(row), flush=True)
    else:
        for row in encode(options):
            print(json.dumps(row), flush=True)
