"""A damaged checkpoint is never resumed from in silence, and one process writes a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rollout.files import FolderHeld, only_writer
from rsgrpo.records.integrity import SUMS_FILE, damage, write_sums
from rsgrpo.running.checkpoint import CheckpointError, CheckpointFolder

FILES = ("state.json", "driver.json", "driver.npz", "learner/model.bin", "learner/.metadata", SUMS_FILE)


def save(folder: Path) -> None:
    (folder / "model.bin").write_bytes(bytes(range(256)) * 4)
    (folder / ".metadata").write_bytes(b"index")


def written(folder: Path, *steps: int) -> CheckpointFolder:
    checkpoints = CheckpointFolder(folder, keep_last=5, keep_best=0)
    for step in steps:
        checkpoints.write(step, save, {"step": step, "surplus": list(range(100))}, None)
    return checkpoints


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": flipped,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": Path.unlink,
}


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_checkpoint_is_named_and_set_aside(tmp_path, name, what, caplog):
    checkpoints = written(tmp_path, 4, 8)
    DAMAGES[what](tmp_path / "step_000008" / name)
    with pytest.raises(CheckpointError, match=r"resume=strict:\n  step_000008: .*\n.*step 4, which is undamaged"):
        checkpoints.to_resume(strict=True)
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step_000004", "step_000008"]
    found = checkpoints.to_resume()
    assert found is not None
    assert found.step == 4
    assert found.driver_state()["step"] == 4
    assert (tmp_path / "damaged_step_000008").is_dir()
    assert "step_000008: " in caplog.text
    checkpoints.write(8, save, {"step": 8}, None)  # the run gets there again
    assert [checkpoint.step for checkpoint in checkpoints.all()] == [4, 8]


def test_without_an_undamaged_checkpoint_the_run_is_refused_and_nothing_moved(tmp_path):
    checkpoints = written(tmp_path, 1, 2)
    for folder in tmp_path.glob("step_*"):
        flipped(folder / "learner/model.bin")
    with pytest.raises(CheckpointError, match=r"is undamaged:\n  step_000002: learner/model\.bin has another content"):
        checkpoints.to_resume()
    assert len(list(tmp_path.glob("step_*"))) == 2


def test_one_bit_anywhere_in_a_checkpoint_is_noticed(tmp_path):
    written(tmp_path, 1)  # state.json, driver.json, driver.npz, two of the learner
    folder, draw = tmp_path / "step_000001", random.Random(0)
    files = [path for path in folder.rglob("*") if path.is_file()]
    for _ in range(300):
        path = draw.choice(files)
        sound = path.read_bytes()
        content = bytearray(sound)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        assert damage(folder, 5), path
        path.write_bytes(sound)
    assert damage(folder, 5) == []
    assert damage(folder, 4) == ["SHA256SUMS lists 5 files of 4"]


def test_checksums_are_read_by_sha256sum(tmp_path):
    (tmp_path / "a b.bin").write_bytes(b"x")
    write_sums(tmp_path)
    assert subprocess.run(["sha256sum", "-c", SUMS_FILE], cwd=tmp_path, capture_output=True).returncode == 0


def test_strange_files_among_checkpoints_are_neither_fatal_nor_removed(tmp_path):
    checkpoints = written(tmp_path, 3)
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / ".nfs0001").write_text("x")
    (tmp_path / ".snapshot").mkdir()
    (tmp_path / "step_best").mkdir()
    (tmp_path / "step_000003" / ".DS_Store").write_text("x")
    (tmp_path / ".writing_000004").mkdir()
    found = checkpoints.to_resume()
    assert found is not None
    assert found.step == 3
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".DS_Store", ".nfs0001", ".snapshot", "step_best", "step_000003", "latest"}


def test_the_second_writer_of_a_folder_learns_who_the_first_is(tmp_path):
    who = rf"run is being written by process {os.getpid()} on {socket.gethostname()}, since 20"
    with only_writer(tmp_path / "run"), pytest.raises(FolderHeld, match=who), only_writer(tmp_path / "run"):
        raise AssertionError
    with only_writer(tmp_path / "run"):
        pass


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path):
    program = f"""
import os, signal
from rollout.files import only_writer
with only_writer({str(tmp_path)!r}):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode < 0
    assert (tmp_path / ".lock").stat().st_size > 0
    with only_writer(tmp_path):
        pass


def test_where_the_disk_has_no_locks_a_living_holder_is_respected_and_a_dead_one_not(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / ".lock").write_text(f'{{"host": "{socket.gethostname()}", "pid": {os.getppid()}, "since": "now"}}')
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(FolderHeld, match=f"process {os.getppid()}"), only_writer(tmp_path):
        raise AssertionError
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / ".lock").write_text(f'{{"host": "{socket.gethostname()}", "pid": {ended.pid}, "since": "now"}}')
    with only_writer(tmp_path):
        pass
