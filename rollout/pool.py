"""The pool of rollout workers: spreads whole groups over them and starts one again that is lost.

Owns which worker samples what, what is given up when one fails, and what is said then. Knows nothing of rewards or
learning; how weights reach a new worker is handed to it.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from rollout.config import ConfigError
from rollout.engine import EngineError, EngineFailed
from rollout.types import Prompt, RolloutGroup, SamplingParams
from rollout.worker import WorkerHandle

log = logging.getLogger(__name__)

POLL_S = 0.5
"""How often a wait looks up: for a request to stop, for a worker that is late."""

SYNCS_IN_FLIGHT = 2
"""Chunks of weights that are on their way at once: one is copied while the next travels."""

CLOSE_TIMEOUT_S = 10.0
"""How long a worker may take to end its engine's processes before it is killed."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class WorkerError(RuntimeError):
    """A rollout worker raised, died or was too slow.

    worker_index: which one, None when it is more than one. cause: the exception behind it, None when it was too slow.
    is_lost: the engine cannot go on, but another in its place could.
    """

    def __init__(
        self, worker_index: int | None, message: str, cause: BaseException | None = None, *, is_lost: bool = False
    ) -> None:
        who = "" if worker_index is None else f"rollout worker {worker_index} "
        super().__init__(who + _COLOURS.sub("", message))
        self.worker_index = worker_index
        self.cause = cause
        self.is_lost = is_lost


@dataclass(frozen=True, slots=True)
class Supervision:
    """How lost workers are replaced.

    start: starts the worker of an index, as at the beginning. send: gives workers the current weights; raises
    WorkerError. max_restarts: failures in a row, without a batch that went well between them; one more ends it.
    """

    start: Callable[[int], WorkerHandle]
    send: Callable[[Sequence[WorkerHandle]], None]
    max_restarts: int


@dataclass(frozen=True, slots=True)
class _Running:
    """A piece of work on its way: who has it, what is still to come, and when it is late (monotonic seconds)."""

    worker: WorkerHandle
    left: dict[str, Prompt]
    stream: Any
    late_at: float


