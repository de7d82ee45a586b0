"""One training run as a thing with a life: its folder, its workers, where it stands, how it stops and goes on.

Owns start, resume, validation, checkpoints and the end. The algorithm itself is in `rsgrpo.train`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from rollout.inputs.processor import InputProcessor
from rollout.types import SamplingParams
from rsgrpo.algorithm.scoring import RewardSet
from rsgrpo.cluster.engine_check import CHECKED_PROMPTS, choose_prompts, require_gate
from rsgrpo.cluster.local import LocalCluster
from rsgrpo.cluster.ranks import WorkerFailed
from rsgrpo.cluster.ray_cluster import Cluster
from rsgrpo.config.train import TrainConfig
from rsgrpo.data.checked_images import CHECKED_FILE, CheckedImages
from rsgrpo.data.dataset import PromptDataset, PromptStream, load_prompts
from rsgrpo.data.streaming import NUM_SHOWN_AT_START, StreamedPrompts
from rsgrpo.errors import InputError, SourceBroke
from rsgrpo.records.console import Console
from rsgrpo.records.hub import push_folder, require_login
from rsgrpo.records.tracking import Tracker, read_metrics
from rsgrpo.report.model_card import write_model_card
from rsgrpo.report.page import write_report
from rsgrpo.running.batches import Collector, Lookahead
from rsgrpo.running.checkpoint import Checkpoint, CheckpointFolder
from rsgrpo.running.guards import GuardBroken, Guards
from rsgrpo.running.validation import validate_policy, validation_modes
from rsgrpo.stopping import StopRequested, StopSignals
from rsgrpo.types import ScoredGroup, TrainGroup

log = logging.getLogger(__name__)


class Run:
    """Everything that `train` works with. Use as a context manager: leaving it stops the workers, whatever happened.

    A signal that asks the run to stop leaves it with a checkpoint and StopRequested (`rsgrpo.stopping`).
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        settings: dict[str, Any] | None = None,
        start_cluster: Callable[..., Cluster | LocalCluster] = Cluster,
        line_every: int = 1,
    ) -> None:
        """Load the data, start the workers and, where there is a checkpoint, go on from it.

        Args:
            settings: what the user configured, for config.yaml and the trackers; None is `config` itself.
            start_cluster: makes the workers.
            line_every: steps between lines on the console.

        Raises:
            InputError: data, model, rewards or cluster cannot work; no run folder has been written then.
        """
        self.config = config
        self.settings = settings or dataclasses.asdict(config)
        self.line_every = line_every
        self.folder = Path(config.output_dir) / config.name
        self.started = time.monotonic()
        self.console = Console()
        self.times: dict[str, float] = {}
        self._checked = False
        self.tracker: Tracker
        self.stop = StopSignals()
        with ExitStack() as leaving:
            leaving.callback(self.console.close)
            leaving.callback(self.stop.close)
            self._start(start_cluster, leaving)
            self._leaving = leaving.pop_all()

    def _start(self, start_cluster: Callable[..., Cluster | LocalCluster], leaving: ExitStack) -> None:
        config = self.config
        require_login(config.export)
        RewardSet.from_config(config)  # a reward that cannot be loaded ends the run before anything starts
        self.train_prompts, self.val_prompts, self.stream = self._load_data()
        self.total_steps = config.total_steps or math.ceil(
            config.epochs * len(self.train_prompts) / config.algorithm.prompts_per_step
        )
        self.checkpoints = CheckpointFolder(
            self.folder / "checkpoints", keep_last=config.checkpoint.keep_last, keep_best=config.checkpoint.keep_best
        )
        newest = self._checkpoint_to_resume()
        self.console.info(f"starting the workers; the run is in {self.folder}")
        with self.console.phase("starting workers"):
            self.cluster = start_cluster(
                config, total_steps=self.total_steps, run_dir=self.folder, check_stop=self.stop.check
            )
        self.stop.listen()
        leaving.callback(lambda: self.cluster.close(hurry=self.stop.requested is not None))
        self.collector = Collector(
            self.cluster.sample_to_learn, self.stream.next, self._train_sampling(), config.algorithm.filter
        )
        self.batches = Lookahead(self.collector, config.algorithm.prompts_per_step)
        self._resume(newest)
        leaving.callback(self.tracker.close)
        self.cluster.sync_weights(self.step)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop the workers and close the trackers; save a run that was stopped.

        Raises:
            WorkerFailed: a worker failed; the text says when it did and what goes on.
        """
        with self._leaving:
            if isinstance(error, StopRequested | SourceBroke):
                self.save()
                why = f"by {error}" if isinstance(error, StopRequested) else "for want of rows"
                self.console.warning(f"stopped {why} after step {self.step}; the same command goes on from there")
        if isinstance(error, WorkerFailed):
            newest = self.checkpoints.newest()
            where = f"step {newest.step}" if newest else "the beginning"
            raise WorkerFailed(
                f"step {self.step + 1}: {error}\nThe same command goes on from {where} once the cause is mended."
            ) from None

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
        """Record a finished step; validate and write a checkpoint where they are due.

        Raises:
            StopRequested: a signal arrived; the step is recorded and can be saved.
            GuardBroken: a metric has left its bound (`config.guards`) for too long; the step is saved.
        """
        seconds = sum(self.times.values())
        num_tokens = sum(len(sample.token_ids_T) for group in groups for sample in group.samples)
        metrics = {
            **metrics,
            **self.times,
            "time/step": seconds,
            "perf/response_tokens_per_s": num_tokens / seconds,
            **{f"perf/rss_mb_{role}": megabytes for role, megabytes in self.cluster.memory_mb().items()},
        }
        self.times = {}
        self.tracker.log(step, metrics)
        if scored:
            self.tracker.store_rollouts(step, scored, groups, terms=terms)
        if step % self.line_every == 0 or step == self.total_steps:
            self.console.step_line(step, self.total_steps, metrics)
        self._mark_boundary(step, validated=False)
        self.stop.check()
        self.validate_if_due()
        broken = self.guards.check(step, metrics)
        stops = bool(broken) and self.config.guards.action == "stop"
        if step % self.config.checkpoint.every == 0 or step == self.total_steps or stops:
            self.save()
        if stops:
            raise GuardBroken(
                f"stopped: {broken}\nThe checkpoint of step {step} is in {self.checkpoints.folder}. See the "
                f"rollouts: `python -m rsgrpo.report {self.folder}`; to go on all the same, set guards.action=warn"
            )
        if broken:
            self.console.warning(broken)

    def check_engines_if_due(self) -> None:
        """Compare the engines with the learner, at the start of a run and every `gate.every` steps.

        Raises:
            GateFailed: they differ.
        """
        every = self.config.gate.every
        if not every or self.config.rollout.engine == "fake" or (self._checked and self.step % every):
            return
        self._checked = True
        prompts = choose_prompts((self.train_prompts[i] for i in range(len(self.train_prompts))), CHECKED_PROMPTS)
        with self.timed("gate"):
            checks = self.cluster.check_engines(prompts, self.step)
        require_gate(checks, self.step)

    def validates_at(self, step: int) -> bool:
        """Whether the policy is validated after this step (0: before the first)."""
        if not self.val_prompts:
            return False
        if step == 0:
            return self.config.validation.at_start
        every = self.config.validation.every
        return bool(every) and (step % every == 0 or step == self.total_steps)

    def validate_if_due(self) -> None:
        """Validate the policy as it stands, if this step asks for it and it was not done yet."""
        step = self.step
        if self.validated or not self.validates_at(step):
            return
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

    def save(self) -> None:
        """Write a checkpoint of the last finished step, however far the driver has gone since."""
        with self.console.phase("checkpoint"):
            self.checkpoints.write(
                self.step,
                lambda folder: self.cluster.learner.call("save", str(folder)),
                {**self._boundary, "tracker": self.tracker.state()},
                self.score,
            )

    def finish(self) -> None:
        """Export the model, write the report, upload the export where that is asked, and show what came of the run.

        Raises:
            RsgrpoError: the upload failed; everything is on disk.
        """
        lines = _before_and_after(read_metrics(self.folder))
        memory = self.cluster.memory_mb()
        lines["time"] = f"{(time.monotonic() - self.started) / 60:.1f} minutes in this process"
        lines["memory"] = ", ".join(f"{role} {megabytes:.0f} MB" for role, megabytes in memory.items())
        lines["run folder"] = str(self.folder)
        if self.config.checkpoint.export:
            export = self.folder / "export"
            with self.console.phase("export"):
                self.cluster.learner.call("export", str(export))
                write_model_card(self.folder, export, self.settings)
            lines["model"] = str(export)
        self.tracker.close()
        with self.console.phase("report"):
            lines["report"] = str(write_report(self.folder))
        if self.config.export.push_to_hub:
            with self.console.phase("upload"):
                message = f"{self.config.name}: step {self.step}"
                lines["hub"] = push_folder(self.folder / "export", self.config.export, message)
        self.console.summary(f"{self.config.name}: {self.step} of {self.total_steps} steps done", list(lines.items()))

    def _load_data(self) -> tuple[PromptDataset, list, PromptStream | StreamedPrompts]:
        """Return training prompts (of a streamed source the first ones), validation prompts, and what steps take."""
        config = self.config
        try:
            processor = InputProcessor(
                config.model.path,
                config.inputs,
                revision=config.model.revision,
                trust_remote_code=config.model.trust_remote_code,
            )
        except OSError as error:
            path, reason = config.model.path, next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(
                f"model.path={path} cannot be loaded: {reason}\nA hub model needs a network once: `hf download {path}` "
                "elsewhere, and model.path=FOLDER here"
            ) from error
        checked = CheckedImages(Path(config.output_dir) / CHECKED_FILE)

        def load(kind: str, source: str) -> PromptDataset:
            with self.console.phase(f"checking {kind} rows") as bar:
                return load_prompts(source, config.data, config.prompt, processor, checked=checked, progress=bar.update)

        validates = config.validation.every or config.validation.at_start
        stream: PromptStream | StreamedPrompts
        try:
            if config.data.streaming:
                stream = StreamedPrompts(config.data, config.prompt, processor, config.seed)
                train_set = stream.first(NUM_SHOWN_AT_START)
            else:
                train_set = load("training", config.data.train)
                stream = PromptStream(train_set, seed=config.seed, shuffle=config.data.shuffle)
            val_set = list(load("validation", config.data.val)) if config.data.val and validates else []
        finally:
            checked.save()
        self.console.info(
            f"page images: {checked.num_decoded} decoded, {checked.num_known} unchanged since an earlier start"
        )
        return train_set, val_set[: config.validation.max_prompts or None], stream

    def _train_sampling(self) -> SamplingParams:
        rollout = self.config.rollout
        return SamplingParams(
            group_size=rollout.group_size,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_tokens=rollout.max_response_tokens,
            seed=self.config.seed,
        )

    def _checkpoint_to_resume(self) -> Checkpoint | None:
        newest = self.checkpoints.newest()
        if self.config.checkpoint.resume == "never" and (self.folder / "config.yaml").exists():
            raise InputError(
                f"{self.folder} holds a run already and checkpoint.resume=never: choose another name=, remove the "
                "folder, or set checkpoint.resume=auto to go on with it"
            )
        return newest

    def _resume(self, checkpoint: Checkpoint | None) -> None:
        """Put every part back where the checkpoint left it, or at the start."""
        state: dict[str, Any] = {}
        if checkpoint is not None:
            state = checkpoint.driver_state()
            self.cluster.learner.call("load", str(checkpoint.learner_folder))
            self.stream.load_state(state["stream"])
            self.collector.surplus = list(state["surplus"])
            self.batches.ready = state["ready"]
            self._warn_of_changes(self.settings)
            self.console.info(f"going on from step {checkpoint.step} of {self.total_steps} ({checkpoint.folder})")
        (self.folder / "config.yaml").write_text(yaml.safe_dump(_plain(self.settings), sort_keys=False))
        self.score = checkpoint.score if checkpoint else None
        self.tracker = Tracker(
            self.folder,
            self.config.tracking,
            self.settings,
            name=self.config.name,
            resume_step=checkpoint.step if checkpoint else None,
            state=state.get("tracker"),
        )
        self.guards = Guards(self.config.guards, read_metrics(self.folder))
        self._mark_boundary(checkpoint.step if checkpoint else 0, validated=state.get("validated", False))

    def _mark_boundary(self, step: int, *, validated: bool) -> None:
        """Remember what a checkpoint of this step must hold: from here on the driver moves on to the next one."""
        self.step, self.validated = step, validated
        self._boundary = {
            "validated": validated,
            "stream": self.stream.state(),
            "surplus": list(self.collector.surplus),
            "ready": self.batches.ready,
        }

    def _warn_of_changes(self, config: dict[str, Any]) -> None:
        before = yaml.safe_load((self.folder / "config.yaml").read_text())
        for key, (old, new) in _differences(before, _plain(config)).items():
            self.console.warning(f"{key} was {old!r} when this run began and is {new!r} now")


def _plain(value: Any) -> Any:
    """Tuples become lists, so that a configuration reads back from yaml as it was written."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _differences(before: dict, after: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key in before.keys() | after.keys():
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found[prefix + key] = (old, new)
    return dict(sorted(found.items()))


def _before_and_after(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the first and the last value of every validation score that is not zero all along."""
    lines = {}
    for key in sorted({key for row in rows for key in row if key.startswith("val/")}):
        values = [row[key] for row in rows if row.get(key) is not None]
        if any(values) and not key.endswith(("/num_prompts", "/num_tokens", "/prompt_errors")):
            lines[key] = f"{values[0]:.3f} → {values[-1]:.3f}"
    return lines
