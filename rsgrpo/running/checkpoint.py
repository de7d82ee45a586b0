"""Checkpoints on disk: a folder is whole or absent, and an older one is removed only after the new one is committed.

A checkpoint holds the learner's state (`rsgrpo.learning.state`) and the driver's (`rsgrpo.running.driver_state`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.files import sync
from rsgrpo.errors import RsgrpoError
from rsgrpo.running.driver_state import read_state, write_state

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
LEARNER_FOLDER = "learner"
FULL_DISK_MIB = 16
"""With less than this left when a write fails, the disk counts as full."""


class CheckpointError(RsgrpoError):
    """A checkpoint could not be written or read; the text says which one is intact."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One committed checkpoint: its folder, its step and its validation score (None when there was none)."""

    folder: Path
    step: int
    score: float | None

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


class CheckpointFolder:
    """All checkpoints of one run, `<run>/checkpoints/step_*`, and the link `latest`."""

    def __init__(self, folder: Path, *, keep_last: int, keep_best: int) -> None:
        """Open (and make) the folder; leftovers of an interrupted write are removed."""
        self.folder = folder
        self.keep_last = keep_last
        self.keep_best = keep_best
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*"):
            log.info("removing %s, left behind by an interrupted run", leftover)
            leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover)

    def all(self) -> list[Checkpoint]:
        """Return the committed checkpoints, oldest first."""
        found = []
        for folder in sorted(self.folder.glob("step_*")):
            state = json.loads((folder / STATE_FILE).read_text())
            found.append(Checkpoint(folder, state["step"], state["score"]))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def newest(self) -> Checkpoint | None:
        """Return the checkpoint to resume from; None on a fresh run."""
        return max(self.all(), key=lambda checkpoint: checkpoint.step, default=None)

    def write(
        self, step: int, save_learner: Callable[[Path], None], driver_state: Mapping[str, Any], score: float | None
    ) -> Checkpoint:
        """Write one checkpoint: temporary folder, fsync, rename, `latest`, then retention.

        Args:
            step: optimiser batches done.
            save_learner: writes the learner's files into the folder it is given; all ranks together.
            driver_state: what `rsgrpo.running.driver_state` can write.
            score: validation score that `keep_best` compares, higher is better; None or NaN is never best.

        Raises:
            CheckpointError: something could not be written (a full disk, say). The earlier checkpoints are intact.
        """
        temporary, final = self.folder / f".writing_{step:06d}", self.folder / f"step_{step:06d}"
        for checkpoint in self.all():
            if checkpoint.step == step:  # the same step is the same state: the last step of a run asks twice
                return checkpoint
        score = None if score is None or math.isnan(score) else score
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / LEARNER_FOLDER).mkdir(parents=True)
            save_learner(temporary / LEARNER_FOLDER)
            write_state(temporary, driver_state)
            (temporary / STATE_FILE).write_text(json.dumps({"step": step, "score": score}) + "\n")
            _sync_tree(temporary)
            os.rename(temporary, final)
            sync(self.folder)
        except Exception as error:
            free_mib = shutil.disk_usage(self.folder).free / 2**20  # while the half-written files are still there
            shutil.rmtree(temporary, ignore_errors=True)
            # torch hides a full disk behind errors of its own, so the free space is looked at too.
            is_full = "No space left" in str(error) or free_mib < FULL_DISK_MIB
            if isinstance(error, RsgrpoError) and not is_full:
                raise  # the error names the worker that failed
            intact = self.newest()
            cause = f"the disk is full ({free_mib:.1f} MiB are free): {_first_line(error)}" if is_full else str(error)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {cause}. "
                + (f"That of step {intact.step} is intact. " if intact else "There is no earlier one. ")
                + "Make room, lower checkpoint.keep_last or set another output_dir; then run the same command again."
            ) from error
        self._point_latest_at(final)
        self._retain()
        return Checkpoint(final, step, score)

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


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _remove(folder: Path) -> None:
    """Remove a committed folder in one visible step: it is never there half deleted."""
    doomed = folder.with_name(f".removing_{folder.name}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(parent)
