"""All ranks of one role, called together: results, streams, and the first failure of any of them.

Knows Ray's references and nothing of what a rank computes; where ranks run is `rsgrpo.cluster.ray_cluster`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from rollout.worker import FolderMissing
from rsgrpo.errors import RsgrpoError

POLL_S = 0.5
"""How often a wait looks up: for a request to stop, for a worker that died."""


class WorkerFailed(RsgrpoError):
    """A worker raised or died; names its role and rank, and the cause."""


class Ranks:
    """All ranks of the learner or of the reference, called together."""

    def __init__(self, role: str, actors: Sequence[Any], check_stop: Callable[[], None]) -> None:
        self.role = role
        self.actors = actors
        self.check_stop = check_stop

    def call(self, method: str, *args: Any, stoppable: bool = False) -> Any:
        """Run a learner method on every rank at once and return rank 0's result.

        Raises:
            WorkerFailed: as soon as any rank fails, without waiting for the others: they may wait for it forever.
        """
        return self.wait(self.submit(method, *args), method, stoppable)

    def submit(self, method: str, *args: Any) -> list[Any]:
        """Begin a learner method on every rank; return what `wait` takes."""
        shared = [ray.put(arg) for arg in args]
        return [actor.call.remote(method, *shared) for actor in self.actors]

    def wait(self, refs: Sequence[Any], what: str, stoppable: bool = False) -> Any:
        """Wait for one result per rank; return rank 0's."""
        rank_of = {ref: rank for rank, ref in enumerate(refs)}
        pending = list(refs)
        while pending:
            done, pending = ray.wait(pending, timeout=POLL_S)
            for ref in done:
                self._get(ref, rank_of[ref], what)
            if stoppable:
                self.check_stop()
        return self._get(refs[0], 0, what)

    def stream(self, method: str, *args: Any) -> Iterator[Any]:
        """Begin a generator method on every rank; yield references to what rank 0 produces."""
        generators = [getattr(actor, method).options(num_returns="streaming").remote(*args) for actor in self.actors]
        return self._drain(generators, method)

    def _drain(self, generators: Sequence[Any], method: str) -> Iterator[Any]:
        finished = {generator.completed(): rank for rank, generator in enumerate(generators)}
        while True:
            ready, _ = ray.wait([generators[0]], timeout=POLL_S)
            for ref in ray.wait(list(finished), num_returns=len(finished), timeout=0)[0]:
                self._get(ref, finished[ref], method)
            if ready:
                try:
                    yield next(generators[0])
                except StopIteration:
                    break
        self.wait(list(finished), method)

    def _get(self, ref: Any, rank: int, what: str) -> Any:
        try:
            return ray.get(ref)
        except ray.exceptions.RayError as error:
            raise WorkerFailed(describe_failure(self.role, rank, what, error)) from None


def describe_failure(role: str, rank: int, what: str, error: BaseException) -> str:
    """Return one message with role, rank and cause; the remote traceback only where the cause is not a user's error."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, RsgrpoError | FolderMissing):
        return f"{role} {rank} failed in {what}: {cause}"
    return f"{role} {rank} failed in {what}: {type(cause).__name__}\n{str(error).strip()}"
