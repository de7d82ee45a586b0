"""Encoding on Ray Data: the vectors of the local path, in resumable shards, whoever is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.material import ROOT

pytest.importorskip("sentence_transformers", reason="needs the retrieval extra")

from recipes.retrieval.encoders.base import EncoderSettings, identify
from recipes.retrieval.encoders.choice import load_encoder
from recipes.retrieval.encoders.on_ray import RaySettings, encode_on_ray
from recipes.retrieval.pages.store import Page, PageStore
from recipes.retrieval.search.index import VectorIndex
from recipes.retrieval.search.update import encode_here, fill_index
from rsgrpo.errors import RsgrpoError
from tests.material.retrieval import QUIET, ingested, write_pdf
from tests.material.retrieval_models import save_late

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Data warns of defaults of its own
NUM_PAGES = 40
PIXELS: dict[str, Any] = {"min_pixels": 784, "max_pixels": 784 * 8, "device": "cpu", "batch_size": 4}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    (folder / "docs").mkdir()
    write_pdf(folder / "docs" / "a.pdf", [f"page {row} amount {row * row}" for row in range(NUM_PAGES)])
    ingested(folder / "store", folder / "docs")
    return folder / "store"


@pytest.fixture(scope="module")
def ray_here():
    import ray

    yield
    ray.shutdown()


@pytest.mark.slow
def test_two_actors_give_the_index_of_the_local_path(store, tiny_model_path, tmp_path, ray_here):
    identity = identify(EncoderSettings(tiny_model_path, **PIXELS))
    encoder = load_encoder(identity.settings)
    here = VectorIndex.create(tmp_path / "here", encoder.identity, "float32")
    there = VectorIndex.create(tmp_path / "there", identity, "float32")
    settings = RaySettings(num_workers=2, gpus_per_worker=0)
    pages = PageStore.open(store)
    fill_index(pages, here, lambda p: encode_here(encoder, p, 8), shard_pages=16, console=QUIET)
    report = fill_index(pages, there, lambda p: encode_on_ray(identity, settings, p), shard_pages=16, console=QUIET)
    assert (report.num_added, report.num_pages) == (NUM_PAGES, NUM_PAGES)
    ids = pages.page_ids()
    for page_id, vector in here.vectors(ids).items():
        np.testing.assert_allclose(there.vectors([page_id])[page_id], vector, atol=1e-6)
    queries = encoder.encode_queries(["amount 49", "page 7"])
    for one, other in zip(here.search(queries, 10), there.search(queries, 10), strict=True):
        assert [hit.score for hit in one] == pytest.approx([hit.score for hit in other], abs=2e-6)
    again = fill_index(pages, there, lambda _: iter(()), shard_pages=16, console=QUIET)
    assert again.num_added == 0  # nothing is missing, so nothing is asked for

    late = identify(EncoderSettings(save_late(tiny_model_path, tmp_path / "late"), "late", **PIXELS))
    some = list(pages.pages())[:5]
    found = dict(encode_on_ray(late, settings, some))
    wanted = load_encoder(late.settings).encode_pages(some)
    for page, vectors in zip(some, wanted, strict=True):
        np.testing.assert_allclose(found[page.page_id], vectors, atol=1e-5)

    with pytest.raises(RsgrpoError, match=r"page x of d: .*; delete .* and ingest again"):
        list(encode_on_ray(identity, settings, [*some, Page("x", "d", 1, str(tmp_path / "gone.png"), 1, 1, "")]))
    with pytest.raises(RsgrpoError, match=r"--workers 500 needs 501 CPUs .* but the Ray cluster has"):
        list(encode_on_ray(identity, RaySettings(500, 0), some))


@pytest.mark.slow
def test_a_killed_command_on_ray_resumes_and_leaves_no_process(store, tiny_model_path, tmp_path):
    index = tmp_path / "index"
    command = [sys.executable, "-m", "recipes.retrieve", "index", str(store), "--model", tiny_model_path]
    command += ["--index", str(index), "--max-pixels", "6272", "--device", "cpu", "--batch-size", "2"]
    command += ["--shard-pages", "2", "--workers", "1", "--gpus-per-worker", "0"]
    mark = f"rsgrpo-test-{os.getpid()}"
    environment = os.environ | {"RSGRPO_TEST_MARK": mark}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shards = index / "shards"
    deadline = time.monotonic() + 180
    while len(list(shards.glob("*.ids")) if shards.exists() else ()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(VectorIndex.open(index))
    assert 2 <= kept < NUM_PAGES
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=environment)
    added = re.search(r"added\s+(\d+)", result.stdout)
    assert added is not None
    assert kept <= NUM_PAGES - int(added[1]) < NUM_PAGES  # a shard may have been committed after we counted
    ids = list(VectorIndex.open(index).page_ids())
    assert sorted(ids) == sorted(PageStore.open(store).page_ids())


def marked(mark: str) -> list[int]:
    """Return the processes that inherited our mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("settings", "fault"), [((0,), "--workers must be >= 1 on Ray, got 0"), ((1, -1.0), "--gpus-per-worker must be")]
)
def test_settings_that_cannot_work_are_refused(settings, fault):
    with pytest.raises(RsgrpoError, match=fault):
        RaySettings(*settings)
