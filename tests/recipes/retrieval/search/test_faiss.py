"""FAISS beside the exact search: recall, files of another state, builds killed while they train and write."""

from __future__ import annotations

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
from recipes.retrieval.search.exact import exact
from recipes.retrieval.search.faiss import FaissError, FaissSearch, Kind, build, build_if_older
from recipes.retrieval.search.index import VectorIndex
from tests.recipes.retrieval.search.test_index import make, random_vectors

BUILD = """
import sys
from pathlib import Path
import faiss
from recipes.retrieval.search.faiss import build
from recipes.retrieval.search.index import VectorIndex
index = VectorIndex.open(Path(sys.argv[1]))
print("start", flush=True)
build(index, sys.argv[2])
"""


def test_faiss_finds_what_the_exact_search_finds(tmp_path):
    vectors = random_vectors(2000)
    queries = list(random_vectors(20, seed=5).values())
    index = make(tmp_path, vectors, shard=700)
    index.remove(["p0001"])
    with pytest.raises(FaissError, match=r"has no FAISS file of kind flat; run: python -m recipes\.retrieve index"):
        FaissSearch(index, "flat")
    wanted = exact(index, queries, 10)
    build(index, "flat")
    assert FaissSearch(index, "flat").search(queries, 10) == wanted
    build(index, "ivf")
    found = FaissSearch(index, "ivf", num_probes=40).search(queries, 10)
    recall = np.mean(
        [len({h.page_id for h in a} & {h.page_id for h in b}) / 10 for a, b in zip(found, wanted, strict=True)]
    )
    assert recall > 0.9
    assert len(FaissSearch(index, "flat").search(queries[:1], 5000)[0]) == 1999
    index.remove(["p0002"])
    with pytest.raises(FaissError, match="older than the index"):
        FaissSearch(index, "flat")
    with pytest.raises(FaissError, match="one vector each"):
        build(make(tmp_path / "late", {"a": np.eye(2)}, multi=True), "flat")


def killed_build(folder: Path, kind: Kind, is_time: Callable[[], bool]) -> bool:
    """Start a build in a process of its own and kill it with -9 once it is time; say whether it was still at it."""
    command = [sys.executable, "-c", BUILD, str(folder), kind]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"start\n"
        while process.poll() is None and not is_time():
            pass
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL


def assert_complete(index: VectorIndex, kind: Kind, queries: list[np.ndarray]) -> None:
    """Every page is in the FAISS file once, it finds what the exact search finds, and nothing is left over."""
    search = FaissSearch(index, kind, num_probes=10_000)
    ids = [page_id.decode() for page_id in np.load(index.folder / f"faiss-{kind}.ids.npy")]
    assert len(ids) == len(set(ids))
    assert sorted(ids) == sorted(index.page_ids())
    assert search.search(queries, 5) == exact(index, queries, 5)
    assert not list(index.folder.glob(".*.writing"))


def test_a_build_killed_while_it_writes_leaves_no_file_that_is_taken_for_whole(tmp_path):
    vectors = random_vectors(40_000, dim=512)
    ids, queries = list(vectors), [vectors["p0007"], vectors["p39999"]]
    first = make(tmp_path, {page_id: vectors[page_id] for page_id in ids[:1000]}, shard=1000)
    build(first, "flat")
    assert_complete(first, "flat", queries[:1])
    with first.locked():
        first.add(ids[1000:], [vectors[page_id] for page_id in ids[1000:]])
    partial, before = tmp_path / ".faiss-flat.bin.writing", (tmp_path / "faiss-flat.bin").stat()

    def written() -> bool:
        return partial.exists() and partial.stat().st_size > 0

    for _ in range(5):  # 41 MB are written in some 50 ms: a starved test may come too late
        if killed_build(tmp_path, "flat", written) and partial.exists():
            break
    assert partial.exists(), "no build was killed while it wrote"
    assert (tmp_path / "faiss-flat.bin").stat() == before
    index = VectorIndex.open(tmp_path)
    with pytest.raises(FaissError, match="older than the index"):
        FaissSearch(index, "flat")
    assert exact(index, queries, 1)[1][0].page_id == "p39999"
    build_if_older(index, "flat")
    assert_complete(index, "flat", queries)


def test_a_build_killed_while_it_trains_starts_anew(tmp_path):
    vectors = random_vectors(20_000, dim=128)
    index = make(tmp_path, vectors, shard=20_000)
    start = time.monotonic()
    build(index, "ivf")
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
        FaissSearch(index, "ivf")
    build(index, "ivf")
    assert_complete(index, "ivf", [vectors["p0007"], vectors["p19999"]])


def test_a_build_stopped_between_two_files_is_none(tmp_path, monkeypatch):
    vectors = random_vectors(50)
    index = make(tmp_path, vectors)
    build(index, "flat")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recipes.retrieval.search.faiss.save_array", stop)
        with pytest.raises(KeyboardInterrupt):
            build(index, "flat")
    with pytest.raises(FaissError, match="has no FAISS file of kind flat"):
        FaissSearch(index, "flat")
    build(index, "flat")
    assert_complete(index, "flat", [vectors["p0007"]])


@pytest.mark.parametrize("name", ["faiss-flat.bin", "faiss-flat.ids.npy", "faiss-flat.json"])
def test_a_damaged_file_says_how_it_is_made_anew(tmp_path, name):
    index = make(tmp_path, random_vectors(50))
    build(index, "flat")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:20])
    with pytest.raises(FaissError, match=r"(damaged|has no FAISS file).*; run: python -m recipes\.retrieve index"):
        FaissSearch(index, "flat")
    build(index, "flat")
    (tmp_path / "faiss-flat.ids.npy").unlink()
    np.save(tmp_path / "faiss-flat.ids.npy", np.array([b"p0001"]))
    with pytest.raises(FaissError, match="has 50 vectors for 1 pages"):
        FaissSearch(index, "flat")


def test_nobody_builds_while_another_process_writes_to_the_index(tmp_path):
    index = make(tmp_path, random_vectors(5))
    with index.locked(), pytest.raises(StoreError, match="another process is writing"):
        build(VectorIndex.open(tmp_path), "flat")
