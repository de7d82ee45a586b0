"""The pool of rollout workers: spreads whole groups over them and restarts a worker that is lost."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import ray

from rollout.config import VLLM_SHARES
from rollout.engine import NextShare, Share, shares
from rollout.types import Prompt, RolloutGroup, SamplingParams
from rollout.worker import WorkerError, WorkerHandle, worker_error

log = logging.getLogger(__name__)

POLL_S = 0.5
"""Interval at which a wait checks for a request to stop and for late workers."""
SYNCS_IN_FLIGHT = 2
"""Chunks of weights in flight at once: one is copied while the next travels."""
CLOSE_TIMEOUT_S = 10.0
"""Time that a worker has to stop its engine's processes before it is killed."""


@dataclass(frozen=True, slots=True)
class Supervision:
    """How lost workers are replaced.

    start: starts the worker of an index, as at the beginning. send: gives workers the current weights; raises
    WorkerError. max_restarts: consecutive failures tolerated; a batch that succeeds resets the count.
    """

    start: Callable[[int], WorkerHandle]
    send: Callable[[Sequence[WorkerHandle]], None]
    max_restarts: int


@dataclass(frozen=True, slots=True)
class _Running:
    """A share of work in progress: who has it, the prompts left, and when it is late (monotonic seconds)."""

    worker: WorkerHandle
    left: dict[str, Prompt]
    sampling: SamplingParams
    stream: Any
    late_at: float
    ticket: int


