"""One training run from start to finish: its folder, its workers, its progress, and how it stops and resumes.

`Run.open` builds the parts; the algorithm itself is in `rsgrpo.train`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rollout.engine import shares
from rollout.files import only_writer, replaced_folder
from rollout.types import SamplingParams
from rsgrpo.algorithm.scoring import RewardSet
from rsgrpo.cluster.build import build_cluster
from rsgrpo.cluster.engine_check import CHECKED_PROMPTS, choose_prompts
from rsgrpo.cluster.protocol import Cluster, StartCluster
from rsgrpo.config.own_advantage import load_advantage
from rsgrpo.config.train import TrainConfig
from rsgrpo.errors import InputError, SourceBroke, WorkerError
from rsgrpo.records import summary
from rsgrpo.records.console import Console
from rsgrpo.records.hub import push_folder, require_login
from rsgrpo.records.integrity import write_sums
from rsgrpo.records.run_log import log_to_folder, stop_logging, write_failure
from rsgrpo.records.secrets import masked
from rsgrpo.records.tracking import Tracker, read_metrics
from rsgrpo.report.model_card import write_model_card
from rsgrpo.report.page import write_report
from rsgrpo.running.batches import Collector, CutPrompts, resumed
from rsgrpo.running.checkpoint import Checkpoint, CheckpointFolder
from rsgrpo.running.continuous import batches_for
from rsgrpo.running.guards import GuardBroken, Guards
from rsgrpo.running.prompts import RunPrompts, load_run_prompts
from rsgrpo.running.settings import Settings, about_changes, changed_settings, write_settings
from rsgrpo.running.stopping import StopRequested, StopSignals
from rsgrpo.running.validation import validate_policy, validation_modes
from rsgrpo.types import ScoredGroup, TrainGroup


@dataclass(frozen=True)
class RunParts:
    """What a run is put together from.

    resumed: the checkpoint that learner and prompts are at; None is a fresh run. state: the driver's part of it.
    started: when the process began with them (monotonic seconds).
    """

    console: Console
    stop: StopSignals
    prompts: RunPrompts
    checkpoints: CheckpointFolder
    cluster: Cluster
    tracker: Tracker
    log_file: logging.Handler
    resumed: Checkpoint | None
    state: Mapping[str, Any]
    started: float


class Run:
    """Everything that `train` works with. Use as a context manager: leaving it stops the workers, whatever happened.

    A signal that asks the run to stop leaves it with a checkpoint and StopRequested (`rsgrpo.running.stopping`).
    """

    def __init__(self, config: TrainConfig, parts: RunParts, settings: Settings, *, line_every: int = 1) -> None:
        """Take the parts; `line_every` is the number of steps between lines on the console."""
        self.config, self.settings, self.line_every = config, settings, line_every
        self.folder = run_folder(config)
        self.console, self.stop, self.cluster = parts.console, parts.stop, parts.cluster
        self.checkpoints, self.tracker, self.stream = parts.checkpoints, parts.tracker, parts.prompts.stream
        self._log_file = parts.log_file
        self.train_prompts, self.val_prompts = parts.prompts.train, parts.prompts.val
        self.total_steps = steps_of(config, len(self.train_prompts))
        self.guards = Guards(config.guards, read_metrics(self.folder))
        returned, ready = resumed(parts.state)
        take, sampling, kept = self.stream.next, train_sampling(config), config.algorithm.filter
        self.collector = Collector(self.cluster.sample_to_learn, take, cut_prompts(config), sampling, kept, returned)
        step = parts.resumed.step if parts.resumed else 0
        self.batches = batches_for(config, self.collector, ready, self.stream.state, num_done=step)
        self.score = parts.resumed.score if parts.resumed else None
        self.times: dict[str, float] = {}
        self._started, self._checked, self._leaving, self.recoveries = parts.started, False, ExitStack(), 0
        self._mark_boundary(step, validated=parts.state.get("validated", False))
        self.cluster.sync_weights(self.step)

    @classmethod
    def open(
        cls,
        config: TrainConfig,
        *,
        settings: Settings | None = None,
        start_cluster: StartCluster = build_cluster,
        line_every: int = 1,
    ) -> Run:
        """Load the data, start the workers and, if there is a checkpoint, resume from it.

        Args:
            settings: what the user configured, for config.yaml and the trackers; None is `config` itself. Its secrets
                are masked.
            start_cluster: makes the workers.
            line_every: steps between lines on the console.

        Raises:
            InputError: data, model, rewards or cluster cannot work, or another process holds the run's folder.
            CheckpointError: no checkpoint of the run is undamaged.
        """
        settings = masked(settings or dataclasses.asdict(config))
        with ExitStack() as leaving:
            run = cls(config, start(config, settings, start_cluster, leaving), settings, line_every=line_every)
            run._leaving = leaving.pop_all()
            return run

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop the workers and close the trackers; save a run that was stopped.

        Raises:
            WorkerError: a worker failed; the text says at which step, and from which one the run can resume.
        """
        with self._leaving:
            if error is not None and not isinstance(error, StopRequested):
                write_failure(self._log_file, error)
            if isinstance(error, StopRequested | SourceBroke):
                self.save()
                if isinstance(error, StopRequested):
                    what = f"Stopped by {error} after step {self.step}."
                else:
                    what = f"Stopped after step {self.step}: the data stream ended."
                self.console.warning(f"{what} Run the same command to resume.")
            elif error is not None:
                self.checkpoints.abandon()
        if isinstance(error, WorkerError):
            newest = self.checkpoints.newest()
            where = f"resume from step {newest.step}" if newest else "start again from the beginning"
            message = f"step {self.step + 1}: {error}\nFix the cause and run the same command to {where}."
            raise WorkerError(message, error.cause, died=error.died) from None

    @property
    def steps_left(self) -> range:
        """Steps still to do, numbered from 1."""
        return range(self.step + 1, self.total_steps + 1)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Show a phase on the console and add its seconds to `time/<name>` of this step."""
        start = time.monotonic()
        with self.console.phase(name):
            yield
        self.times[f"time/{name}"] = time.monotonic() - start

    def end_step(
        self,
        step: int,
        scored: Sequence[ScoredGroup],
        groups: Sequence[TrainGroup],
        terms: Sequence[str],
        metrics: dict[str, float],
    ) -> None:
        """Record a finished step; validate and write a checkpoint when due.

        Raises:
            StopRequested: a signal arrived; the step is recorded and can be saved.
            GuardBroken: a metric has been out of its bound (`config.guards`) for too long; the step is saved.
        """
        seconds = sum(self.times.values())
        num_tokens = sum(len(sample.token_ids_T) for group in groups for sample in group.samples)
        metrics = {
            **metrics,
            **self.times,
            "time/step": seconds,
            "perf/response_tokens_per_s": num_tokens / seconds,
            **({"perf/recoveries": float(self.recoveries)} if self.recoveries else {}),
            **{f"perf/rss_mb_{role}": megabytes for role, megabytes in self.cluster.memory_mb().items()},
        }
        self.times = {}
        self.tracker.log(step, metrics)
        if scored:
            self.tracker.store_rollouts(step, scored, groups, terms=terms)
        if step % self.line_every == 0 or step == self.total_steps:
            self.console.step_line(step, self.total_steps, metrics)
        self._mark_boundary(step, validated=False)
        self.checkpoints.settle(self.cluster.learner.is_saved, wait=False)
        self.stop.check()
        self.validate_if_due()
        broken = self.guards.check(step, metrics)
        stops = bool(broken) and self.config.guards.action == "stop"
        if step % self.config.checkpoint.every == 0 or step == self.total_steps or stops:
            self.save(wait=stops or step == self.total_steps or not self.config.checkpoint.background)
        if stops:
            raise GuardBroken(
                f"Stopped: {broken}\nThe checkpoint of step {step} is in {self.checkpoints.folder}. Look at the "
                f"rollouts with `python -m rsgrpo.report {self.folder}`. To continue anyway, set guards.action=warn."
            )
        if broken:
            self.console.warning(broken)

    def check_engines_if_due(self) -> None:
        """Compare the engines with the learner, at the start of a run and every `gate.every` steps.

        Raises:
            EnginesDiffer: they disagree.
        """
        every = self.config.gate.every
        if not every or self.config.rollout.engine == "fake" or (self._checked and self.step % every):
            return
        self._checked = True
        self.batches.settle()  # the engines are asked by one thread at a time
        prompts = choose_prompts((self.train_prompts[i] for i in range(len(self.train_prompts))), CHECKED_PROMPTS)
        with self.timed("gate"):
            self.cluster.check_engines(prompts, self.step)

    def validates_at(self, step: int) -> bool:
        """Whether the policy is validated after this step (0: before the first)."""
        if not self.val_prompts:
            return False
        every = self.config.validation.every
        if step == 0:
            return bool(every) and self.config.validation.at_start
        return bool(every) and (step % every == 0 or step == self.total_steps)

    def validate_if_due(self) -> None:
        """Validate the current policy, if this step asks for it and it has not been done."""
        step = self.step
        if self.validated or not self.validates_at(step):
            return
        self.batches.settle()  # the engines are asked by one thread at a time
        modes = validation_modes(self.config.validation, self.config.rollout.max_response_tokens, self.config.seed)
        with self.timed("validate"):
            metrics, scored_by_mode = validate_policy(self.val_prompts, modes, self.cluster.sample_and_score)
        self.tracker.log(step, {**metrics, **self.times})
        self.times = {}
        for mode, scored in scored_by_mode.items():
            self.tracker.store_rollouts(step, scored, split="val", mode=mode)
        self.console.validation_line(step, self.total_steps, metrics)
        self.score = metrics.get(self.config.checkpoint.metric)
        self._mark_boundary(step, validated=True)

    def save(self, *, wait: bool = True) -> None:
        """Write a checkpoint of the last finished step, however far the driver has moved on since.

        wait: until it is on disk; otherwise a later step commits it.
        """
        learner = self.cluster.learner
        with self.console.phase("checkpoint"):
            self.checkpoints.settle(learner.is_saved, wait=True)
            state = {**self._boundary, "tracker": self.tracker.state()}
            self.checkpoints.begin(self.step, learner.begin_save, state, self.score)
            self.checkpoints.settle(learner.is_saved, wait=wait)

    def finish(self) -> None:
        """Export the model, write the report, upload the export if asked, and show the results.

        Raises:
            RsgrpoError: the upload failed; everything is on disk.
        """
        rows = read_metrics(self.folder)
        lines = summary.scores(rows)
        memory = self.cluster.memory_mb()
        lines["time"] = f"{(time.monotonic() - self._started) / 60:.1f} minutes in this process"
        lines["memory"] = ", ".join(f"{role} {megabytes:.0f} MB" for role, megabytes in memory.items())
        lines["run folder"] = str(self.folder)
        export = self.folder / "export"
        if self.config.checkpoint.export:
            with self.console.phase("export"), replaced_folder(export) as unfinished:
                self.cluster.learner.export(unfinished, self.config.export.dtype)
                write_model_card(self.folder, unfinished, self.settings)
                write_sums(unfinished)
            lines["model"] = str(export)
        self.tracker.close()
        with self.console.phase("report"):
            lines["report"] = str(write_report(self.folder))
        if self.config.export.push_to_hub:
            with self.console.phase("upload"):
                lines["hub"] = push_folder(export, self.config.export, f"{self.config.name}: step {self.step}")
        for warning in summary.warnings(rows, list(self.config.rewards)):
            self.console.warning(warning)
        self.console.summary(f"{self.config.name}: {self.step} of {self.total_steps} steps done", list(lines.items()))

    def _mark_boundary(self, step: int, *, validated: bool) -> None:
        """Remember what a checkpoint of this step must hold: from here on the driver moves to the next step."""
        self.step, self.validated = step, validated
        self._boundary = {"validated": validated, **self.batches.boundary()}


def start(config: TrainConfig, settings: Settings, start_cluster: StartCluster, leaving: ExitStack) -> RunParts:
    """Start what a run works with; `leaving` ends each part. Arguments and errors are those of `Run.open`."""
    started, folder = time.monotonic(), run_folder(config)
    require_login(config.export)
    rewards = RewardSet.from_config(config)  # a reward that cannot be loaded ends the run before anything starts
    if ":" in config.algorithm.advantage:
        load_advantage(config.algorithm.advantage)
    named = (*rewards.rewards, *rewards.monitors)
    console = Console(rewards={reward.name: reward.function for reward in named})
    leaving.callback(console.close)
    stop = StopSignals()
    leaving.callback(stop.close)
    prompts = load_run_prompts(config, console)
    total_steps = steps_of(config, len(prompts.train))
    leaving.enter_context(only_writer(folder))
    checkpoints, newest = checkpoint_to_resume(config)
    state = newest.driver_state() if newest else {}
    console.info(f"Starting the workers. The run is in {folder}.")
    with console.phase("starting workers"):
        cluster = start_cluster(config, total_steps=total_steps, run_dir=folder, check_stop=stop.check)
    stop.listen()
    leaving.callback(lambda: cluster.close(hurry=stop.requested is not None))
    if newest:
        cluster.learner.load(newest.learner_folder)
        prompts.stream.load_state(state["stream"])
        for warning in about_changes(changed_settings(folder, settings)):
            console.warning(warning)
        console.info(f"Resuming from step {newest.step} of {total_steps} ({newest.folder}).")
    write_settings(folder, settings)
    log_file = log_to_folder(folder)
    leaving.callback(stop_logging, log_file)
    resume_step, kept = newest.step if newest else None, state.get("tracker")
    tracker = Tracker(folder, config.tracking, settings, name=config.name, resume_step=resume_step, state=kept)
    leaving.callback(tracker.close)
    return RunParts(console, stop, prompts, checkpoints, cluster, tracker, log_file, newest, state, started)


def run_folder(config: TrainConfig) -> Path:
    """Return where a run writes everything."""
    return Path(config.output_dir) / config.name


def steps_of(config: TrainConfig, num_prompts: int) -> int:
    """Return the steps of the whole run."""
    return config.total_steps or math.ceil(config.epochs * num_prompts / config.algorithm.prompts_per_step)


def train_sampling(config: TrainConfig) -> SamplingParams:
    """Return how training rollouts are sampled."""
    rollout = config.rollout
    return SamplingParams(
        group_size=rollout.group_size,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=rollout.max_response_tokens,
        seed=config.seed,
    )


def cut_prompts(config: TrainConfig) -> CutPrompts:
    """Return how the prompts of a step are cut into shares for the engines."""
    rollout = config.rollout
    return lambda prompts: shares(prompts, rollout.group_size, rollout.share_sequences, rollout.num_workers)


def checkpoint_to_resume(config: TrainConfig) -> tuple[CheckpointFolder, Checkpoint | None]:
    """Return a run's checkpoints and the newest undamaged one of them.

    Raises:
        InputError: there is a run already, and `checkpoint.resume` is "never".
        CheckpointError: as `CheckpointFolder.to_resume`.
    """
    folder, settings = run_folder(config), config.checkpoint
    checkpoints = CheckpointFolder(folder / "checkpoints", keep_last=settings.keep_last, keep_best=settings.keep_best)
    if settings.resume == "never" and (folder / "config.yaml").exists():
        raise InputError(
            f"{folder} already holds a run, and checkpoint.resume=never. Choose another name=, remove the folder, or "
            "set checkpoint.resume=auto to resume it."
        )
    return checkpoints, checkpoints.to_resume(strict=settings.resume == "strict")
