"""Where a run's numbers and rollouts go: `metrics.jsonl`, parquet, Weights & Biases, TensorBoard.

`metrics.jsonl` and the rollout files are authoritative: a resumed run cuts them back to its checkpoint. Trackers are a
convenience: one that fails is counted and logged, and never stops training. wandb and TensorBoard are imported only
here, and only when configured.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from rollout.files import WriteError, naming_full_disk, write_text
from rollout.inputs.images import thumbnail
from rollout.types import ImageSource
from rsgrpo.config.train import TrackingConfig
from rsgrpo.records.rollouts import FOLDER, Split, remove_rollouts_after, write_rollouts

if TYPE_CHECKING:  # readers of metrics need no torch
    from rsgrpo.types import ScoredGroup, TrainGroup

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
NON_FINITE_KEY = "tracking/non_finite"
FAILURES_KEY = "perf/tracker_failures"
WANDB_TIMEOUT_S = 60.0
THUMBNAIL_SIDE = 200


class Sink(Protocol):
    """A tracker beside `metrics.jsonl`; `name` is for messages."""

    name: str

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None: ...

    def log_rollouts(self, step: int, groups: Sequence[ScoredGroup], split: Split, mode: str) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Everything that a run records about itself.

    num_non_finite: NaN and infinite values so far; each is written as null and counted in its line.
    num_failures: calls to Weights & Biases or TensorBoard that failed so far.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tracking: TrackingConfig,
        config: Mapping[str, Any],
        *,
        name: str,
        resume_step: int | None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Cut the run's files back to `resume_step` and start the trackers.

        config: the whole configuration as plain values; the trackers show it.
        resume_step: the checkpoint's step; None is a fresh run, which removes what an earlier one left here.
        state: what `state()` returned when the checkpoint was written.
        """
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.num_non_finite = 0
        self.num_failures = 0
        self._storing: Future[Path] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._tracking = tracking
        self._warned: set[str] = set()
        self._run_id: str = (state or {}).get("wandb_run_id", "")
        self._num_lines = cut_metrics_after(
            self.run_dir / METRICS_FILE, resume_step, max_lines=(state or {}).get("metrics_lines")
        )
        remove_rollouts_after(self.run_dir, resume_step)
        self._file = (self.run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._sinks: list[Sink] = []
        if tracking.wandb != "disabled":
            with self._tolerating(_WandbSink.name):
                self._start_wandb(name, config)
        if tracking.tensorboard:
            with self._tolerating(_TensorBoardSink.name):
                self._sinks.append(_TensorBoardSink(self.run_dir, resume_step))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to `metrics.jsonl`, which is on disk when this returns, and pass it to the trackers."""
        clean = {key: _finite(value) for key, value in metrics.items()}
        bad = [key for key, value in clean.items() if value is None]
        if bad:
            self.num_non_finite += len(bad)
            clean[NON_FINITE_KEY] = len(bad)
            self._warn_once(f"non-finite {bad}", "step %d: not finite, so written as null: %s", step, ", ".join(bad))
        if self.num_failures:
            clean[FAILURES_KEY] = self.num_failures
        with naming_full_disk(self.run_dir / METRICS_FILE):
            self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **clean}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        if not os.fstat(self._file.fileno()).st_nlink:
            raise WriteError(
                f"{self.run_dir / METRICS_FILE} was deleted while the run was writing it. Run the same command to "
                "resume from the newest checkpoint that is left."
            )
        self._num_lines += 1
        for sink in self._sinks:
            with self._tolerating(sink.name):
                sink.log(step, clean)

    def store_rollouts(
        self,
        step: int,
        groups: Sequence[ScoredGroup],
        train_groups: Sequence[TrainGroup] = (),
        split: Split = "train",
        *,
        terms: Sequence[str] = (),
        mode: str = "",
    ) -> None:
        """Write the rollouts of a step as parquet, beside the next step, and some of them to the trackers' table.

        They are on disk when `state` or `close` returns. A write that fails is raised by the next call of any of these.

        train_groups: one per group in the same order, or empty. terms: names of the K loss terms of their samples.
        mode: "greedy" or "sampled" for validation; both modes of a step share a file.
        """
        self._settle()
        if self._tracking.store_rollouts:
            write = partial(write_rollouts, self.run_dir, step, groups, train_groups)
            self._storing = self._pool.submit(write, terms=terms, split=split, mode=mode)
        for sink in self._sinks:
            with self._tolerating(sink.name):
                sink.log_rollouts(step, groups, split, mode)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the length of `metrics.jsonl`, and the Weights & Biases run to continue."""
        self._settle()
        return {"metrics_lines": self._num_lines, **({"wandb_run_id": self._run_id} if self._run_id else {})}

    def close(self) -> None:
        """Finish the trackers. May be called twice."""
        for sink in self._sinks:
            with self._tolerating(sink.name):
                sink.close()
        self._sinks = []
        self._file.close()
        self._settle()

    def _settle(self) -> None:
        """Wait until the rollouts are on disk."""
        storing, self._storing = self._storing, None
        if storing is not None:
            with naming_full_disk(self.run_dir / FOLDER):
                storing.result()

    def _start_wandb(self, name: str, config: Mapping[str, Any]) -> None:
        sink = _WandbSink(self.run_dir, self._tracking, config, name=name, run_id=self._run_id)
        if sink.fallback_reason:
            self.num_failures += 1
            log.warning(
                "Weights & Biases is not reachable (%s), so this run is logged offline; metrics.jsonl is complete in "
                "any case. Run `wandb sync %s` to upload it later.",
                sink.fallback_reason,
                sink.folder,
            )
        self._run_id = sink.run_id
        self._sinks.append(sink)

    @contextmanager
    def _tolerating(self, name: str) -> Iterator[None]:
        """Count and log whatever a tracker raises; it never stops training."""
        try:
            yield
        except Exception as error:
            self.num_failures += 1
            message = "%s failed; the run continues (counted in %s, logged once): %s"
            self._warn_once(name, message, name, FAILURES_KEY, error)

    def _warn_once(self, key: str, message: str, *values: object) -> None:
        if key not in self._warned:
            self._warned.add(key)
            log.warning(message, *values)


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl` in order; a last line torn by a kill, and damaged ones, are left out."""
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    found = [(number, _row(line)) for number, line in enumerate(_whole_lines(path), 1)]
    if damaged := [str(number) for number, row in found if row is None]:
        log.warning("%s: damaged and left out: line %s", path, ", ".join(damaged))
    return [row for _, row in found if row is not None]


def cut_metrics_after(path: Path, step: int | None, *, max_lines: int | None = None) -> int:
    """Drop lines of later steps (all for None) and damaged ones, atomically; return how many lines stay.

    max_lines: lines the file had when the checkpoint was written; its step may have been given another line since.
    """
    if not path.exists():
        return 0
    num_lines = len(path.read_bytes().splitlines())
    rows = [(line, _row(line)) for line in _whole_lines(path)[:max_lines]]
    kept = [line for line, row in rows if step is not None and row is not None and row["step"] <= step]
    if len(kept) < num_lines:
        write_text(path, "".join(line + "\n" for line in kept))
        where = "for a fresh run" if step is None else f"back to step {step}"
        log.warning("%s cut %s: %d of %d lines dropped", path, where, num_lines - len(kept), num_lines)
    return len(kept)


def _whole_lines(path: Path) -> list[str]:
    """Return the lines that end in a newline: one without it was not written to its end."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [line for line in lines[:-1] if line]


def _row(line: str) -> dict[str, Any] | None:
    """Return a line's values; None if a power cut or a disk has damaged it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _finite(value: float) -> float | None:
    number = value.item() if hasattr(value, "item") else value
    return number if math.isfinite(number) else None


def page_strip(images: Sequence[ImageSource], max_side: int = THUMBNAIL_SIDE) -> Image.Image | None:
    """Return thumbnails of the pages side by side, or None without pages."""
    if not images:
        return None
    pages = [thumbnail(source, max_side) for source in images]
    gap = 4
    width = sum(page.width + gap for page in pages) - gap
    strip = Image.new("RGB", (width, max(page.height for page in pages)), "white")
    left = 0
    for page in pages:
        strip.paste(page, (left, 0))
        left += page.width + gap
    return strip


def spread_rows(group_sizes: Sequence[int], num_rows: int) -> list[tuple[int, int]]:
    """Return (group, rollout) pairs: the first rollout of every group, then the second, until there are `num_rows`.

    Example: group_sizes [2, 1], num_rows 3 -> (0, 0), (1, 0), (0, 1).
    """
    rounds = range(max(group_sizes, default=0))
    pairs = [(group, g) for g in rounds for group, num_rollouts in enumerate(group_sizes) if g < num_rollouts]
    return pairs[:num_rows]


class _WandbSink:
    """One Weights & Biases run. The step is a metric, because `log(step=...)` would drop late rows."""

    name = "Weights & Biases"

    def __init__(
        self, run_dir: Path, tracking: TrackingConfig, config: Mapping[str, Any], *, name: str, run_id: str
    ) -> None:
        import wandb

        self._wandb = wandb
        self._num_rows = tracking.rollout_table_rows
        folder = str(run_dir.absolute())
        places = {"WANDB_DIR": folder, "WANDB_DATA_DIR": f"{folder}/wandb"}
        self._environment = {key: os.environ.get(key) for key in places}
        os.environ.update(places)
        self.run_id = run_id or secrets.token_hex(4)
        self.fallback_reason = ""

        team, _, project = tracking.project.rpartition("/")

        def start(mode: str, run_id: str) -> Any:
            return wandb.init(
                project=project,
                entity=team or None,
                name=name,
                id=run_id,
                resume="allow" if mode == "online" else None,
                dir=folder,
                config=dict(config),
                mode=mode,  # type: ignore[arg-type]
                settings=wandb.Settings(
                    init_timeout=WANDB_TIMEOUT_S, finish_timeout=WANDB_TIMEOUT_S, console="off", silent=True
                ),
            )

        try:
            try:
                self._run = start(tracking.wandb, self.run_id)
            except Exception as error:  # no key, no network, no such project
                if tracking.wandb == "offline":
                    raise
                self.fallback_reason = str(error)
                # The failed start still holds its id. A run that was online before keeps its id for the next resume.
                spare_id = secrets.token_hex(4)
                self._run = start("offline", spare_id)
                self.run_id = run_id or spare_id
        except BaseException:
            self._restore_environment()
            raise
        self.folder = Path(self._run.settings.sync_dir)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self._run.log({"step": step, **{key: value for key, value in metrics.items() if value is not None}})

    def log_rollouts(self, step: int, groups: Sequence[ScoredGroup], split: Split, mode: str) -> None:
        pairs = spread_rows([len(scored.group.rollouts) for scored in groups], self._num_rows)
        if not pairs:
            return
        names = groups[0].reward_names_K
        table = self._wandb.Table(columns=["step", "prompt", "pages", "question", "truth", "response", *names])
        for index, g in pairs:
            scored = groups[index]
            prompt, strip = scored.group.prompt, page_strip(scored.group.prompt.images)
            page_cell = self._wandb.Image(strip, file_type="jpg") if strip else None
            truth = json.dumps(dict(prompt.truth), ensure_ascii=False, default=str)
            text = scored.group.rollouts[g].text
            table.add_data(step, prompt.id, page_cell, prompt.question, truth, text, *scored.scores_GK[g])
        self._run.log({"step": step, "/".join(filter(None, ("rollouts", split, mode))): table})

    def close(self) -> None:
        try:
            self._run.finish()
        finally:
            self._restore_environment()

    def _restore_environment(self) -> None:
        for key, value in self._environment.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


class _TensorBoardSink:
    """Event files under `<run>/tensorboard`; scalars only."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        for key, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def log_rollouts(self, step: int, groups: Sequence[ScoredGroup], split: Split, mode: str) -> None:
        """Do nothing: rollouts are in the parquet files and the report."""

    def close(self) -> None:
        self._writer.close()
