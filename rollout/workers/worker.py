"""Engines as Ray actors, each in its own process, and how a learner reaches them to send weights.

`rollout.workers.pool` spreads work over them and handles their failures.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil
import ray
import torch

from rollout.build import build_engine, hide_progress_bars
from rollout.config import VLLM_SHARES, ConfigError, InputsConfig, RolloutConfig
from rollout.engine import Backend, Engine, EngineFailed
from rollout.errors import RsgrpoError
from rollout.errors import WorkerError as WorkerError
from rollout.meeting import LOOPBACK
from rollout.types import Prompt, RolloutGroup, SamplingParams

if TYPE_CHECKING:
    from rollout.vllm.peers import Peer
    from rollout.vllm.weights_out import WeightSender


_killed: dict[str, str] = {}
"""Ray's id of an actor that this process has killed -> why."""


def kill_worker(actor: Any, why: str) -> None:
    """Kill an actor, a stopped one too; `worker_error` of its calls then says why."""
    _killed[actor._actor_id.hex()] = why
    ray.kill(actor)


def worker_error(who: str, what: str, error: ray.exceptions.RayError, *, replaceable: bool = False) -> WorkerError:
    """Turn Ray's exception into one message: which actor failed, doing what, and why.

    The message of a RsgrpoError is complete; any other error needs the remote traceback.
    """
    if not isinstance(error, ray.exceptions.RayTaskError):
        return WorkerError(f"{who} died in {what}: {_death(error)}", error, is_lost=replaceable, died=True)
    cause = error.cause if isinstance(error.cause, Exception) else error
    reason = str(cause) if isinstance(cause, RsgrpoError) else f"{type(cause).__name__}\n{str(error).strip()}"
    is_lost = replaceable and isinstance(cause, EngineFailed)
    return WorkerError(f"{who} failed in {what}: {reason}", cause, is_lost=is_lost)


def _death(error: ray.exceptions.RayError) -> str:
    """Return in one line which process died, on which node, and why as far as it is known."""
    if why := _killed.get(getattr(error, "actor_id", None) or ""):
        return why
    text = str(error)
    process, node = (re.search(rf"^\s*{name}: (\S+)$", text, re.MULTILINE) for name in ("pid", "ip"))
    where = f"process {process[1]} on node {node[1]}: " if process and node else ""
    return where + " ".join(text.rpartition("The actor is dead because ")[2].split())


def whereabouts() -> str:
    """Return this process and its node, for messages."""
    return f"process {os.getpid()} on node {node_address()}"


def enter_folder(folder: str) -> None:
    """Change to the driver's folder, so that relative paths agree: on a joined cluster a worker starts elsewhere.

    Raises:
        ConfigError: this node has no such folder.
    """
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(
            f"node {socket.gethostname()} has no folder {folder} ({error.strerror}), where the run was started. Share "
            "it between the nodes under the same path."
        ) from None


