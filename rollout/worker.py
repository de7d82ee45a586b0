"""Engines as Ray actors, and the pool that spreads whole groups over them.

Owns one engine per process, which worker samples what, and what is said when one fails. Knows nothing of rewards or
learning, and nothing of how an engine samples.
"""

from __future__ import annotations

import os
import re
import resource
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from transformers.utils.logging import disable_progress_bar

from rollout.config import ConfigError, InputsConfig, RolloutConfig
from rollout.engine import EngineError, build_engine
from rollout.types import Prompt, RolloutGroup, SamplingParams

POLL_S = 0.5
"""How often a wait looks up: for a request to stop, for a worker that is late."""

SYNCS_IN_FLIGHT = 2
"""Chunks of weights that are on their way at once: one is copied while the next travels."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class WorkerError(RuntimeError):
    """A rollout worker raised, died or was too slow.

    worker_index: which one; its engine may be lost. cause: the exception behind it, None when it was too slow.
    """

    def __init__(self, worker_index: int, message: str, cause: BaseException | None = None) -> None:
        super().__init__(f"rollout worker {worker_index} {_COLOURS.sub('', message)}")
        self.worker_index = worker_index
        self.cause = cause


class RolloutWorker:
    """One engine in a process of its own."""

    def __init__(
        self,
        index: int,
        model_path: str,
        rollout: RolloutConfig,
        inputs: InputsConfig,
        num_threads: int = 0,
        env: Mapping[str, str] | None = None,
        engine_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the engine.

        num_threads: CPU threads; 0 takes `rollout.num_threads`. env: set before the engine is imported.
        engine_options: further keywords of `build_engine`.
        """
        os.environ.update(env or {})
        disable_progress_bar()  # whoever drives the workers draws the bars
        self.index = index
        self.engine = build_engine(model_path, rollout, inputs, num_threads=num_threads, **(engine_options or {}))

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[RolloutGroup]:
        """Stream groups as the engine finishes them."""
        yield from self.engine.generate(prompts, sampling)

    def load_weights(self, named_tensors: Sequence[tuple[str, torch.Tensor | np.ndarray]]) -> None:
        """Pass one chunk of weights on to the engine."""
        self.engine.load_weights(
            (name, torch.tensor(tensor) if isinstance(tensor, np.ndarray) else tensor) for name, tensor in named_tensors
        )

    def finish_weights(self, version: int) -> None:
        """All weights of `version` have arrived."""
        self.engine.finish_weights(version)

    @ray.method(concurrency_group="control")
    def ping(self) -> dict[str, Any]:
        """Say who and where this worker is, also while it samples: pid, host, weights_version, rss_mb (its peak)."""
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        return {
            "index": self.index,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "weights_version": self.engine.weights_version,
            "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20,
        }

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()


@dataclass(frozen=True, slots=True)
class WorkerHandle:
    """A worker as the pool sees it.

    actor: Ray's handle. max_batch_sequences: what its engine samples at once; the size of the work it is given.
    """

    index: int
    actor: Any
    max_batch_sequences: int


def start_rollout_worker(
    index: int,
    model_path: str,
    rollout: RolloutConfig,
    inputs: InputsConfig,
    *,
    num_threads: int = 0,
    env: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    **engine_options: Any,
) -> WorkerHandle:
    """Start a worker as a Ray actor; it loads its model while the caller goes on.

    Args:
        env: environment variables, set before the process imports anything.
        options: of the actor: num_cpus, num_gpus, scheduling_strategy, runtime_env.
        engine_options: further keywords of `build_engine`, such as `device`.
    """
    options = dict(options or {})
    threads = num_threads or rollout.num_threads
    given = options.pop("runtime_env", {})
    env_vars = {**({"OMP_NUM_THREADS": str(threads)} if threads else {}), **given.get("env_vars", {}), **(env or {})}
    actor = (
        ray.remote(concurrency_groups={"control": 1})(RolloutWorker)  # type: ignore[call-overload]
        .options(runtime_env={**given, "env_vars": env_vars}, **options)
        .remote(index, model_path, rollout, inputs, num_threads, None, engine_options)
    )
    return WorkerHandle(index, actor, rollout.max_batch_sequences)


@dataclass(frozen=True, slots=True)
class _Running:
    """A piece of work on its way: who has it, its stream of groups, and when it is late (monotonic seconds)."""

    worker: WorkerHandle
    stream: Any
    late_at: float


