"""FAISS beside the exact search: recall, files of another state, builds killed while they train and write."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.material import ROOT

pytest.importorskip("faiss", reason="needs the retrieval extra")

from recipes.retrieval.pages.store import StoreError
from recipes.retrieval.search.faiss import FaissError, FaissKind
from recipes.retrieval.search.index import VectorIndex
from recipes.retrieval.search.keep import Keep
from recipes.retrieval.search.pooled import GROUPS, best_pages, pooled
from tests.recipes.retrieval.search.test_index import make, random_vectors

BUILD = """
import sys
from pathlib import Path
import faiss
from recipes.retrieval.search.index import VectorIndex
index = VectorIndex.open(Path(sys.argv[1]))
print("start", flush=True)
index.build_faiss(sys.argv[2])
"""


def test_faiss_finds_what_the_exact_search_finds(tmp_path):
    vectors = random_vectors(2000)
    queries = list(random_vectors(20, seed=5).values())
    index = make(tmp_path, vectors, shard=700)
    index.remove(["p0001"])
    with pytest.raises(FaissError, match=r"has no FAISS file of kind flat; run: python -m recipes\.retrieve index"):
        index.searcher("flat")
    wanted = index.search(queries, 10)
    index.build_faiss("flat")
    assert index.searcher("flat")(queries, 10) == wanted
    index.build_faiss("ivf")
    found = index.searcher("ivf", num_probes=40)(queries, 10)
    ids = [[{hit.page_id for hit in hits} for hits in run] for run in (found, wanted)]
    assert np.mean([len(one & other) / 10 for one, other in zip(*ids, strict=True)]) > 0.9
    assert len(index.searcher("flat")(queries[:1], 5000)[0]) == 1999
    index.remove(["p0002"])
    with pytest.raises(FaissError, match="older than the index"):
        index.searcher("flat")


# Pages of several vectors


def test_a_page_is_pooled_in_runs_of_neighbours():
    page_VD = np.repeat(np.eye(16, dtype=np.float32), 3, axis=0)
    rows = pooled(np.concatenate([page_VD, np.eye(16)[:2]]), np.array([0, 48]))
    np.testing.assert_allclose(rows[:16], np.eye(16))
    assert rows[16:].argmax(axis=1).tolist() == [0] * 8 + [1] * 8  # fewer vectors than groups
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1)


def test_pages_are_proposed_by_their_best_row_of_each_vector():
    similarities = np.array([[0.9, 0.8, 0.7], [0.6, 0.5, 0.1]])
    rows = np.array([[GROUPS, 1, 2], [0, 2 * GROUPS, -1]])  # pages 1, 0, 0 and 0, 2
    # page 0: .8 + .6; page 1: .9 + .5, which the second vector proposed last; page 2: .7 + .5
    assert best_pages(similarities, rows, 5).tolist() == [0, 1, 2]
    assert best_pages(similarities, rows, 1).tolist() == [0]


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_late_interaction_is_searched_by_pooled_vectors_and_scored_by_all(tmp_path, kind):
    rng = np.random.default_rng(0)
    pages = {f"p{number:04d}": unit(np.repeat(rng.standard_normal((6, 16)), 4, axis=0)) for number in range(600)}
    pages = {name: unit(page + 0.1 * rng.standard_normal(page.shape)) for name, page in pages.items()}
    queries = [unit(pages[f"p{number:04d}"][::5] + 0.05 * rng.standard_normal((5, 16))) for number in range(0, 600, 40)]
    index = make(tmp_path, pages, multi=True, shard=250)
    index.build_faiss(kind)
    wanted = index.search(queries, 10)
    search = index.searcher(kind, num_probes=40, candidates=60)
    assert [hits[0] for hits in search(queries, 10)] == [hits[0] for hits in wanted]  # exact scores
    ids = [[{hit.page_id for hit in hits} for hits in run] for run in (search(queries, 10), wanted)]
    assert np.mean([len(one & other) for one, other in zip(*ids, strict=True)]) > 9
    assert index.searcher(kind, num_probes=10_000, candidates=600)(queries, 10) == wanted  # all are scored
    kept = Keep(without=frozenset({wanted[0][0].page_id}))
    assert search(queries[:1], 1, kept) == [wanted[0][1:2]]
    index.remove([wanted[1][0].page_id])
    with pytest.raises(FaissError, match="older than the index"):
        index.searcher(kind)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def killed_build(folder: Path, kind: FaissKind, is_time: Callable[[], bool]) -> bool:
    """Start a build in a process of its own and kill it with -9 once it is time; say whether it was still at it."""
    command = [sys.executable, "-c", BUILD, str(folder), kind]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"start\n"
        while process.poll() is None and not is_time():
            pass
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL


def assert_complete(index: VectorIndex, kind: FaissKind, queries: list[np.ndarray]) -> None:
    """Every page is in the FAISS file once, it finds what the exact search finds, and nothing is left over."""
    search = index.searcher(kind, num_probes=10_000)
    (everything,) = search(queries[:1], len(index))
    assert sorted(hit.page_id for hit in everything) == sorted(index.page_ids())
    assert search(queries, 5) == index.search(queries, 5)
    assert not list(index.folder.glob(".*.tmp"))


def test_a_build_killed_while_it_writes_leaves_no_file_that_is_taken_for_whole(tmp_path):
    vectors = random_vectors(40_000, dim=512)
    ids, queries = list(vectors), [vectors["p0007"], vectors["p39999"]]
    first = make(tmp_path, {page_id: vectors[page_id] for page_id in ids[:1000]}, shard=1000)
    first.build_faiss("flat")
    assert_complete(first, "flat", queries[:1])
    with first.locked():
        first.add(ids[1000:], [vectors[page_id] for page_id in ids[1000:]])
    before = (tmp_path / "faiss-flat.bin").stat()

    def unfinished() -> list[Path]:
        return [file for file in tmp_path.glob(".faiss-flat.bin.*.tmp") if file.stat().st_size > 0]

    for _ in range(5):  # 41 MB are written in some 50 ms: a starved test may come too late
        if killed_build(tmp_path, "flat", lambda: bool(unfinished())) and unfinished():
            break
    assert unfinished(), "no build was killed while it wrote"
    assert (tmp_path / "faiss-flat.bin").stat() == before
    index = VectorIndex.open(tmp_path)
    with pytest.raises(FaissError, match="older than the index"):
        index.searcher("flat")
    assert index.search(queries, 1)[1][0].page_id == "p39999"
    index.build_faiss("flat", only_if_older=True)
    assert_complete(index, "flat", queries)


def test_a_build_killed_while_it_trains_starts_again(tmp_path):
    vectors = random_vectors(20_000, dim=128)
    index = make(tmp_path, vectors, shard=20_000)
    start = time.monotonic()
    index.build_faiss("ivf")
    training_s = time.monotonic() - start  # writing is a hundredth of it
    for file in tmp_path.glob("faiss-*"):
        file.unlink()
    started: list[float] = []

    def is_time() -> bool:
        started.append(time.monotonic())
        return started[-1] - started[0] > training_s / 4

    assert killed_build(tmp_path, "ivf", is_time)
    assert not list(tmp_path.glob("*faiss*"))
    with pytest.raises(FaissError, match="has no FAISS file of kind ivf"):
        index.searcher("ivf")
    index.build_faiss("ivf")
    assert_complete(index, "ivf", [vectors["p0007"], vectors["p19999"]])


def test_a_build_stopped_between_two_files_is_none(tmp_path, monkeypatch):
    vectors = random_vectors(50)
    index = make(tmp_path, vectors)
    index.build_faiss("flat")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recipes.retrieval.search.faiss.write_text", stop)
        with pytest.raises(KeyboardInterrupt):
            index.build_faiss("flat")
    with pytest.raises(FaissError, match="has no FAISS file of kind flat"):
        index.searcher("flat")
    index.build_faiss("flat")
    assert_complete(index, "flat", [vectors["p0007"]])


@pytest.mark.parametrize("name", ["faiss-flat.bin", "faiss-flat.json"])
def test_a_damaged_file_says_how_to_rebuild_it(tmp_path, name):
    index = make(tmp_path, random_vectors(50))
    index.build_faiss("flat")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:20])
    with pytest.raises(FaissError, match=r"(damaged|has no FAISS file).*; run: python -m recipes\.retrieve index"):
        index.searcher("flat")
    index.build_faiss("flat")
    make(tmp_path / "other", random_vectors(3)).build_faiss("flat")
    shutil.copy(tmp_path / "other" / "faiss-flat.bin", tmp_path)
    with pytest.raises(FaissError, match="has 3 vectors for 50 pages"):
        index.searcher("flat")


def test_nobody_builds_while_another_process_writes_to_the_index(tmp_path):
    index = make(tmp_path, random_vectors(5))
    with index.locked(), pytest.raises(StoreError, match="another process is writing"):
        VectorIndex.open(tmp_path).build_faiss("flat")