class RolloutPool:
    """Spreads whole groups over workers: a prompt stays on one engine, the least busy worker takes the next share."""

    def __init__(
        self, workers: Sequence[WorkerHandle], *, timeout_s: float = 3600.0, supervision: Supervision | None = None
    ) -> None:
        """Take workers that have been started.

        timeout_s: limit of one share of work of one worker, start-up included.
        supervision: None lets any failure end the work.
        """
        assert workers, "a pool needs a worker"
        self.workers = list(workers)
        self.timeout_s = timeout_s
        self.num_restarts = 0
        self._supervision = supervision
        self._failures_in_a_row = 0
        self._tickets = count()

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, check: Callable[[], None] | None = None
    ) -> Iterator[RolloutGroup]:
        """Yield one group per prompt, in any order, as they finish.

        The prompts are always cut into the same shares, so that results do not depend on which worker is faster.

        Raises:
            WorkerError: as `stream`.
        """
        at_once = min(worker.max_batch_sequences for worker in self.workers)
        pieces = iter(shares(prompts, sampling.group_size, at_once, len(self.workers)))
        groups = self.stream(lambda: next(((piece, sampling) for piece in pieces), None), check=check)
        yield from (group for group in groups if group is not None)

    def stream(
        self,
        next_share: NextShare,
        *,
        also: Callable[[], Sequence[Any]] = tuple,
        check: Callable[[], None] | None = None,
    ) -> Iterator[RolloutGroup | None]:
        """Yield the groups of every share that there is, in any order; a worker is given one as soon as it has room.

        What a lost worker had not finished is sampled again. Closing the iterator abandons what is still running.

        Args:
            also: references whose arrival the caller waits for as well. None is yielded after every wait.
            check: called while waiting; raises to give up.

        Raises:
            WorkerError: a worker raised, or was lost too often; names the worker and the cause.
        """
        again: deque[Share] = deque()
        running: list[_Running] = []
        num_restarts = self.num_restarts
        try:
            while True:
                self._hand_out(running, again, next_share)
                waited = [*(work.stream for work in running), *also()]
                if not waited:
                    break
                ready = ray.wait(waited, num_returns=1, timeout=POLL_S)[0]
                if check is not None:
                    check()
                groups = [self._receive(work, work.stream in ready, running, again) for work in list(running)]
                yield from [group for group in groups if group is not None]
                yield None
        finally:
            for worker in self.workers:
                tickets = [work.ticket for work in running if work.worker == worker]
                if tickets:
                    worker.actor.abandon.remote(max(tickets))
        if num_restarts == self.num_restarts:
            self._failures_in_a_row = 0

    def _receive(
        self, work: _Running, is_ready: bool, running: list[_Running], again: deque[Share]
    ) -> RolloutGroup | None:
        """Take what a share in progress has ready, or end it: it is done, or its worker is lost."""
        try:
            if is_ready:
                group: RolloutGroup = self._get(work.worker, next(work.stream), "sampling")
                return replace(group, prompt=work.left.pop(group.prompt.id))
            if time.monotonic() > work.late_at:
                raise self._late(work.worker, "sampling")
        except StopIteration:
            running.remove(work)
        except WorkerError as error:
            running.remove(work)
            if work.worker in self.workers:  # else another of its shares has told already
                self.replace([work.worker], error)
            if work.left:
                again.append((list(work.left.values()), work.sampling))
        return None

    def _hand_out(self, running: list[_Running], again: deque[Share], next_share: NextShare) -> None:
        """Give shares to workers with room, the least busy first, until there is no share or no room."""
        sequences = Counter({worker.index: 0 for worker in self.workers})
        for work in running:
            sequences[work.worker.index] += len(work.left) * work.sampling.group_size
        num_shares = Counter(work.worker.index for work in running)
        while True:
            free = [
                worker
                for worker in self.workers
                if not num_shares[worker.index]
                or (num_shares[worker.index] < VLLM_SHARES and sequences[worker.index] < worker.max_sequences)
            ]
            share = (again.popleft() if again else next_share()) if free else None
            if share is None:
                return
            worker = min(free, key=lambda worker: (sequences[worker.index], worker.index))
            running.append(self._start(worker, *share))
            num_shares[worker.index] += 1
            sequences[worker.index] += len(share[0]) * share[1].group_size

    def generate_on_each(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[RolloutGroup]]:
        """Let every worker sample the same prompts; return each worker's groups in the order of the prompts.

        Raises:
            WorkerError: as `generate`.
        """
        answers: dict[int, list[RolloutGroup]] = {}
        while waiting := [worker for worker in self.workers if worker.index not in answers]:
            for work in [self._start(worker, prompts, sampling) for worker in waiting]:
                try:
                    if not ray.wait([work.stream.completed()], timeout=max(0.0, work.late_at - time.monotonic()))[0]:
                        raise self._late(work.worker, "sampling")
                    groups = [self._get(work.worker, ref, "sampling") for ref in work.stream]
                    by_id = {group.prompt.id: replace(group, prompt=work.left[group.prompt.id]) for group in groups}
                    answers[work.worker.index] = [by_id[prompt.id] for prompt in prompts]
                except WorkerError as error:
                    self.replace([work.worker], error)
        return [answers[worker.index] for worker in self.workers]

    def replace(self, lost: Sequence[WorkerHandle], error: WorkerError) -> list[WorkerHandle]:
        """Restart lost workers and give them the current weights.

        Raises:
            WorkerError: `error`, if a restart cannot help or has failed `max_restarts` times.
        """
        supervision = self._supervision
        while True:
            if supervision is None or not error.is_lost:
                raise error
            if self._failures_in_a_row >= supervision.max_restarts:
                raise WorkerError(
                    f"{error}\nThis is consecutive failure {supervision.max_restarts + 1}, and rollout.max_restarts is "
                    f"{supervision.max_restarts}: restarting the engines did not help.",
                    error.cause,
                )
            self._failures_in_a_row += 1
            self.num_restarts += len(lost)
            log.warning("%s; restarting %s", error, ", ".join(f"worker {worker.index}" for worker in lost))
            self._stop(lost)
            fresh = {worker.index: supervision.start(worker.index) for worker in lost}
            self.workers = [fresh.get(worker.index, worker) for worker in self.workers]
            lost = list(fresh.values())
            try:
                self._wait_for_all([worker.actor.ping.remote() for worker in lost], "restarting", lost)
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
                continue  # several ranks gather the chunks and must all reach the end
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

    def count_vision(self, prompts: Sequence[Prompt]) -> list[list[tuple[int, int, int]]]:
        """Return `Engine.count_vision` of each worker."""
        return self._call("count_vision", list(prompts))

    def stats(self) -> list[dict[str, float]]:
        """Return `Engine.stats` of each worker, also while they sample."""
        return self._call("stats")

    def sleep(self) -> None:
        """Let engines on a learner's devices release memory; those that fail are replaced."""
        self._call_or_replace("sleep")

    def wake(self, part: str) -> None:
        """Give sleeping engines back "weights" or "kv_cache"; those that fail are replaced."""
        self._call_or_replace("wake", [part])

    def _call_or_replace(self, method: str, *args: Any) -> None:
        try:
            self._call(method, *args)
        except WorkerError as error:
            self.replace(self.workers, error)

    def _call(self, method: str, *args: Any) -> list[Any]:
        return self._wait_for_all([worker.actor.call.remote(method, args) for worker in self.workers], method)

    def ping(self) -> list[dict[str, Any]]:
        """Return each worker's description of itself (`RolloutWorker.ping`)."""
        return self._wait_for_all([worker.actor.ping.remote() for worker in self.workers], "answering a ping")

    def close(self) -> None:
        """Stop all workers; calling it twice is allowed."""
        self._stop(self.workers)

    def _stop(self, workers: Sequence[WorkerHandle]) -> None:
        """Let engines stop their own processes if they still can; then kill the workers."""
        closing = [worker.actor.close.remote() for worker in workers if worker.has_processes]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for worker in workers:
            ray.kill(worker.actor)

    def _start(self, worker: WorkerHandle, piece: Sequence[Prompt], sampling: SamplingParams) -> _Running:
        ticket, late_at = next(self._tickets), time.monotonic() + self.timeout_s
        stream = worker.actor.generate.options(num_returns="streaming").remote(piece, sampling, ticket)
        return _Running(worker, {prompt.id: prompt for prompt in piece}, sampling, stream, late_at, ticket)

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
        except ray.exceptions.RayError as error:
            raise worker_error(f"rollout worker {worker.index}", what, error, replaceable=True) from None

    def _late(self, worker: WorkerHandle, what: str) -> WorkerError:
        message = f"rollout worker {worker.index} took longer than rollout.timeout_s={self.timeout_s:g} s for {what}"
        return WorkerError(message, is_lost=True)
