"""The roles of a run as Ray actors: placement, calls to all ranks of a role, failure, shutdown.

Knows where things run, not what they compute: the learner, the rewards and the engines are called by their own names.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rollout.pool import RolloutPool, Supervision, WorkerError
from rollout.types import Prompt, RolloutGroup, SamplingParams
from rollout.worker import WorkerHandle, start_rollout_worker
from rsgrpo.cluster.engine_check import CHECKED_TOKENS, Check, check_gate, tolerance_of
from rsgrpo.cluster.ranks import POLL_S, Ranks, WorkerFailed, describe_failure
from rsgrpo.cluster.workers import LearnerWorker, RewardWorker
from rsgrpo.config.placement import place
from rsgrpo.config.train import TrainConfig
from rsgrpo.errors import InputError, RsgrpoError
from rsgrpo.stopping import kept_handlers
from rsgrpo.types import ScoredGroup, TrainGroup

log = logging.getLogger(__name__)

SYNC_CHUNK_BYTES = 64 << 20
"""Weights in flight at once on their way to embedded engines."""

CLOSE_TIMEOUT_S = 10.0
"""The longest that workers may take to end after a signal."""

WORKER_ENV = {
    "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0"),
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "passive",  # threads of a role that waits must not spin on the cores of the one that works
}


def _without_ray(address: str, error: Exception) -> RsgrpoError:
    reason = f"{type(error).__name__}: {str(error).strip()}"
    if address:
        return RsgrpoError(f"cluster.address={address}: no cluster to join ({reason}); `ray start` on every node first")
    return RsgrpoError(f"Ray does not start on this machine ({reason}); `python -m rsgrpo.doctor` looks why")


class Cluster:
    """Everything that runs beside the driver: engines, learner ranks, reference ranks, reward workers."""

    def __init__(self, config: TrainConfig, *, total_steps: int, run_dir: Path, check_stop: Callable[[], None]) -> None:
        """Start Ray (or join it), place all workers and load the model in each.

        check_stop: called while the driver waits for something that can be given up; raises to give it up.

        Raises:
            RsgrpoError: the cluster has too few CPUs or GPUs, with the arithmetic.
            WorkerFailed: a worker could not start.
        """
        self.config = config
        self.check_stop = check_stop
        self._placement: PlacementGroup | None = None
        self._pool: RolloutPool | None = None
        self._version = 0
        self._resting = False
        self._submitting = threading.Lock()
        self._connect()
        try:
            self._start(total_steps, run_dir)
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        cluster = self.config.cluster
        self._owns_ray = not ray.is_initialized()
        if not self._owns_ray:  # a notebook, or a sweep, that has connected already
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not cluster.address:
            # Nothing outside this machine connects to a cluster that lives as long as this process.
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        own = {
            "num_cpus": cluster.num_cpus or os.cpu_count(),
            "include_dashboard": False,
            "object_store_memory": cluster.object_store_mb << 20,
        }
        joined = {"address": cluster.address, "namespace": "rsgrpo"}
        try:
            with kept_handlers():
                ray.init(configure_logging=False, **(joined if cluster.address else own))
        except Exception as error:  # Ray has no class of its own for this
            raise _without_ray(cluster.address, error) from error

    def _start(self, total_steps: int, run_dir: Path) -> None:
        config, started = self.config, time.monotonic()
        roles = self._place()
        learners = self._ranks("learner", roles["learner"])
        references = self._ranks("reference", roles["reference"]) if roles["reference"] else None
        self._engine_options = roles["rollout"]
        self._share_gpus(learners)
        engines = [self._start_engine(index) for index in range(config.rollout.num_workers)]
        supervision = Supervision(self._start_engine, self._send_weights, config.rollout.max_restarts)
        self.rollouts = self._pool = RolloutPool(engines, timeout_s=config.rollout.timeout_s, supervision=supervision)
        self.reward_workers: list[Any] = [
            ray.remote(RewardWorker).options(**options).remote() for options in roles["reward"]
        ]
        for ranks, trainable in ((learners, True), (references, False)):
            if ranks is not None:
                host, port = ray.get(ranks.actors[0].address.remote(), timeout=config.cluster.startup_timeout_s)
                ranks.wait(
                    [
                        actor.build.remote(config, os.getcwd(), host, port, total_steps, str(run_dir), trainable)
                        for actor in ranks.actors
                    ],
                    "start-up",
                )
        rewards = Ranks("reward worker", self.reward_workers, self.check_stop)
        rewards.wait([actor.build.remote(config, os.getcwd(), sys.path) for actor in self.reward_workers], "start-up")
        self.learner, self.reference = learners, references
        try:
            self._backend = self.rollouts.ping()[0]["backend"]  # an engine that cannot load its model says so here
        except WorkerError as error:
            raise WorkerFailed(str(error)) from None
        log.info("all workers are up after %.1f s", time.monotonic() - started)

    def _start_engine(self, index: int) -> WorkerHandle:
        config = self.config
        return start_rollout_worker(
            index,
            config.model.path,
            config.rollout,
            config.inputs,
            folder=os.getcwd(),
            options=self._engine_options[index],
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
            colocated=config.cluster.placement == "colocated",
            lora_rank=config.model.lora.rank,
        )

    def _ranks(self, role: str, options: Sequence[dict[str, Any]]) -> Ranks:
        threads = self.config.learner.num_threads
        actors = [ray.remote(LearnerWorker).options(**o).remote(rank, threads) for rank, o in enumerate(options)]
        return Ranks(role, actors, self.check_stop)

    def _place(self) -> dict[str, list[dict[str, Any]]]:
        """Reserve resources for all workers at once; return the actor options of each role's workers."""
        have = ray.cluster_resources()
        cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
        plan = place(self.config, has_gpus=gpus > 0)
        if plan.total_cpus > cpus + 1e-6 or plan.total_gpus > gpus + 1e-6:
            raise InputError(
                f"{plan.describe()} (cluster.placement={self.config.cluster.placement}), the cluster has {cpus:g} and "
                f"{gpus:g}. Lower learner.num_ranks, rollout.num_workers or cluster.cpus, or add nodes."
            )
        self._placement = placement_group(plan.bundles, strategy="PACK")
        timeout_s = self.config.cluster.startup_timeout_s
        if not self._placement.wait(timeout_s):
            raise RsgrpoError(
                f"{plan.describe()}, and they could not be placed within cluster.startup_timeout_s={timeout_s:g} s: "
                f"other jobs hold the cluster, or no single node has room for each of {plan.bundles}"
            )
        return {
            role: [
                {
                    "num_cpus": seat.cpus,
                    "num_gpus": seat.gpus,
                    "runtime_env": {"env_vars": WORKER_ENV},
                    "scheduling_strategy": PlacementGroupSchedulingStrategy(
                        self._placement, placement_group_bundle_index=seat.bundle
                    ),
                }
                for seat in seats
            ]
            for role, seats in plan.seats.items()
        }

    def _share_gpus(self, learner: Ranks) -> None:
        """Tell engines that sit on the learner's GPUs which these are.

        Raises:
            RsgrpoError: the GPUs of one engine lie on two nodes.
        """
        devices = ray.get([actor.devices.remote() for actor in learner.actors])
        for index, seat in enumerate(place(self.config, has_gpus=any(gpus for _, gpus in devices)).seats["rollout"]):
            if not seat.shares_with:
                continue
            nodes = {devices[rank][0] for rank in seat.shares_with}
            if len(nodes) > 1:
                raise RsgrpoError(
                    f"engine {index} shares the GPUs of learner ranks {list(seat.shares_with)}, which lie on the nodes "
                    f"{sorted(nodes)}: choose rollout.vllm.tensor_parallel_size so that it divides the GPUs of a node"
                )
            visible = ",".join(gpu for rank in seat.shares_with for gpu in devices[rank][1])
            own = {"CUDA_VISIBLE_DEVICES": visible, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
            self._engine_options[index]["runtime_env"] = {"env_vars": WORKER_ENV | own}

    def sample_and_score(
        self, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> Iterator[ScoredGroup | RolloutGroup]:
        """Sample prompts on the engines; score each group as soon as it is finished, while others still run."""
        scoring: dict[Any, int] = {}
        for index, group in enumerate(self._rollouts_of(prompts, sampling)):
            if group.error is not None:
                yield group
                continue
            worker = index % len(self.reward_workers)
            scoring[self.reward_workers[worker].score.remote([group])] = worker
            yield from self._scored(scoring, timeout_s=0)
        while scoring:
            self.check_stop()
            yield from self._scored(scoring, timeout_s=POLL_S)

    def sample_to_learn(
        self, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> Iterator[ScoredGroup | RolloutGroup]:
        """Sample and score prompts of a training step; the learner decodes their images meanwhile."""
        with self._submitting:
            self.learner.submit("prefetch", prompts)
        yield from self.sample_and_score(prompts, sampling)

    def _rollouts_of(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[RolloutGroup]:
        try:
            yield from self.rollouts.generate(prompts, sampling, check=self.check_stop)
        except WorkerError as error:
            raise WorkerFailed(str(error)) from None

    def _scored(self, scoring: dict[Any, int], timeout_s: float) -> Iterator[ScoredGroup]:
        done = ray.wait(list(scoring), num_returns=len(scoring), timeout=timeout_s)[0]
        for ref in done:
            worker = scoring.pop(ref)
            try:
                yield from ray.get(ref)
            except ray.exceptions.RayError as error:
                raise WorkerFailed(describe_failure("reward worker", worker, "score", error)) from None

    def learn(self, groups: Sequence[TrainGroup], loss_weights_K: Sequence[float], version: int) -> dict[str, float]:
        """Take the optimiser steps of one batch; the weights are `version` afterwards.

        Engines may sample meanwhile. One that is lost then is given `version`, once it is there: calls of the learner
        keep their order, the same on all ranks.
        """
        with self._submitting:
            self._version = version
            updating = self.learner.submit("update", groups, loss_weights_K)
        return self.learner.wait(updating, "update")

    def rest_engines(self) -> None:
        """Let engines on the learner's devices give up memory until the next sync (`rollout.vllm.sleep_level`)."""
        cluster, rollout = self.config.cluster, self.config.rollout
        if cluster.placement == "colocated" and self._backend != "load" and rollout.vllm.sleep_level:
            self._call_engines("sleep")
            self._resting = True

    def _wake_engines(self, part: str) -> None:
        if self._resting:
            self._call_engines("wake", [part])

    def _call_engines(self, method: str, *args: Any) -> None:
        try:
            self.rollouts.call(method, *args)
        except WorkerError as error:
            self.rollouts.replace(self.rollouts.workers, error)

    def sync_weights(self, version: int) -> None:
        """Bring every engine to the learner's weights; they sample with `version` from here on.

        Raises:
            WorkerFailed: it failed, and starting the engines again did not help.
        """
        self._version = version
        try:
            self._wake_engines("weights")
            try:
                self._send_weights(self.rollouts.workers)
            except WorkerError as error:
                self.rollouts.replace(self.rollouts.workers, error)  # any of them may hold half of the weights
            self._wake_engines("kv_cache")
            self._resting = False
        except WorkerError as error:
            raise WorkerFailed(str(error)) from None

    def check_engines(self, prompts: Sequence[Prompt], version: int) -> list[Check]:
        """Compare every engine with the learner on `prompts` (`rsgrpo.cluster.engine_check`)."""
        num_tokens = min(CHECKED_TOKENS, self.config.rollout.max_response_tokens)
        tolerance = tolerance_of(self.config)
        try:
            return check_gate(
                self.rollouts, self.learner, prompts, num_tokens=num_tokens, tolerance=tolerance, version=version
            )
        except WorkerError as error:
            raise WorkerFailed(str(error)) from None

    def _send_weights(self, engines: Sequence[WorkerHandle]) -> None:
        if self._backend == "load":
            with self._submitting:
                version = self._version
                chunks = self.learner.stream("weight_chunks", SYNC_CHUNK_BYTES)
            self.rollouts.sync(chunks, version, engines)
            return
        with self._submitting:
            arguments = (engines, self.config.rollout, self._backend, self._version)
            sending = [actor.send_weights.remote(*arguments) for actor in self.learner.actors]
        failure = self.learner.wait(sending, "send_weights")
        if failure is not None:
            raise WorkerError(None, failure, is_lost=True)

    def engine_metrics(self) -> dict[str, float]:
        """Return restarts of engines so far and, of vLLM, its speed and cache hits since the last call."""
        metrics = {"rollout/engine_restarts": float(self.rollouts.num_restarts)}
        stats = [counts for counts in self.rollouts.call("stats") if counts]
        if stats:
            total = {key: sum(counts[key] for counts in stats) for key in stats[0]}
            metrics["rollout/tokens_per_s"] = total["tokens_per_s"]
            metrics["rollout/preempted"] = total["preempted"]
            if total["prompt_tokens"]:
                metrics["rollout/prefix_cache_hit_rate"] = total["cached_tokens"] / total["prompt_tokens"]
        return metrics

    def ref_logprobs(self, groups: Sequence[TrainGroup]) -> list[list[np.ndarray]]:
        """Log-probabilities of every response under the reference; LoRA runs switch the adapter off instead."""
        if self.reference is not None:
            return self.reference.call("logprobs", groups, stoppable=True)
        return self.learner.call("logprobs", groups, True, stoppable=True)

    def memory_mb(self) -> dict[str, float]:
        """Resident memory of each role, summed over its workers, in MiB."""
        roles = {"learner": self.learner.actors, "reward": self.reward_workers}
        if self.reference is not None:
            roles["reference"] = self.reference.actors
        memory = {role: sum(ray.get([actor.rss_mb.remote() for actor in actors])) for role, actors in roles.items()}
        memory["rollout"] = sum(state["rss_mb"] for state in self.rollouts.ping())
        return memory

    def close(self, *, hurry: bool = False) -> None:
        """Stop all workers and leave (or end) the Ray cluster.

        hurry: after a signal, which may have gone to the whole process group and so to Ray, which then answers nothing
            for a minute. A Ray of our own ends with this process: only engines with processes are told.
        """
        if not hurry:
            self._close()
            return
        if self._owns_ray and not any(worker.has_processes for worker in self.rollouts.workers):
            return
        closing = threading.Thread(target=self.rollouts.close if self._owns_ray else self._close, daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)

    def _close(self) -> None:
        if not ray.is_initialized():
            return
        if self._pool is not None:
            self._pool.close()  # engines may have processes of their own, which Ray does not know
            self._pool = None
        if self._placement is not None:
            remove_placement_group(self._placement)  # kills the workers that sit in it
            self._placement = None
        if self._owns_ray:
            ray.shutdown()