class RolloutPool:
    """Spreads whole groups over workers: a prompt stays on one engine, and whoever is free takes the next piece."""

    def __init__(
        self, workers: Sequence[WorkerHandle], *, timeout_s: float = 3600.0, supervision: Supervision | None = None
    ) -> None:
        """Take workers that have been started.

        timeout_s: the longest that a worker may take for one piece of work, its start-up included.
        supervision: None lets every failure end the work.
        """
        assert workers, "a pool needs a worker"
        self.workers = list(workers)
        self.timeout_s = timeout_s
        self.num_restarts = 0
        self._supervision = supervision
        self._failures_in_a_row = 0

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, check: Callable[[], None] | None = None
    ) -> Iterator[RolloutGroup]:
        """Yield one group per prompt, in any order, as they finish.

        What is sampled does not depend on which worker is faster: the prompts are cut into the same pieces every time.
        When a worker is lost, what it had not yet finished is sampled anew.

        Args:
            check: called while waiting; raises to give up.

        Raises:
            WorkerError: a worker raised, or was lost once too often; names it and the cause.
        """
        pieces = deque(self._pieces(prompts, sampling.group_size))
        idle = deque(self.workers)
        running: list[_Running] = []
        num_restarts = self.num_restarts
        while pieces or running:
            while pieces and idle:
                running.append(self._start(idle.popleft(), pieces.popleft(), sampling))
            streams = [work.stream for work in running]
            ready = ray.wait(streams, num_returns=1, timeout=POLL_S)[0]
            if check is not None:
                check()
            for work in list(running):
                try:
                    if work.stream in ready:
                        group = self._get(work.worker, next(work.stream), "sampling")
                        work.left.pop(group.prompt.id, None)
                        yield group
                    elif time.monotonic() > work.late_at:
                        raise self._late(work.worker, "sampling")
                except StopIteration:
                    running.remove(work)
                    idle.append(work.worker)
                except WorkerError as error:
                    running.remove(work)
                    idle += self.replace([work.worker], error)
                    if work.left:
                        pieces.appendleft(list(work.left.values()))
        if num_restarts == self.num_restarts:
            self._failures_in_a_row = 0

    def generate_on_each(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[RolloutGroup]]:
        """Let every worker sample the same prompts; return its groups, in the order of the prompts, for each worker.

        Raises:
            WorkerError: as `generate`.
        """
        answers: dict[int, list[RolloutGroup]] = {}
        while waiting := [worker for worker in self.workers if worker.index not in answers]:
            for work in [self._start(worker, prompts, sampling) for worker in waiting]:
                try:
                    groups = {group.prompt.id: group for group in self._groups_of(work)}
                    answers[work.worker.index] = [groups[prompt.id] for prompt in prompts]
                except WorkerError as error:
                    self.replace([work.worker], error)
        return [answers[worker.index] for worker in self.workers]

    def _groups_of(self, work: _Running) -> Iterator[RolloutGroup]:
        while True:
            if not ray.wait([work.stream], timeout=max(0.0, work.late_at - time.monotonic()))[0]:
                raise self._late(work.worker, "sampling")
            try:
                ref = next(work.stream)
            except StopIteration:
                return
            yield self._get(work.worker, ref, "sampling")

    def replace(self, lost: Sequence[WorkerHandle], error: WorkerError) -> list[WorkerHandle]:
        """Start lost workers again and give them the current weights.

        Raises:
            WorkerError: `error`, when another worker would not help or did not help `max_restarts` times.
        """
        supervision = self._supervision
        while True:
            if supervision is None or not error.is_lost:
                raise error
            if self._failures_in_a_row >= supervision.max_restarts:
                raise WorkerError(
                    None,
                    f"{error}\nrollout.max_restarts={supervision.max_restarts} failures in a row before this one: the "
                    "engines were started again each time, and it did not help",
                    error.cause,
                )
            self._failures_in_a_row += 1
            self.num_restarts += len(lost)
            log.warning("%s; starting again (%s)", error, ", ".join(f"worker {worker.index}" for worker in lost))
            self._stop(lost)
            fresh = {worker.index: supervision.start(worker.index) for worker in lost}
            self.workers = [fresh.get(worker.index, worker) for worker in self.workers]
            lost = list(fresh.values())
            try:
                self._wait_for_all([worker.actor.ping.remote() for worker in lost], "starting again", lost)
                supervision.send(lost)
                return lost
            except WorkerError as again:
                error = again

    def sync(self, chunks: Iterable[Any], version: int, workers: Sequence[WorkerHandle] | None = None) -> None:
        """Copy weights to workers (None: all) and let them sample with `version`.

        Args:
            chunks: lists of (Hugging Face name, tensor), or Ray references to such lists, which the workers fetch
                without a copy in this process.

        Raises:
            WorkerError: a worker raised, died or was late.
        """
        workers = self.workers if workers is None else workers
        in_flight: deque[list[Any]] = deque()
        failure: WorkerError | None = None
        for chunk in chunks:
            if failure is not None:
                continue  # whoever makes the chunks gathers them from several ranks and must come to the end
            ref = chunk if isinstance(chunk, ray.ObjectRef) else ray.put(chunk)
            in_flight.append([worker.actor.load_weights.remote(ref) for worker in workers])
            try:
                if len(in_flight) >= SYNCS_IN_FLIGHT:
                    self._wait_for_all(in_flight.popleft(), "loading weights", workers)
            except WorkerError as error:
                failure = error
        if failure is not None:
            raise failure
        for calls in in_flight:
            self._wait_for_all(calls, "loading weights", workers)
        self._wait_for_all(
            [worker.actor.finish_weights.remote(version) for worker in workers], "finishing weights", workers
        )

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every engine, also while they sample; return one result per worker."""
        return self._wait_for_all([worker.actor.call.remote(method, args) for worker in self.workers], method)

    def ping(self) -> list[dict[str, Any]]:
        """Return what each worker says of itself (`RolloutWorker.ping`)."""
        return self._wait_for_all([worker.actor.ping.remote() for worker in self.workers], "answering a ping")

    def close(self) -> None:
        """Stop all workers; calling it twice is allowed."""
        self._stop(self.workers)

    def _stop(self, workers: Sequence[WorkerHandle]) -> None:
        """End engines with processes of their own in an orderly way, if they still can; then kill the workers."""
        closing = [worker.actor.close.remote() for worker in workers if worker.has_processes]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for worker in workers:
            ray.kill(worker.actor)

    def _pieces(self, prompts: Sequence[Prompt], group_size: int) -> list[Sequence[Prompt]]:
        """Cut the prompts into equal shares per worker, none over what its engine samples at once."""
        at_once = min(worker.max_batch_sequences for worker in self.workers) // group_size
        num_prompts = max(1, min(at_once, -(-len(prompts) // len(self.workers))))
        return [prompts[start : start + num_prompts] for start in range(0, len(prompts), num_prompts)]

    def _start(self, worker: WorkerHandle, piece: Sequence[Prompt], sampling: SamplingParams) -> _Running:
        stream = worker.actor.generate.options(num_returns="streaming").remote(piece, sampling)
        return _Running(worker, {prompt.id: prompt for prompt in piece}, stream, time.monotonic() + self.timeout_s)

    def _wait_for_all(self, refs: Sequence[Any], what: str, workers: Sequence[WorkerHandle] | None = None) -> list[Any]:
        """Return one result per worker, in their order."""
        late_at = time.monotonic() + self.timeout_s
        return [
            self._get(worker, ref, what, max(0.0, late_at - time.monotonic()))
            for worker, ref in zip(self.workers if workers is None else workers, refs, strict=True)
        ]

    def _get(self, worker: WorkerHandle, ref: Any, what: str, timeout_s: float | None = None) -> Any:
        try:
            return ray.get(ref, timeout=self.timeout_s if timeout_s is None else timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise self._late(worker, what) from None
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            # An error that a user can mend says all in its message; any other needs the remote traceback.
            said = cause if isinstance(cause, (EngineError, ConfigError)) else error
            is_lost = isinstance(cause, EngineFailed)
            raise WorkerError(worker.index, f"failed in {what}: {said}", cause, is_lost=is_lost) from None
        except ray.exceptions.RayActorError as error:
            raise WorkerError(worker.index, f"died in {what}: {error}", error, is_lost=True) from None

    def _late(self, worker: WorkerHandle, what: str) -> WorkerError:
        message = f"took longer than rollout.timeout_s={self.timeout_s:g} s for {what}"
        return WorkerError(worker.index, message, is_lost=True)
