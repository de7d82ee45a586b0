"""A checkpoint is either whole or absent, and the previous one goes last."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rsgrpo.running.checkpoint import CheckpointError, CheckpointFolder
from tests.material import ROOT


def learner_files(content: str = "weights"):
    def save(folder: Path) -> None:
        (folder / "model.bin").write_text(content)

    return save


def steps(folder: CheckpointFolder) -> list[int]:
    return [checkpoint.step for checkpoint in folder.all()]


def test_what_was_written_is_read_back(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=2, keep_best=0)
    folder.write(3, learner_files("w3"), {"stream": {"epoch": 1}, "surplus": ["group"]}, 0.5)
    newest = CheckpointFolder(tmp_path, keep_last=2, keep_best=0).newest()
    assert newest is not None
    assert (newest.step, newest.score) == (3, 0.5)
    assert newest.driver_state() == {"stream": {"epoch": 1}, "surplus": ["group"]}
    assert (newest.learner_folder / "model.bin").read_text() == "w3"
    assert (tmp_path / "latest").resolve() == newest.folder.resolve()


def test_the_newest_and_the_best_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=2, keep_best=1)
    for step, score in [(1, 0.2), (2, 0.9), (3, 0.4), (4, float("nan")), (5, None)]:
        folder.write(step, learner_files(), {}, score)
    assert steps(folder) == [2, 4, 5]


def test_a_fresh_folder_has_nothing_to_resume(tmp_path):
    assert CheckpointFolder(tmp_path / "new", keep_last=1, keep_best=1).newest() is None


def test_a_full_disk_leaves_the_previous_checkpoint_and_says_so(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=1, keep_best=0)
    folder.write(10, learner_files("good"), {}, None)

    def full_disk(target: Path) -> None:
        (target / "half.bin").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step 20 could not be written.*No space left.*step 10 is intact"):
        folder.write(20, full_disk, {}, None)
    assert steps(folder) == [10]
    assert (folder.all()[0].learner_folder / "model.bin").read_text() == "good"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


MOMENTS = ("save", "fsync", "rename", "replace", "rmtree")
WRITE_AND_DIE = """
import os, shutil, signal, sys
from pathlib import Path
from rsgrpo.running.checkpoint import CheckpointFolder

def write(moment):
    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def save(folder):
        (folder / "model.bin").write_text("w2")
        if moment == "save":
            die()

    folder = CheckpointFolder(Path(sys.argv[1]) / moment, keep_last=1, keep_best=0)
    if moment in ("fsync", "rename", "replace"):
        setattr(os, moment, die)
    if moment == "rmtree":
        real = shutil.rmtree
        shutil.rmtree = lambda path, **kwargs: die() if ".removing" in str(path) else real(path, **kwargs)
    folder.write(2, save, {"step": 2}, None)
    os._exit(0)

for moment in sys.argv[2:]:
    writer = os.fork()
    if writer == 0:
        write(moment)
    print(moment, os.WTERMSIG(os.waitpid(writer, 0)[1]))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder of checkpoints for each moment at which a process was killed that wrote the second one."""
    root = tmp_path_factory.mktemp("killed")
    for moment in MOMENTS:
        CheckpointFolder(root / moment, keep_last=1, keep_best=0).write(1, learner_files("w1"), {"step": 1}, None)
    command = [sys.executable, "-c", WRITE_AND_DIE, str(root), *MOMENTS]
    ended = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert ended.stdout.split() == [word for moment in MOMENTS for word in (moment, str(int(signal.SIGKILL)))]
    return root


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_at_any_moment_of_a_write_leaves_a_whole_checkpoint(killed, moment):
    where = killed / moment
    folder = CheckpointFolder(where, keep_last=1, keep_best=0)
    newest = folder.to_resume()
    assert newest is not None
    assert newest.step == (2 if moment in ("replace", "rmtree") else 1)
    assert newest.driver_state() == {"step": newest.step}
    assert (newest.learner_folder / "model.bin").read_text() == f"w{newest.step}"
    assert all(not path.name.startswith(".") for path in where.iterdir() if path.is_dir())
    folder.write(3, learner_files("w3"), {"step": 3}, None)
    assert steps(folder) == [3]


def test_writing_the_same_step_again_changes_nothing(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=1, keep_best=0)
    folder.write(1, learner_files("first"), {}, None)
    before = os.stat(tmp_path / "step_000001").st_mtime_ns
    folder.write(1, learner_files("second"), {}, None)
    assert os.stat(tmp_path / "step_000001").st_mtime_ns == before


def test_a_checkpoint_that_is_still_being_written_is_committed_later(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=1, keep_best=0)
    folder.write(1, learner_files("w1"), {}, None)
    is_saved = iter([False, False, True])
    folder.begin(2, learner_files("w2"), {"step": 2}, None)
    for _ in range(2):
        folder.settle(lambda: next(is_saved), wait=False)
        assert steps(folder) == [1], "the one before is there until the new one is whole"
    folder.settle(lambda: next(is_saved), wait=True)
    assert steps(folder) == [2]
    assert folder.all()[0].driver_state() == {"step": 2}
    folder.settle(lambda: pytest.fail("nothing is being written"), wait=True)


def test_a_write_that_fails_in_the_background_says_so_and_leaves_the_one_before(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=1, keep_best=0)
    folder.write(1, learner_files("w1"), {}, None)
    folder.begin(2, learner_files("half"), {}, None)

    def is_saved() -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step 2 could not be written.*No space left.*step 1 is intact"):
        folder.settle(is_saved, wait=False)
    folder.write(3, learner_files("w3"), {}, None)
    assert steps(folder) == [3]


def test_a_run_that_failed_leaves_no_half_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=1, keep_best=0)
    folder.begin(1, learner_files("half"), {}, None)
    folder.abandon()
    assert list(tmp_path.iterdir()) == []