class RolloutPool:
    """Spreads whole groups over workers: a prompt stays on one engine, and whoever is free takes the next piece."""

    def __init__(self, workers: Sequence[WorkerHandle], *, timeout_s: float = 3600.0) -> None:
        """timeout_s: the longest that a worker may take for one piece of work, its start-up included."""
        assert workers, "a pool needs a worker"
        self.workers = list(workers)
        self.timeout_s = timeout_s

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, check: Callable[[], None] | None = None
    ) -> Iterator[RolloutGroup]:
        """Yield one group per prompt, in any order, as they finish.

        What is sampled does not depend on which worker is faster: the prompts are cut into the same pieces every time.

        Args:
            check: called while waiting; raises to give up.

        Raises:
            WorkerError: a worker raised, died or was late; names it and the cause.
        """
        pieces = deque(self._pieces(prompts, sampling.group_size))
        idle = deque(self.workers)
        running: list[_Running] = []
        while pieces or running:
            while pieces and idle:
                running.append(self._start(idle.popleft(), pieces.popleft(), sampling))
            streams = [work.stream for work in running]
            ready = ray.wait(streams, num_returns=1, timeout=POLL_S)[0]
            if check is not None:
                check()
            for work in list(running):
                if work.stream in ready:
                    try:
                        yield self._get(work.worker, next(work.stream), "sampling")
                    except StopIteration:
                        running.remove(work)
                        idle.append(work.worker)
                elif time.monotonic() > work.late_at:
                    raise self._late(work.worker, "sampling")

    def sync(self, chunks: Iterable[Any], version: int) -> None:
        """Copy weights to every worker and let all of them sample with `version`.

        Args:
            chunks: lists of (Hugging Face name, tensor), or Ray references to such lists, which the workers fetch
                without a copy in this process.

        Raises:
            WorkerError: a worker raised, died or was late.
        """
        in_flight: deque[list[Any]] = deque()
        for chunk in chunks:
            ref = chunk if isinstance(chunk, ray.ObjectRef) else ray.put(chunk)
            in_flight.append([worker.actor.load_weights.remote(ref) for worker in self.workers])
            if len(in_flight) >= SYNCS_IN_FLIGHT:
                self._wait_for_all(in_flight.popleft(), "loading weights")
        for calls in in_flight:
            self._wait_for_all(calls, "loading weights")
        self._wait_for_all(
            [worker.actor.finish_weights.remote(version) for worker in self.workers], "finishing weights"
        )

    def ping(self) -> list[dict[str, Any]]:
        """Return what each worker says of itself (`RolloutWorker.ping`)."""
        return self._wait_for_all([worker.actor.ping.remote() for worker in self.workers], "answering a ping")

    def close(self) -> None:
        """Stop all workers; calling it twice is allowed."""
        for worker in self.workers:
            ray.kill(worker.actor)

    def _pieces(self, prompts: Sequence[Prompt], group_size: int) -> list[Sequence[Prompt]]:
        """Cut the prompts into equal shares per worker, none over what its engine samples at once."""
        at_once = min(worker.max_batch_sequences for worker in self.workers) // group_size
        num_prompts = max(1, min(at_once, -(-len(prompts) // len(self.workers))))
        return [prompts[start : start + num_prompts] for start in range(0, len(prompts), num_prompts)]

    def _start(self, worker: WorkerHandle, piece: Sequence[Prompt], sampling: SamplingParams) -> _Running:
        stream = worker.actor.generate.options(num_returns="streaming").remote(piece, sampling)
        return _Running(worker, stream, time.monotonic() + self.timeout_s)

    def _wait_for_all(self, refs: Sequence[Any], what: str) -> list[Any]:
        """Return one result per worker, in their order."""
        late_at = time.monotonic() + self.timeout_s
        return [
            self._get(worker, ref, what, max(0.0, late_at - time.monotonic()))
            for worker, ref in zip(self.workers, refs, strict=True)
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
            raise WorkerError(worker.index, f"failed in {what}: {said}", cause) from None
        except ray.exceptions.RayActorError as error:
            raise WorkerError(worker.index, f"died in {what}: {error}", error) from None

    def _late(self, worker: WorkerHandle, what: str) -> WorkerError:
        return WorkerError(worker.index, f"took longer than rollout.timeout_s={self.timeout_s:g} s for {what}")
