"""Workers that outlive losses: one that is lost is replaced, one whose node is gone is left out until it is back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from rollout.workers.worker import WorkerError, WorkerHandle, worker_error

log = logging.getLogger(__name__)

POLL_S = 0.5
"""Interval at which a wait checks for a request to stop and for late workers."""
CLOSE_TIMEOUT_S = 10.0
"""Time that a worker has to stop its engine's processes before it is killed."""
NODE_NOTICE_S = 20.0
"""Time in which Ray notices that a node is gone; until then it starts workers there, which die at once."""


@dataclass(frozen=True, slots=True)
class Supervision:
    """How lost workers are replaced.

    start: starts the worker of an index, as at the beginning. send: gives workers the current weights; raises
    WorkerError. max_restarts: consecutive failures tolerated; a batch that succeeds resets the count. has_room: tells
    whether a living node has the resources of a worker. start_timeout_s: limit of one start. where: tells the step of
    the run, for messages.
    """

    start: Callable[[int], WorkerHandle]
    send: Callable[[Sequence[WorkerHandle]], None]
    max_restarts: int
    has_room: Callable[[int], bool] = lambda index: True
    start_timeout_s: float = 3600.0
    where: Callable[[], str] = lambda: "rollout"


class Crew:
    """Rollout workers with their supervision.

    workers: those that work. num_workers: all, including those whose node is gone. num_restarts: of workers so far.
    changing: held by the thread that replaces workers or changes their weights.
    """

    def __init__(
        self, workers: Sequence[WorkerHandle], *, timeout_s: float = 3600.0, supervision: Supervision | None = None
    ) -> None:
        """Take workers that have been started.

        timeout_s: limit of one share of work of one worker, start-up included.
        supervision: None lets any failure end the work.
        """
        assert workers, "a crew needs a worker"
        self.workers = list(workers)
        self.num_workers = len(workers)
        self.timeout_s = timeout_s
        self.num_restarts = 0
        self._supervision = supervision
        self._failures_in_a_row = self._restarts_of_last_step = 0
        self.changing = threading.RLock()  # who replaces workers, or changes their weights, while others sample
        self._away: dict[int, tuple[WorkerHandle, Any] | None] = {}  # index -> once its node is back: worker, its ping

    def replace(self, lost: Sequence[WorkerHandle], error: WorkerError) -> list[WorkerHandle]:
        """Restart lost workers and give them the current weights; those whose node is gone are left out.

        Returns:
            The workers that were restarted: all, some or none.

        Raises:
            WorkerError: `error`, if a restart cannot help or has failed `max_restarts` times, or no node is left.
        """
        while True:
            supervision = self._give_up(lost, error)
            indices = [worker.index for worker in lost]
            lost = []
            try:
                lost = self._start_again(supervision, indices, error)
                self._wait_until_up(supervision, lost)
                if lost:
                    supervision.send(lost)
                if self.workers:
                    return lost
            except WorkerError as again:
                error = again

    def step_ended(self) -> None:
        """Forget earlier failures if this step had none; where one batch of work goes over into the next."""
        if self.num_restarts == self._restarts_of_last_step:
            self._failures_in_a_row = 0
        self._restarts_of_last_step = self.num_restarts

    def _give_up(self, lost: Sequence[WorkerHandle], error: WorkerError) -> Supervision:
        """Stop lost workers; raise `error` if a restart cannot help. Losing a node is not a failure of an engine."""
        supervision = self._supervision
        if supervision is None or not error.is_lost:
            raise error
        stays = any(supervision.has_room(worker.index) for worker in lost)
        if stays and self._failures_in_a_row >= supervision.max_restarts:
            raise WorkerError(
                f"{error}\nThis is consecutive failure {supervision.max_restarts + 1}, and rollout.max_restarts is "
                f"{supervision.max_restarts}: restarting the engines did not help.",
                error.cause,
            )
        self._failures_in_a_row += stays
        names = ", ".join(f"worker {worker.index}" for worker in lost)
        done = "restarting" if stays else "no node is left for"
        log.warning("%s: %s; %s %s", supervision.where(), error, done, names)
        self._stop(lost)
        gone = {worker.index for worker in lost}
        self.workers = [worker for worker in self.workers if worker.index not in gone]
        return supervision

    def _start_again(self, supervision: Supervision, indices: Sequence[int], error: WorkerError) -> list[WorkerHandle]:
        """Start workers where there is room; the others are away."""
        self._away |= dict.fromkeys(indices)
        late_at = time.monotonic() + supervision.start_timeout_s
        while not (ready := [index for index in self._away if supervision.has_room(index)]) and not self.workers:
            if time.monotonic() > late_at:
                limit = f"{supervision.start_timeout_s:g} s"
                raise WorkerError(
                    f"{error}\nNo engine is left, and for {limit} no node has had room for one.", error.cause
                )
            time.sleep(POLL_S)
        fresh = []
        for index in ready:
            if index in indices or not self.workers:
                started = self._away.pop(index)
                fresh.append(supervision.start(index) if started is None else started[0])
                self.num_restarts += started is None
        self.workers = sorted([*self.workers, *fresh], key=lambda worker: worker.index)
        return fresh

    def _wait_until_up(self, supervision: Supervision, fresh: list[WorkerHandle]) -> None:
        """Wait until each has built its engine; remove those whose node goes meanwhile."""
        late_at = time.monotonic() + supervision.start_timeout_s
        pings = {worker.actor.ping.remote(): worker for worker in fresh}
        while pings:
            for ref in ray.wait(list(pings), num_returns=1, timeout=POLL_S)[0]:
                worker = pings.pop(ref)
                try:
                    self._get(worker, ref, "starting")
                except WorkerError as error:
                    if not error.died or self._keeps_its_node(supervision, worker):
                        raise
                    self._leave_out(worker, fresh)
            for ref, worker in list(pings.items()):
                if not supervision.has_room(worker.index):
                    del pings[ref]
                    self._leave_out(worker, fresh)
                elif time.monotonic() > late_at:
                    limit = f"{supervision.start_timeout_s:g} s"
                    raise WorkerError(f"rollout worker {worker.index} was not up within {limit}", is_lost=True)

    def _keeps_its_node(self, supervision: Supervision, worker: WorkerHandle) -> bool:
        late_at = time.monotonic() + NODE_NOTICE_S
        while (keeps := supervision.has_room(worker.index)) and time.monotonic() < late_at:
            time.sleep(POLL_S)
        return keeps

    def _leave_out(self, worker: WorkerHandle, fresh: list[WorkerHandle]) -> None:
        """Go on without a worker that was started on a node that is gone."""
        ray.kill(worker.actor)
        fresh.remove(worker)
        self.workers.remove(worker)
        self._away[worker.index] = None
        self._failures_in_a_row = max(0, self._failures_in_a_row - 1)  # it was the node, not the engine
        self.num_restarts -= 1
        log.warning("no node is left for worker %d; the others go on without it", worker.index)

    def take_back(self) -> list[int]:
        """Let workers whose node is back join, for the next `sync`; they start while the others work.

        Returns:
            Indices of those that joined.
        """
        joined = []
        for index, started in list(self._away.items()):
            assert self._supervision is not None
            if started is None and self._supervision.has_room(index):
                log.warning("there is room for rollout worker %d again; it starts", index)
                worker = self._supervision.start(index)
                self.num_restarts += 1
                self._away[index] = (worker, worker.actor.ping.remote())
            elif started is not None and ray.wait([started[1]], timeout=0)[0]:
                try:
                    self._get(*started, "starting")
                    self.workers = sorted([*self.workers, started[0]], key=lambda worker: worker.index)
                    del self._away[index]
                    joined.append(index)
                except WorkerError as error:
                    log.warning("%s; it is started again", error)
                    ray.kill(started[0].actor)
                    self._away[index] = None
        return joined

    def start(self, timeout_s: float) -> dict[str, Any]:
        """Wait until every engine is up; one that is lost is started again. Return a worker's description of itself.

        Raises:
            TimeoutError: names the workers that are not up after `timeout_s`.
            WorkerError: an engine cannot start.
        """
        late_at = time.monotonic() + timeout_s
        pings = {worker.actor.ping.remote(): worker for worker in self.workers}
        while pings:
            ready = ray.wait(list(pings), num_returns=1, timeout=POLL_S)[0]
            for ref in ready:
                worker = pings.pop(ref)
                try:
                    described = self._get(worker, ref, "starting")
                except WorkerError as error:
                    fresh = self._start_again(self._give_up([worker], error), [worker.index], error)
                    pings |= {again.actor.ping.remote(): again for again in fresh}
            if pings and time.monotonic() > late_at:
                raise TimeoutError(", ".join(f"rollout worker {worker.index}" for worker in pings.values()))
        self._failures_in_a_row = 0
        return dict(described)

    def ping(self) -> list[dict[str, Any]]:
        """Return each worker's description of itself (`RolloutWorker.ping`)."""
        return self._wait_for_all([worker.actor.ping.remote() for worker in self.workers], "answering a ping")

    def close(self) -> None:
        """Stop all workers; calling it twice is allowed. Whoever still samples is told so by an error."""
        self._supervision = None  # a thread that samples ahead must start none of them again
        self._stop(self.workers)

    def _stop(self, workers: Sequence[WorkerHandle]) -> None:
        """Let engines stop their own processes if they still can; then kill the workers."""
        closing = [worker.actor.close.remote() for worker in workers if worker.has_processes]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for worker in workers:
            ray.kill(worker.actor)

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