class RolloutWorker:
    """One engine in its own process."""

    def __init__(
        self,
        index: int,
        model_path: str,
        rollout: RolloutConfig,
        inputs: InputsConfig,
        engine_options: Mapping[str, Any] | None = None,
        folder: str = ".",
    ) -> None:
        """Build the engine; a failure is raised by the first call that needs the engine.

        engine_options: further keywords of `build_engine`. folder: where relative paths start.
        """
        hide_progress_bars()
        self.index = index
        self._abandoned = -1
        self._failure: RsgrpoError | None = None
        try:
            enter_folder(folder)
            sys.path.sort(key=lambda place: place == folder)  # inherited by vLLM: no rollout/ of the user first
            self._engine = build_engine(model_path, rollout, inputs, **(engine_options or {}))
        except RsgrpoError as error:  # raised here, Ray would deliver a traceback instead of the error
            self._failure = error

    @property
    def engine(self) -> Engine:
        """The engine; raises RsgrpoError where it could not be built."""
        if self._failure is not None:
            raise self._failure
        return self._engine

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, ticket: int = sys.maxsize
    ) -> Iterator[RolloutGroup]:
        """Sample; the groups come back without their images, which the caller has.

        ticket: what `abandon` names this work by.
        """
        for group in self.engine.generate(prompts, sampling, stop=lambda: ticket <= self._abandoned):
            yield replace(group, prompt=replace(group.prompt, images=()))

    @ray.method(concurrency_group="control")
    def abandon(self, ticket: int) -> None:
        """Sample nothing further for this ticket and all smaller ones, begun or not."""
        self._abandoned = ticket

    def load_weights(self, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.engine.load_weights(named_tensors)

    def finish_weights(self, version: int) -> None:
        self.engine.finish_weights(version)

    @ray.method(concurrency_group="heartbeat")
    def alive(self) -> str:
        """Answer, whatever else is in progress; say where this process is."""
        return whereabouts()

    @ray.method(concurrency_group="control")
    def ping(self) -> dict[str, Any]:
        """Describe this worker, also while it samples.

        rss_mb: its own peak plus the current memory of its engine's other processes.
        """
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        return {
            "index": self.index,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "node": node_address(),
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
        if self._failure is None:
            self._engine.close()


def _children_bytes() -> int:
    """Return the resident memory of this process's children."""
    num_bytes = 0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            num_bytes += child.memory_info().rss
    return num_bytes


@dataclass(frozen=True, slots=True)
class WorkerHandle:
    """A worker as its callers see it.

    actor: Ray's handle. max_batch_sequences: sequences that it is given at a time, as one share of work.
    max_sequences: it is given further shares while it has fewer sequences than this; 0: one share after the other.
    num_devices: tensor-parallel size. has_processes: its engine has other processes, which must be stopped first.
    """

    index: int
    actor: Any
    max_batch_sequences: int
    num_devices: int = 1
    has_processes: bool = False
    max_sequences: int = 0


def start_rollout_worker(
    index: int,
    model_path: str,
    rollout: RolloutConfig,
    inputs: InputsConfig,
    *,
    folder: str = ".",
    options: Mapping[str, Any] | None = None,
    **engine_options: Any,
) -> WorkerHandle:
    """Start a worker as a Ray actor; it loads its model while the caller continues.

    Args:
        folder: where relative paths start, on whichever node the worker is.
        options: Ray's options of the actor: num_cpus, num_gpus, scheduling_strategy, runtime_env.
        engine_options: further keywords of `build_engine`, such as `device`.
    """
    options = dict(options or {})
    vllm = rollout.engine == "vllm"
    # A CPU build of vLLM stalls with several OpenMP threads; on GPUs one thread is enough.
    threads = rollout.num_threads or (1 if vllm else 0)
    given = options.pop("runtime_env", {})
    env_vars = {**({"OMP_NUM_THREADS": str(threads)} if threads else {}), **given.get("env_vars", {})}
    engine_options = {"name": f"engine {index}"} | engine_options
    actor = (
        ray.remote(concurrency_groups={"control": 1, "heartbeat": 1})(RolloutWorker)  # type: ignore[call-overload]
        .options(runtime_env={**given, "env_vars": env_vars}, max_concurrency=VLLM_SHARES if vllm else 1, **options)
        .remote(index, model_path, rollout, inputs, engine_options, folder)
    )
    if vllm:  # a little more than it decodes at once: images of the next prompts are decoded meanwhile
        devices, max_sequences = rollout.vllm.tensor_parallel_size, rollout.vllm.max_num_seqs * 5 // 4
        return WorkerHandle(index, actor, rollout.share_sequences, devices, True, max_sequences)
    return WorkerHandle(index, actor, rollout.share_sequences)


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
        backend: as `ping` returns it.
        adapter_config: content of adapter_config.json: send an adapter instead of whole weights.

    Raises:
        TransferError: an engine did not answer in time.
    """
    from rollout.vllm.weights_out import AdapterSender, build_sender

    put = _PutOnce(len(workers))
    vllm, peers = rollout.vllm, [_peer(worker, put) for worker in workers]
    if adapter_config is not None:
        return AdapterSender(peers, dict(adapter_config), rank=rank, timeout_s=vllm.sync_timeout_s)
    return build_sender(
        peers,
        backend=backend,
        rank=rank,
        dtype=getattr(torch, rollout.dtype),
        bucket_bytes=vllm.sync_bucket_mib * 2**20,
        timeout_s=vllm.sync_timeout_s,
        verify_every=vllm.verify_every,
        address=_meeting_address(workers, vllm.sync_timeout_s),
    )


def _meeting_address(workers: Sequence[WorkerHandle], timeout_s: float) -> str:
    """Return where engines reach this process: loopback if all are on its node."""
    own = node_address()
    try:
        pings = ray.get([worker.actor.ping.remote() for worker in workers], timeout=timeout_s)
    except ray.exceptions.RayError:  # the transfer itself says which of them does not answer
        return own
    return LOOPBACK if all(ping["node"] == own for ping in pings) else own


def node_address() -> str:
    """Return the address of this node that Ray uses, under which the others reach it."""
    untyped: Any = ray.util
    return str(untyped.get_node_ip_address())


class _PutOnce:
    """Puts arguments that all engines get, such as an adapter, into the object store once, until the last has them."""

    def __init__(self, num_engines: int) -> None:
        self._num_engines = self._left = num_engines
        self._args: tuple[Any, ...] | None = None
        self._ref: Any = None

    def __call__(self, args: tuple[Any, ...]) -> Any:
        if args is not self._args:
            self._args, self._ref, self._left = args, ray.put(args), self._num_engines
        ref = self._ref
        self._left -= 1
        if self._left <= 0:
            self._args = self._ref = None
        return ref


def _peer(worker: WorkerHandle, put: Callable[[tuple[Any, ...]], Any]) -> Peer:
    from rollout.vllm.peers import Peer

    def call(method: str, args: tuple[Any, ...]) -> Callable[[float], Any]:
        ref = worker.actor.call.remote(method, put(args))

        def wait(timeout_s: float) -> Any:
            try:
                return ray.get(ref, timeout=timeout_s)
            except ray.exceptions.GetTimeoutError:
                raise TimeoutError from None

        return wait

    return Peer(f"engine {worker.index}", worker.num_devices, call)
