"""Checkpoints on disk: a folder is whole or absent, and an older one is removed only after the new one is committed.

A checkpoint holds the learner's state (`rsgrpo.learning.state`), the driver's (`rsgrpo.running.driver_state`) and the
checksums of all its files. Only the process that holds the run folder (`rollout.files.only_writer`) may write here.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rollout.files import sync, sync_tree
from rsgrpo.errors import RsgrpoError, listed
from rsgrpo.records.integrity import damage, write_sums
from rsgrpo.running.driver_state import read_state, write_state

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
LEARNER_FOLDER = "learner"
POLL_S = 0.2
FULL_DISK_MIB = 16
"""With less than this left when a write fails, the disk counts as full."""
_NAME = re.compile(r"step_(\d+)")
_LEFTOVERS = (".writing_*", ".removing_*", ".latest")


class CheckpointError(RsgrpoError):
    """A checkpoint could not be written or read; the text says which one is intact."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One committed checkpoint.

    score: of its validation; None without one. num_files: that have checksums; None in those of earlier releases.
    """

    folder: Path
    step: int
    score: float | None
    num_files: int | None = None

    @property
    def learner_folder(self) -> Path:
        """Where the learner's own files are."""
        return self.folder / LEARNER_FOLDER

    def driver_state(self) -> dict[str, Any]:
        """Read back what `CheckpointFolder.write` was given.

        Raises:
            StateError: as `rsgrpo.running.driver_state.read_state`.
        """
        return read_state(self.folder)


@dataclass(slots=True)
class _Begun:
    """A checkpoint that is being written. committing: checksums and fsync, once the learner's files are there."""

    temporary: Path
    step: int
    score: float | None
    committing: Future[None] | None = None


