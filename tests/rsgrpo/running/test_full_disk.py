"""A file system that really has no room left: the learner's checkpoints, and a store of pages."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.retrieval.pages.ingest import IngestReport
from recipes.retrieval.pages.store import PageStore, StoreError
from rsgrpo.running.checkpoint import CheckpointError, CheckpointFolder
from tests.material.learner import make_groups, make_learner
from tests.material.retrieval import ingested


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many bytes; skips where this process may not mount."""
    mounted: list[Path] = []

    def mount(num_bytes: int) -> Path:
        place = tmp_path / "small_disk"
        place.mkdir()
        if shutil.which("mount") is None:
            pytest.skip("there is no mount command")
        size = f"size={num_bytes}"
        result = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)], capture_output=True)
        if result.returncode:
            pytest.skip(f"mounting needs more rights: {result.stderr.decode().strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("room", [1.2, 1.5, 1.9])
def test_a_checkpoint_that_does_not_fit_says_so_and_leaves_the_one_before(
    tmp_path, small_disk, tiny_model_path, page_images, room
):
    learner = make_learner(tiny_model_path)
    groups = make_groups(page_images, [1])
    learner.update(groups, [1.0, 1.0])
    learner.save(tmp_path / "measure")
    num_bytes = sum(path.stat().st_size for path in (tmp_path / "measure").rglob("*") if path.is_file())
    disk = small_disk(int(room * num_bytes) + (64 << 10))

    folder = CheckpointFolder(disk / "checkpoints", keep_last=2, keep_best=0)
    folder.write(1, learner.save, {"stream": 1}, None)
    at_step_1 = {name: tensor.clone() for name, tensor in learner.gather_weights()}
    learner.update(groups, [1.0, 1.0])
    with pytest.raises(CheckpointError, match=r"step 2 could not .* the disk is full .* That of step 1 is intact"):
        folder.write(2, learner.save, {"stream": 2}, None)

    assert sorted(path.name for path in folder.folder.iterdir()) == ["latest", "step_000001"]
    newest = CheckpointFolder(folder.folder, keep_last=2, keep_best=0).newest()
    assert newest is not None
    assert (newest.step, newest.driver_state()) == (1, {"stream": 1})
    again = make_learner(tiny_model_path)
    again.load(newest.learner_folder)
    for name, tensor in again.gather_weights():
        np.testing.assert_array_equal(tensor.numpy(), at_step_1[name].numpy(), err_msg=name)


def test_documents_that_do_not_fit_say_so_and_leave_the_store_before(tmp_path, small_disk):
    docs, store = tmp_path / "docs", small_disk(3 << 20) / "store"
    docs.mkdir()
    rng = np.random.default_rng(0)

    def write(name: str) -> None:  # noise, which no format packs: a page of 1.1 MB
        Image.fromarray(rng.integers(0, 255, (600, 600, 3), dtype=np.uint8)).save(docs / name)

    def run() -> IngestReport:
        return ingested(store, docs)

    write("a.png")
    assert run().num_pages == 1
    before = PageStore.open(store).page_ids()
    write("b.png")
    write("c.png")
    with pytest.raises(StoreError, match=r"No space left on device; finished work is intact\. Make room"):
        run()
    assert PageStore.open(store).page_ids() == before
    (docs / "c.png").unlink()
    report = run()
    assert (report.num_pages, report.errors) == (2, ())
    assert len(list(store.glob("pages/*/*"))) == 2  # nothing half is left
