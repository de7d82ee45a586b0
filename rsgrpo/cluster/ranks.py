"""All ranks of one role as Ray actors, called together: results, streams, and the first failure of any of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rollout.config import Dtype, RolloutConfig
from rollout.types import Prompt
from rollout.workers.worker import WorkerError, WorkerHandle, worker_error
from rsgrpo.cluster.deadline import Deadline
from rsgrpo.cluster.workers import LearnerMethod
from rsgrpo.types import TrainGroup

POLL_S = 0.5
"""How often a wait looks up: for a request to stop, for a worker that died."""

DEATH_NOTICE_S = 5.0
"""Time in which Ray reports a dead process, after those that were connected to it have failed."""


class Ranks:
    """Actors of one role that work together: where one fails, the others may wait for it forever.

    doing: what is waited for now, or "".
    """

    def __init__(self, role: str, actors: Sequence[Any], check_stop: Callable[[], None]) -> None:
        self.role = role
        self.actors = actors
        self.check_stop = check_stop
        self.doing = ""

    def named(self) -> Mapping[str, Any]:
        """Return the actors by the names that errors use."""
        return {f"{self.role} {rank}": actor for rank, actor in enumerate(self.actors)}

    def wait(self, refs: Sequence[Any], what: str, *, stoppable: bool = False) -> Any:
        """Wait for one result per rank; return rank 0's.

        Raises:
            WorkerError: as soon as any rank fails, without waiting for the others.
        """
        return self.wait_for_all(refs, what, stoppable=stoppable)[0]

    def wait_for_all(
        self, refs: Sequence[Any], what: str, *, stoppable: bool = False, deadline: Deadline | None = None
    ) -> list[Any]:
        """Wait for one result per rank; return all of them.

        Raises:
            WorkerError: any rank failed. The others are not waited for, except to see whether one of them has died.
            RsgrpoError: `deadline` has passed.
        """
        rank_of = {ref: rank for rank, ref in enumerate(refs)}
        pending = list(refs)
        self.doing = what
        while pending:
            done, pending = ray.wait(pending, timeout=POLL_S)
            for ref in done:
                try:
                    self.get(ref, rank_of[ref], what)
                except WorkerError as error:
                    death = None if error.died else self._death({r: rank_of[r] for r in pending}, what)
                    raise death or error from None
            if stoppable:
                self.check_stop()
            if pending and deadline is not None and not deadline.left_s:
                late = ", ".join(str(rank_of[ref]) for ref in pending)
                raise deadline.missed(f"{self.role} {late}", what)
        self.doing = ""
        return [self.get(ref, rank, what) for rank, ref in enumerate(refs)]

    def _death(self, pending: Mapping[Any, int], what: str) -> WorkerError | None:
        """Return the error of a rank that died: the others only see that a connection was closed, and see it first."""
        for ref in ray.wait(list(pending), num_returns=len(pending), timeout=DEATH_NOTICE_S)[0] if pending else ():
            try:
                self.get(ref, pending[ref], what)
            except WorkerError as error:
                if error.died:
                    return error
        return None

    def get(self, ref: Any, rank: int, what: str) -> Any:
        """Return what one rank has finished."""
        try:
            return ray.get(ref)
        except ray.exceptions.RayError as error:
            raise worker_error(f"{self.role} {rank}", what, error) from None


class RayLearner(Ranks):
    """The learner's ranks (or the reference's) behind the typed calls of `rsgrpo.cluster.protocol.LearnerRanks`.

    Calls may come from two threads. They reach all ranks in the same order, as their collectives need it.

    version: of the weights once every call that has been submitted is done.
    """

    def __init__(self, role: str, actors: Sequence[Any], check_stop: Callable[[], None]) -> None:
        super().__init__(role, actors, check_stop)
        self.version = 0
        self._submitting = threading.Lock()

    def update(
        self, groups: Sequence[TrainGroup], loss_weights_K: Sequence[float], version: int | None = None
    ) -> dict[str, float]:
        """Take the optimiser steps of one batch; `version` is that of the weights afterwards, None the next one."""
        with self._submitting:
            self.version = self.version + 1 if version is None else version
            refs = self._submit("update", groups, loss_weights_K)
        metrics: dict[str, float] = self.wait(refs, "update")
        return metrics

    def supervised_update(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Take one optimiser step on the mean negative log-likelihood per response token."""
        metrics: dict[str, float] = self._call("supervised_update", groups)
        return metrics

    def supervised_loss(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Return the metrics of `supervised_update` without learning from the groups."""
        metrics: dict[str, float] = self._call("supervised_loss", groups)
        return metrics

    def logprobs(
        self, groups: Sequence[TrainGroup], reference: bool = False, temperature: float | None = None
    ) -> list[list[np.ndarray]]:
        """Return (T,) float32 log-probabilities of every response; gives up when the run is asked to stop."""
        found: list[list[np.ndarray]] = self._call("logprobs", groups, reference, temperature, stoppable=True)
        return found

    def count_vision(self, prompts: Sequence[Prompt]) -> list[tuple[int, int, int]]:
        """Return, for each prompt, (tokens, image tokens among them, image features)."""
        counts: list[tuple[int, int, int]] = self._call("count_vision", prompts)
        return counts

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        """Begin to decode images that a later update will need; returns at once."""
        with self._submitting:
            self._submit("prefetch", prompts)

    def begin_save(self, folder: Path) -> None:
        """Begin to write the state that `load` reads, on any number of ranks; further calls do not change it."""
        self._call("begin_save", folder)

    def is_saved(self) -> bool:
        """Return whether it has been written; raise why it could not be."""
        saved: bool = self._call("is_saved")  # rank 0 is done once all ranks are
        return saved

    def load(self, folder: Path) -> None:
        """Continue exactly where `begin_save` was called."""
        self._call("load", folder)

    def export(self, folder: Path, dtype: Dtype) -> None:
        """Write a Hugging Face folder with tokenizer and processor."""
        self._call("export", folder, dtype)

    def memory_mb(self) -> float:
        """Return the resident memory of all ranks, in MiB."""
        return float(sum(self.wait_for_all([actor.rss_mb.remote() for actor in self.actors], "rss_mb")))

    def release_memory(self) -> None:
        """Give cached memory back to the devices, for engines that share them."""
        with self._submitting:
            refs = [actor.release_memory.remote() for actor in self.actors]
        self.wait(refs, "release_memory")

    def weight_chunks(self, chunk_bytes: int) -> tuple[int, Iterator[Any]]:
        """Return the version of the current weights, and Ray references to lists of (name, tensor) that hold them."""
        with self._submitting:
            streams = [
                actor.weight_chunks.options(num_returns="streaming").remote(chunk_bytes) for actor in self.actors
            ]
            return self.version, self._drain(streams, "weight_chunks")

    def send_weights(self, engines: Sequence[WorkerHandle], rollout: RolloutConfig, backend: str) -> None:
        """Bring vLLM engines to the current weights.

        Raises:
            WorkerError: an engine did not take them, and another in its place could; or a rank failed.
        """
        with self._submitting:
            arguments = (engines, rollout, backend, self.version)
            refs = [actor.send_weights.remote(*arguments) for actor in self.actors]
        failure = self.wait(refs, "send_weights")
        if failure is not None:
            raise WorkerError(failure, is_lost=True)

    def _call(self, method: LearnerMethod, *args: Any, stoppable: bool = False) -> Any:
        with self._submitting:
            refs = self._submit(method, *args)
        return self.wait(refs, method, stoppable=stoppable)

    def _submit(self, method: LearnerMethod, *args: Any) -> list[Any]:
        shared = [ray.put(arg) for arg in args]
        return [actor.call.remote(method, *shared) for actor in self.actors]

    def _drain(self, streams: Sequence[Any], what: str) -> Iterator[Any]:
        finished = {stream.completed(): rank for rank, stream in enumerate(streams)}
        while True:
            ready, _ = ray.wait([streams[0]], timeout=POLL_S)
            for ref in ray.wait(list(finished), num_returns=len(finished), timeout=0)[0]:
                self.get(ref, finished[ref], what)
            if ready:
                try:
                    yield next(streams[0])
                except StopIteration:
                    break
        self.wait(list(finished), what)
