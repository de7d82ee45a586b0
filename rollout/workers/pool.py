"""The pool of rollout workers: spreads whole groups over them, and calls all of them."""

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
from rollout.workers.crew import POLL_S, Crew, Supervision
from rollout.workers.worker import WorkerError, WorkerHandle

log = logging.getLogger(__name__)

SYNCS_IN_FLIGHT = 2
"""Chunks of weights in flight at once: one is copied while the next travels."""
ANSWER_TIMEOUT_S = 60.0
"""Time that a worker has to describe itself; one that is silent is found out when it is next needed."""


@dataclass(frozen=True, slots=True)
class _Running:
    """A share of work in progress: who has it, the prompts left, and when it is late (monotonic seconds)."""

    worker: WorkerHandle
    left: dict[str, Prompt]
    sampling: SamplingParams
    stream: Any
    late_at: float
    ticket: int


class RolloutPool(Crew):
    """Spreads whole groups over workers: a prompt stays on one engine, the least busy worker takes the next share."""

    def __init__(
        self, workers: Sequence[WorkerHandle], *, timeout_s: float = 3600.0, supervision: Supervision | None = None
    ) -> None:
        super().__init__(workers, timeout_s=timeout_s, supervision=supervision)
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
        pieces = iter(shares(prompts, sampling.group_size, at_once, self.num_workers))
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
            with self.changing:
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

    def sleep(self) -> None:
        """Let engines on a learner's devices release memory."""
        self._call("sleep")

    def wake(self, part: str) -> None:
        """Give sleeping engines back "weights" or "kv_cache"."""
        self._call("wake", [part])

    def _call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every engine; one that is lost is replaced and called again."""
        answers: dict[int, Any] = {}
        while waiting := [worker for worker in self.workers if worker.index not in answers]:
            late_at = time.monotonic() + self.timeout_s
            refs = [worker.actor.call.remote(method, args) for worker in waiting]
            for worker, ref in zip(waiting, refs, strict=True):
                try:
                    answers[worker.index] = self._get(worker, ref, method, max(0.0, late_at - time.monotonic()))
                except WorkerError as error:
                    self.replace([worker], error)
        return [answers[worker.index] for worker in self.workers]

    def stats(self) -> list[dict[str, float]]:
        """Return `Engine.stats` of each worker that answers, also while they sample."""
        return self._answers([worker.actor.call.remote("stats", ()) for worker in self.workers], "stats")

    def memory_mb(self) -> float:
        """Return the resident memory of all workers that answer, in MiB."""
        answers = self._answers([worker.actor.ping.remote() for worker in self.workers], "ping")
        return float(sum(answer["rss_mb"] for answer in answers))

    def _answers(self, refs: Sequence[Any], what: str) -> list[Any]:
        answers = []
        late_at = time.monotonic() + ANSWER_TIMEOUT_S
        for worker, ref in zip(self.workers, refs, strict=True):
            try:
                answers.append(self._get(worker, ref, what, max(0.0, late_at - time.monotonic())))
            except WorkerError as error:
                if not error.is_lost:
                    raise
                log.debug("%s; it is replaced when it is next needed", error)
        return answers

    def _start(self, worker: WorkerHandle, piece: Sequence[Prompt], sampling: SamplingParams) -> _Running:
        ticket, late_at = next(self._tickets), time.monotonic() + self.timeout_s
        stream = worker.actor.generate.options(num_returns="streaming").remote(piece, sampling, ticket)
        return _Running(worker, {prompt.id: prompt for prompt in piece}, sampling, stream, late_at, ticket)
