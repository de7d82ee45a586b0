"""What runs in the processes beside the driver: a rank of the learner, and the reward functions."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import psutil
import ray
import torch

from rollout.build import hide_progress_bars
from rollout.config import RolloutConfig
from rollout.engine import Backend
from rollout.inputs.stored import read_images
from rollout.types import Prompt, RolloutGroup
from rollout.vllm.peers import TransferError
from rollout.vllm.weights_out import WeightSender
from rollout.workers.worker import WorkerHandle, enter_folder, node_address, weight_sender, whereabouts
from rsgrpo.cluster.shared_folder import require_token
from rsgrpo.config.train import TrainConfig
from rsgrpo.records.run_log import log_to_folder
from rsgrpo.types import ScoredGroup

LearnerMethod = Literal[
    "update",
    "supervised_update",
    "supervised_loss",
    "logprobs",
    "count_vision",
    "prefetch",
    "begin_save",
    "is_saved",
    "load",
    "export",
]
"""What a driver may call on every rank of a learner (`rsgrpo.cluster.ranks.RayLearner`)."""


class _Process:
    def rss_mb(self) -> float:
        """Return this process's resident memory, in MiB."""
        return float(psutil.Process().memory_info().rss / 2**20)


class LearnerWorker(_Process):
    """One rank of the learner (or of the reference) as a Ray actor."""

    def __init__(self, rank: int, num_threads: int) -> None:
        hide_progress_bars()
        if num_threads:
            torch.set_num_threads(num_threads)
        self.rank = rank
        self._sender: WeightSender | None = None
        self._connected: tuple[WorkerHandle, ...] = ()

    @ray.method(concurrency_group="heartbeat")
    def alive(self) -> str:
        """Answer, whatever else is in progress; say where this process is."""
        return whereabouts()

    def address(self) -> tuple[str, int]:
        """Return this node's address and a free port, for the process group of all ranks."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return node_address(), probe.getsockname()[1]

    def devices(self) -> list[str]:
        """Return the GPUs of this node that Ray gave this rank."""
        return [str(gpu) for gpu in ray.get_gpu_ids()]

    def build(
        self,
        config: TrainConfig,
        folder: str,
        host: str,
        port: int,
        total_steps: int,
        run_dir: str,
        token: str,
        trainable: bool,
    ) -> None:
        """Join the process group and load this rank's shard of the model.

        folder: where the driver works. token: file that it has put into `run_dir` (`rsgrpo.cluster.shared_folder`).
        """
        from rsgrpo.learning.learner import Learner, init_distributed
        from rsgrpo.learning.policy import frozen_model

        enter_folder(folder)
        require_token(run_dir, token)
        init_distributed(self.rank, config.learner.num_ranks, host, port, config.learner.device)
        self.learner = Learner(
            config.model if trainable else frozen_model(config.model),
            config.learner,
            config.inputs,
            algorithm=config.algorithm,
            temperature=config.rollout.temperature,
            total_steps=total_steps,
            seed=config.seed,
            rank=self.rank,
            world_size=config.learner.num_ranks,
            trainable=trainable,
            same_tokens_as="" if trainable else config.model.path,
            debug_dir=run_dir,
        )
        self.release_memory()

    def release_memory(self) -> None:
        """Give cached memory back to the device: engines on the same device may use what the learner does not."""
        if self.learner.device.type == "cuda":
            torch.cuda.empty_cache()

    def call(self, method: LearnerMethod, *args: Any) -> Any:
        """Call a method of the learner; only rank 0 sends its result back."""
        result = getattr(self.learner, method)(*args)
        return result if self.rank == 0 else None

    def weight_chunks(self, chunk_bytes: int) -> Iterator[list[tuple[str, Any]]]:
        """Stream the full weights from rank 0; every rank must run this, since each holds a shard."""
        chunk: list[tuple[str, Any]] = []
        for name, tensor in self.learner.gather_weights():
            if self.rank:
                continue
            chunk.append((name, tensor.cpu()))
            if sum(t.numel() * t.element_size() for _, t in chunk) >= chunk_bytes:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def send_weights(
        self, engines: Sequence[WorkerHandle], rollout: RolloutConfig, backend: Backend, version: int
    ) -> str | None:
        """Bring vLLM engines to `version`; every rank must run this. Return why it failed, or None."""
        adapter, dtype = self.learner.adapter_config(), getattr(torch, rollout.dtype)
        if adapter is not None:
            tensors = self.learner.gather_adapter(dtype)
        else:
            tensors = self.learner.gather_weights(every_rank=backend == "ipc", dtype=dtype)
        failure = None
        try:
            if self._sender is None or self._connected != tuple(engines):
                self._disconnect()
                self._sender = weight_sender(engines, rollout, backend=backend, rank=self.rank, adapter_config=adapter)
                self._connected = tuple(engines)
            self._sender.send(tensors, version)
        except TransferError as error:
            failure = str(error)
            self._disconnect()
        for _ in tensors:
            pass  # the ranks gather together, so each must reach the end whatever happened to the engines
        self.release_memory()
        return failure

    def _disconnect(self) -> None:
        if self._sender is not None:
            self._sender.close()
        self._sender = None


class RewardWorker(_Process):
    """One process that runs the run's reward functions; calls of `score` share its event loop."""

    def build(self, config: TrainConfig, folder: str, module_path: Sequence[str]) -> None:
        """Load the reward functions; `module_path` is where the driver, working in `folder`, finds the user's own."""
        from rewards.calls import Lanes
        from rsgrpo.algorithm.scoring import RewardSet

        enter_folder(folder)
        sys.path += [folder for folder in module_path if folder not in sys.path]
        self.rewards = RewardSet.from_config(config)
        self._lanes = Lanes(thread=ThreadPoolExecutor(1, thread_name_prefix="rewards"))
        log_to_folder(Path(config.output_dir) / config.name)

    async def alive(self) -> str:
        """Answer while rewards run in their thread; say where this process is."""
        return whereabouts()

    async def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """Score whole groups, beside those of other calls; they come back without prompt and rollouts."""
        return list(await asyncio.gather(*(self._score(group) for group in groups)))

    async def _score(self, group: RolloutGroup) -> ScoredGroup:
        group = replace(group, prompt=await read_images(group.prompt))
        scored = await self.rewards.score_group(group, self._lanes)
        return replace(scored, group=RolloutGroup(Prompt(group.prompt.id, ""), ()))
