"""The reward workers: groups are scored one beside the other, and a worker that dies is replaced."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ray

from rollout.types import RolloutGroup
from rollout.workers.worker import WorkerError, worker_error
from rsgrpo.cluster.deadline import Deadline
from rsgrpo.types import ScoredGroup

log = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""Consecutive deaths of reward workers tolerated; a group that is scored resets the count."""
ANSWER_TIMEOUT_S = 60.0
REMIND_S = 300.0
"""How long no group is finished before the log says what is being scored."""


class RewardPool:
    """Processes that run reward functions. They keep nothing, so another in its place does the same.

    num_restarts: of workers so far.
    """

    def __init__(
        self,
        start: Callable[[int], tuple[Any, Any]],
        num_workers: int,
        *,
        start_timeout_s: float,
        where: Callable[[], str] = lambda: "scoring",
    ) -> None:
        """Start the workers.

        start: starts the worker of an index; returns its actor and the call that loads its reward functions.
        start_timeout_s: limit of the start of one that replaces another.
        where: tells the step of the run, for messages.
        """
        self._start, self._where = start, where
        self._workers = [start(index) for index in range(num_workers)]
        self._start_timeout_s = start_timeout_s
        self._failures_in_a_row = 0
        self._next = 0
        self.num_restarts = 0

    def wait(self, deadline: Deadline) -> None:
        """Wait until all have loaded their reward functions.

        Raises:
            WorkerError: one of them cannot.
            RsgrpoError: `deadline` has passed.
        """
        for index, (_, loading) in enumerate(self._workers):
            try:
                self._get(loading, index, "loading the reward functions", deadline.left_s)
            except ray.exceptions.GetTimeoutError:
                raise deadline.missed(f"reward worker {index}", "loading the reward functions") from None

    def named(self) -> dict[str, Any]:
        """Return the actors by the names that errors use."""
        return {f"reward worker {index}": actor for index, (actor, _) in enumerate(self._workers)}

    def batch(self) -> ScoringBatch:
        """Return a place for groups that are scored together."""
        return ScoringBatch(self)

    def submit(self, group: RolloutGroup) -> tuple[Any, int, Any]:
        """Let the next worker score a group; return the call, the worker's index and its actor."""
        index = self._next
        self._next = (index + 1) % len(self._workers)
        actor = self._workers[index][0]
        return actor.score.remote([group]), index, actor

    def result(self, call: Any, index: int, actor: Any, group: RolloutGroup) -> list[ScoredGroup] | None:
        """Return what a finished call gave, or None if its worker died; another is in its place then.

        Raises:
            WorkerError: a reward failed, or workers died too often.
        """
        try:
            scored: list[ScoredGroup] = self._get(call, index, "score")
        except WorkerError as error:
            if not error.is_lost:
                raise
            if self._workers[index][0] == actor:  # else another of its groups has brought the new one already
                self._replace(index, group, error)
            return None
        self._failures_in_a_row = 0
        return [replace(one, group=group) for one in scored]  # it came back without prompt and rollouts

    def memory_mb(self) -> float:
        """Return the resident memory of the workers that answer, in MiB."""
        calls = [actor.rss_mb.remote() for actor, _ in self._workers]
        total = 0.0
        for call in ray.wait(calls, num_returns=len(calls), timeout=ANSWER_TIMEOUT_S)[0]:
            try:
                total += self._get(call, calls.index(call), "rss_mb")
            except WorkerError as error:
                log.debug("%s; it is replaced when it is next needed", error)
        return total

    def _replace(self, index: int, group: RolloutGroup, error: WorkerError) -> None:
        if self._failures_in_a_row >= MAX_RESTARTS:
            raise WorkerError(
                f"{error}\nThis is consecutive death {MAX_RESTARTS + 1} of a reward worker; the last was scoring the "
                f"responses to prompt {group.prompt.id!r}. Run `python -m rewards` on them to find the faulty reward.",
                error.cause,
            )
        self._failures_in_a_row += 1
        self.num_restarts += 1
        log.warning("%s: %s; restarting it", self._where(), error)
        ray.kill(self._workers[index][0])
        self._workers[index] = self._start(index)
        try:
            self._get(self._workers[index][1], index, "loading the reward functions", self._start_timeout_s)
        except ray.exceptions.GetTimeoutError:
            limit = f"{self._start_timeout_s:g} s"
            raise WorkerError(f"reward worker {index} was not up again within {limit}", error.cause) from None

    def _get(self, call: Any, index: int, what: str, timeout_s: float | None = None) -> Any:
        try:
            return ray.get(call, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise
        except ray.exceptions.RayError as error:
            raise worker_error(f"reward worker {index}", what, error, replaceable=True) from None


class ScoringBatch:
    """Groups that are being scored."""

    def __init__(self, pool: RewardPool) -> None:
        self._pool = pool
        self._calls: dict[Any, tuple[int, Any, RolloutGroup]] = {}
        self._quiet_since = time.monotonic()

    def __bool__(self) -> bool:
        return bool(self._calls)

    def calls(self) -> list[Any]:
        """Return Ray's references to what is being scored."""
        return list(self._calls)

    def add(self, group: RolloutGroup) -> None:
        """Begin to score a group."""
        call, index, actor = self._pool.submit(group)
        if not self._calls:
            self._quiet_since = time.monotonic()
        self._calls[call] = (index, actor, group)

    def scored(self, timeout_s: float) -> Iterator[ScoredGroup]:
        """Yield the groups that are finished within `timeout_s`; those of a worker that died are scored again."""
        calls = self.calls()
        self._remind()
        for call in ray.wait(calls, num_returns=len(calls), timeout=timeout_s)[0] if calls else ():
            self._quiet_since = time.monotonic()
            index, actor, group = self._calls.pop(call)
            found = self._pool.result(call, index, actor, group)
            if found is None:
                self.add(group)
            else:
                yield from found

    def _remind(self) -> None:
        """Say what is being scored where nothing has been finished for long: a reward may never return."""
        quiet_s = time.monotonic() - self._quiet_since
        if self._calls and quiet_s > REMIND_S:
            index, _, group = next(iter(self._calls.values()))
            log.warning(
                "no group has been scored for %.0f s: reward worker %d has the responses to prompt %r, and %d more "
                "groups wait. A reward without a time limit may never return: set reward_timeouts_s.NAME",
                quiet_s,
                index,
                group.prompt.id,
                len(self._calls) - 1,
            )
            self._quiet_since = time.monotonic()