class CheckpointFolder:
    """All checkpoints of one run, `<run>/checkpoints/step_*`, and the link `latest`.

    `begin` starts one and `settle` commits it once it has been written; `write` does both.
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_best: int) -> None:
        """Open (and make) the folder."""
        self.folder = folder
        self.keep_last = keep_last
        self.keep_best = keep_best
        folder.mkdir(parents=True, exist_ok=True)
        self._begun: _Begun | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commit")

    def all(self) -> list[Checkpoint]:
        """Return the committed checkpoints, oldest first; those without a readable state are left out."""
        found = [_read(folder) for folder in self._folders()]
        return [checkpoint for checkpoint in found if isinstance(checkpoint, Checkpoint)]

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint, its files unread; None without one."""
        return max(self.all(), key=lambda checkpoint: checkpoint.step, default=None)

    def to_resume(self, *, strict: bool = False) -> Checkpoint | None:
        """Return the newest checkpoint whose files are what was written; None on a fresh run.

        Leftovers of an interrupted write are removed. Newer checkpoints that are damaged are named and renamed to
        `damaged_step_*`, so that they are kept and out of the way.

        Raises:
            CheckpointError: none is undamaged, or the newest is not and `strict`.
        """
        for leftover in (path for pattern in _LEFTOVERS for path in self.folder.glob(pattern)):
            log.info("removing %s, left behind by an interrupted run", leftover)
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        damaged: dict[Path, str] = {}
        intact = None
        for folder in reversed(self._folders()):
            found = _read(folder)
            faults = [found] if isinstance(found, str) else damage(folder, found.num_files)
            if isinstance(found, Checkpoint) and not faults:
                intact = found
                break
            damaged[folder] = "; ".join(faults[:3])
        if not damaged:
            return intact
        what = listed([f"{folder.name}: {fault}" for folder, fault in damaged.items()])
        if intact is None:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is undamaged:\n{what}\nTo start again, remove {self.folder.parent} or "
                "choose another name=."
            )
        if strict:
            raise CheckpointError(
                f"damaged checkpoints in {self.folder}, and checkpoint.resume=strict:\n{what}\nTo resume from step "
                f"{intact.step}, which is undamaged, set checkpoint.resume=auto."
            )
        for folder in damaged:
            aside = folder.with_name(f"damaged_{folder.name}")
            os.rename(folder, aside.with_name(f"{aside.name}_{secrets.token_hex(2)}") if aside.exists() else aside)
        log.warning("damaged checkpoints were renamed to damaged_*; resuming from step %d:\n%s", intact.step, what)
        return intact

    def _folders(self) -> list[Path]:
        """Return the folders of committed checkpoints by step; whatever else is here is none of ours."""
        found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found) if path.is_dir()]

    def write(
        self, step: int, save_learner: Callable[[Path], None], driver_state: Mapping[str, Any], score: float | None
    ) -> None:
        """Write one checkpoint: temporary folder, fsync, rename, `latest`, then retention.

        Args:
            save_learner: writes the learner's files into the folder it is given; all ranks together. The others are as
                in `begin`.

        Raises:
            CheckpointError: something could not be written (a full disk, say). The earlier checkpoints are intact.
        """
        self.begin(step, save_learner, driver_state, score)
        self.settle(lambda: True, wait=True)

    def begin(
        self, step: int, begin_save: Callable[[Path], None], driver_state: Mapping[str, Any], score: float | None
    ) -> None:
        """Begin to write one checkpoint; it exists once `settle` has committed it. The last one must be settled.

        Args:
            step: optimiser batches done.
            begin_save: begins to write the learner's files into the folder it is given; all ranks together.
            driver_state: what `rsgrpo.running.driver_state` can write.
            score: validation score that `keep_best` compares, higher is better; None or NaN is never best.

        Raises:
            CheckpointError: as `write`.
        """
        assert self._begun is None, "settle the checkpoint before"
        if any(checkpoint.step == step for checkpoint in self.all()):
            return  # the same step is the same state: the last step of a run asks twice
        temporary = self.folder / f".writing_{step:06d}_{secrets.token_hex(4)}"
        self._begun = _Begun(temporary, step, None if score is None or math.isnan(score) else score)
        try:
            (temporary / LEARNER_FOLDER).mkdir(parents=True)
            begin_save(temporary / LEARNER_FOLDER)
            write_state(temporary, driver_state)
        except Exception as error:
            self._fail(error)

    def settle(self, is_saved: Callable[[], bool], *, wait: bool) -> None:
        """Commit the checkpoint that was begun, if there is one and its files are there.

        Args:
            is_saved: whether the learner's files are written; raises why they could not be.
            wait: until it is committed.

        Raises:
            CheckpointError: as `write`.
        """
        begun = self._begun
        if begun is None:
            return
        try:
            while begun.committing is None:
                if is_saved():
                    begun.committing = self._pool.submit(self._commit, begun)
                elif not wait:
                    return
                else:
                    time.sleep(POLL_S)
            if not wait and not begun.committing.done():
                return
            begun.committing.result()
        except Exception as error:
            self._fail(error)
        self._begun = None

    def abandon(self) -> None:
        """Give up what is being written, for a run that failed; what only lacks its commit is committed."""
        begun = self._begun
        if begun is not None and begun.committing is not None:
            self.settle(lambda: True, wait=True)
        elif begun is not None:
            self._begun = None
            shutil.rmtree(begun.temporary, ignore_errors=True)

    def _commit(self, begun: _Begun) -> None:
        """Make a checkpoint whose files are all there whole: checksums, fsync, rename; then let an older one go."""
        temporary, final = begun.temporary, self.folder / f"step_{begun.step:06d}"
        num_files = 1 + sum(path.is_file() for path in temporary.rglob("*"))
        state = {"step": begun.step, "score": begun.score, "files": num_files}
        (temporary / STATE_FILE).write_text(json.dumps(state) + "\n")
        write_sums(temporary)
        sync_tree(temporary)
        os.rename(temporary, final)
        sync(self.folder)
        self._point_latest_at(final)
        self._retain()

    def _fail(self, error: Exception) -> NoReturn:
        """Give up the checkpoint that was begun."""
        begun, self._begun = self._begun, None
        assert begun is not None
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder} was deleted while the run was writing to it: no checkpoint is left. Run the same "
                "command to start again."
            ) from error
        free_mib = shutil.disk_usage(self.folder).free / 2**20  # while the half-written files are still there
        shutil.rmtree(begun.temporary, ignore_errors=True)
        # torch hides a full disk behind errors of its own, so the free space is looked at too.
        is_full = "No space left" in str(error) or free_mib < FULL_DISK_MIB
        if isinstance(error, RsgrpoError) and not is_full:
            raise error  # it names the worker that failed
        intact = self.newest()
        cause = f"the disk is full ({free_mib:.1f} MiB are free): {_first_line(error)}" if is_full else str(error)
        raise CheckpointError(
            f"the checkpoint of step {begun.step} could not be written to {self.folder}: {cause}. "
            + (f"That of step {intact.step} is intact. " if intact else "There is no earlier one. ")
            + "Make room, lower checkpoint.keep_last or set another output_dir; then run the same command again."
        ) from error

    def _point_latest_at(self, final: Path) -> None:
        link = self.folder / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        os.replace(link, self.folder / "latest")
        sync(self.folder)

    def _retain(self) -> None:
        checkpoints = self.all()
        scored = sorted((c for c in checkpoints if c.score is not None), key=lambda c: (c.score, c.step))
        keep = {c.folder for c in checkpoints[-self.keep_last :]}
        keep |= {c.folder for c in scored[len(scored) - self.keep_best :]}
        for checkpoint in checkpoints:
            if checkpoint.folder not in keep:
                _remove(checkpoint.folder)


def _read(folder: Path) -> Checkpoint | str:
    """Return a committed checkpoint, or why its state.json cannot be read."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        step, score = state["step"], state["score"]
        if not isinstance(step, int) or not isinstance(score, float | int | None):
            raise TypeError("step or score is not a number")
        return Checkpoint(folder, step, score, state.get("files"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{STATE_FILE} cannot be read: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _remove(folder: Path) -> None:
    """Remove a committed folder in one visible step: it is never there half deleted."""
    doomed = folder.with_name(f".removing_{folder.name}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
