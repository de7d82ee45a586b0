"""Engines as Ray actors, each in a process of its own, and how a learner reaches them to send weights.

Who samples what, and what happens when one fails, is in `rollout.pool`. Knows nothing of rewards or learning, and
nothing of how an engine samples.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import ray
import torch
from transformers.utils.logging import disable_progress_bar

from rollout.build import build_engine
from rollout.config import ConfigError, InputsConfig, RolloutConfig
from rollout.engine import Backend, Engine, EngineError
from rollout.types import Prompt, RolloutGroup, SamplingParams

if TYPE_CHECKING:
    from rollout.vllm.peers import Peer
    from rollout.vllm.weights_out import WeightSender


class FolderMissing(ConfigError):
    """A node does not have the folder that a run was started in."""


def enter_folder(folder: str) -> None:
    """Make relative paths mean what they mean to the driver: on a cluster that it joined, a worker starts elsewhere.

    Raises:
        FolderMissing: this node has no such folder.
    """
    try:
        os.chdir(folder)
    except OSError as error:
        raise FolderMissing(
            f"node {socket.gethostname()} has no folder {folder} ({error.strerror}), where the run was started: share "
            "it between the nodes under the same path"
        ) from None


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
        folder: str = ".",
    ) -> None:
        """Build the engine; why it cannot be built is raised by the first call that needs it.

        num_threads: CPU threads; 0 takes `rollout.num_threads`. env: set before the engine is imported.
        engine_options: further keywords of `build_engine`. folder: where relative paths start.
        """
        os.environ.update(env or {})
        disable_progress_bar()  # whoever drives the workers draws the bars
        self.index = index
        self._failure: EngineError | ConfigError | None = None
        try:
            enter_folder(folder)
            self._engine = build_engine(model_path, rollout, inputs, num_threads=num_threads, **(engine_options or {}))
        except (EngineError, ConfigError) as error:  # from here Ray would hand on a traceback in place of the error
            self._failure = error

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            EngineError, ConfigError: it could not be built.
        """
        if self._failure is not None:
            raise self._failure
        return self._engine

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
        """Say who and where this worker is, also while it samples.

        Returns:
            index, pid, host, backend (`Engine.backend`), weights_version, rss_mb (its peak, and what further processes
            of its engine hold now).
        """
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        return {
            "index": self.index,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "backend": self.engine.backend,
            "weights_version": self.engine.weights_version,
            "rss_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + _children_bytes()) / 2**20,
        }

    @ray.method(concurrency_group="control")
    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        """Call a method of the engine, also while it samples."""
        return getattr(self.engine, method)(*args)

    @ray.method(concurrency_group="control")
    def close(self) -> None:
        """Free the engine, if there is one."""
        if self._failure is None:
            self._engine.close()


def _children_bytes() -> int:
    """Return the resident memory of this process's children; one that has just ended holds none."""
    num_bytes = 0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            num_bytes += child.memory_info().rss
    return num_bytes


@dataclass(frozen=True, slots=True)
class WorkerHandle:
    """A worker as others see it.

    actor: Ray's handle. max_batch_sequences: what its engine samples at once; the size of the work it is given.
    num_devices: its tensor-parallel size. has_processes: its engine runs in further processes, to be ended before it.
    """

    index: int
    actor: Any
    max_batch_sequences: int
    num_devices: int = 1
    has_processes: bool = False


def start_rollout_worker(
    index: int,
    model_path: str,
    rollout: RolloutConfig,
    inputs: InputsConfig,
    *,
    num_threads: int = 0,
    env: Mapping[str, str] | None = None,
    folder: str = ".",
    options: Mapping[str, Any] | None = None,
    **engine_options: Any,
) -> WorkerHandle:
    """Start a worker as a Ray actor; it loads its model while the caller goes on.

    Args:
        env: environment variables, set before the process imports anything.
        folder: where relative paths start, on whatever node the worker is.
        options: of the actor: num_cpus, num_gpus, scheduling_strategy, runtime_env.
        engine_options: further keywords of `build_engine`, such as `device`.
    """
    options = dict(options or {})
    vllm = rollout.engine == "vllm"
    # Several OpenMP threads of a CPU build of vLLM stall; on GPUs one thread is enough.
    threads = num_threads or rollout.num_threads or (1 if vllm else 0)
    given = options.pop("runtime_env", {})
    env_vars = {**({"OMP_NUM_THREADS": str(threads)} if threads else {}), **given.get("env_vars", {}), **(env or {})}
    engine_options = {"name": f"engine {index}"} | engine_options
    actor = (
        ray.remote(concurrency_groups={"control": 1})(RolloutWorker)  # type: ignore[call-overload]
        .options(runtime_env={**given, "env_vars": env_vars}, **options)
        .remote(index, model_path, rollout, inputs, num_threads, None, engine_options, folder)
    )
    if vllm:  # it schedules by itself: its whole share at once
        return WorkerHandle(index, actor, sys.maxsize, rollout.vllm.tensor_parallel_size, has_processes=True)
    return WorkerHandle(index, actor, rollout.max_batch_sequences)


def weight_sender(
    workers: Sequence[WorkerHandle],
    rollout: RolloutConfig,
    *,
    backend: Backend,
    rank: int,
    adapter_config: Mapping[str, Any] | None = None,
) -> WeightSender:
    """Connect one rank of a learner to vLLM engines (`rollout.vllm.weights_out`); every rank calls it.

    Args:
        backend: as the workers say in `ping`.
        adapter_config: sends an adapter with this adapter_config.json in place of whole weights.

    Raises:
        TransferError: an engine did not answer in time.
    """
    from rollout.vllm.launch import sender_options
    from rollout.vllm.weights_out import AdapterSender, build_sender

    peers = [_peer(worker) for worker in workers]
    if adapter_config is not None:
        return AdapterSender(peers, dict(adapter_config), rank=rank, timeout_s=rollout.vllm.sync_timeout_s)
    return build_sender(peers, backend=backend, rank=rank, **sender_options(rollout))


def _peer(worker: WorkerHandle) -> Peer:
    from rollout.vllm.peers import Peer

    def call(method: str, args: tuple[Any, ...]) -> Callable[[float], Any]:
        ref = worker.actor.call.remote(method, args)

        def wait(timeout_s: float) -> Any:
            try:
                return ray.get(ref, timeout=timeout_s)
            except ray.exceptions.GetTimeoutError:
                raise TimeoutError from None

        return wait

    return Peer(f"engine {worker.index}", worker.num_devices, call)
