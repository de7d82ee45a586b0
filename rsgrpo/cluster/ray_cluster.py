"""The roles of a run as Ray actors: placement, start-up, weight sync, shutdown."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rollout.engine import NextShare, Share, shares
from rollout.inputs.stored import store_images
from rollout.meeting import LOOPBACK
from rollout.types import Prompt, RolloutGroup, SamplingParams
from rollout.vllm.launch import check_bucket
from rollout.workers.crew import Supervision
from rollout.workers.pool import RolloutPool
from rollout.workers.worker import WorkerError, WorkerHandle, start_rollout_worker
from rsgrpo.cluster.connect import abandon_ray, connect_ray
from rsgrpo.cluster.deadline import Deadline
from rsgrpo.cluster.engine_check import check_engines
from rsgrpo.cluster.ranks import RayLearner
from rsgrpo.cluster.reservation import Reservation
from rsgrpo.cluster.reward_pool import RewardPool
from rsgrpo.cluster.shared_folder import token_in
from rsgrpo.cluster.watch import Watch
from rsgrpo.cluster.workers import LearnerWorker, RewardWorker
from rsgrpo.config.train import TrainConfig
from rsgrpo.errors import RUN_ERROR
from rsgrpo.types import ScoredGroup, TrainGroup

log = logging.getLogger(__name__)

SYNC_CHUNK_BYTES = 64 << 20
"""Weights in flight at once on their way to embedded engines."""

STORING_THREADS = 4
"""Threads that put the images of a step into the object store."""

CLOSE_TIMEOUT_S = 10.0
"""The longest that workers may take to end after a signal."""


class RayCluster:
    """Engines, learner, reference and reward workers as Ray actors: a `rsgrpo.cluster.protocol.Cluster`."""

    def __init__(self, config: TrainConfig, *, total_steps: int, run_dir: Path, check_stop: Callable[[], None]) -> None:
        """Start Ray (or join it), place all workers and load the model in each.

        check_stop: called while the driver waits for something that it can give up; raises to give up.

        Raises:
            RsgrpoError: the cluster has too few CPUs or GPUs, with the arithmetic.
            WorkerError: a worker could not start.
        """
        self.config = config
        self.check_stop = check_stop
        self._seats: Reservation | None = None
        self._pool: RolloutPool | None = None
        self._resting = False
        self._closing, self._ray_lost = False, threading.Event()
        self.reference: RayLearner | None = None
        cluster = config.cluster
        self._owns_ray = connect_ray(
            cluster.address,
            num_cpus=cluster.num_cpus or os.cpu_count() or 1,
            object_store_bytes=cluster.object_store_mb << 20,
            startup_timeout_s=cluster.startup_timeout_s,
        )
        self._watch = Watch(
            self._workers,
            self._end_without_ray,
            silence_s=cluster.silence_timeout_s,
            owns_ray=self._owns_ray and not cluster.address,
        )
        try:
            self._start(total_steps, run_dir)
        except BaseException:
            self.close()
            raise

    def _start(self, total_steps: int, run_dir: Path) -> None:
        config, deadline = self.config, Deadline(self.config.cluster.startup_timeout_s)
        self._seats = seats = Reservation(config, timeout_s=deadline.left_s)
        if seats.shares_gpus and config.rollout.engine == "vllm" and not config.model.lora.rank:
            check_bucket(config.model.path, config.rollout)
        self.learner = self._ranks("learner")
        calls = [actor.devices.remote() for actor in self.learner.actors]
        seats.share_gpus(self.learner.wait_for_all(calls, "starting a process", deadline=deadline))
        if seats.placement.seats["reference"]:
            self.reference = self._ranks("reference")
        self.rewards = RewardPool(
            self._start_reward_worker,
            config.cluster.reward_workers,
            start_timeout_s=config.cluster.startup_timeout_s,
            where=self._where,
        )
        if not seats.shares_gpus:
            self._start_engines()
        with token_in(run_dir) as token:
            self._build(self.learner, deadline, total_steps, str(run_dir), token, True)
            if self.reference is not None:
                self._build(self.reference, deadline, total_steps, str(run_dir), token, False)
        if seats.shares_gpus:
            # Not earlier: vLLM sizes its cache by what all processes together take of a GPU while it starts.
            self._start_engines()
        self.rewards.wait(deadline)
        try:
            self._backend = self.rollouts.start(deadline.left_s)["backend"]
        except TimeoutError as error:
            raise deadline.missed(str(error), "starting its engine") from None
        log.info("all workers are up after %.1f s", deadline.limit_s - deadline.left_s)

    def _build(self, ranks: RayLearner, deadline: Deadline, *arguments: Any) -> None:
        places = ranks.wait_for_all([actor.address.remote() for actor in ranks.actors], "starting", deadline=deadline)
        host, port = places[0]
        if all(other == host for other, _ in places):
            host = LOOPBACK
        calls = [actor.build.remote(self.config, os.getcwd(), host, port, *arguments) for actor in ranks.actors]
        ranks.wait_for_all(calls, "loading the model", deadline=deadline)

    def _start_engines(self) -> None:
        rollout = self.config.rollout
        engines = [self._start_engine(index) for index in range(rollout.num_workers)]
        supervision = Supervision(
            self._restart_engine,
            self._send_weights,
            rollout.max_restarts,
            has_room=partial(self._reservation.has_room, "rollout"),
            start_timeout_s=self.config.cluster.startup_timeout_s,
            where=self._where,
        )
        self.rollouts = self._pool = RolloutPool(engines, timeout_s=rollout.timeout_s, supervision=supervision)

    def _restart_engine(self, index: int) -> WorkerHandle:
        if self._reservation.shares_gpus:
            self._release_memory()  # vLLM counts what others hold of the GPU as its own
        return self._start_engine(index)

    def _start_engine(self, index: int) -> WorkerHandle:
        config = self.config
        return start_rollout_worker(
            index,
            config.model.path,
            config.rollout,
            config.inputs,
            folder=os.getcwd(),
            options=self._reservation.options("rollout", index),
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
            colocated=config.cluster.placement == "colocated",
            lora_rank=config.model.lora.rank,
        )

    def _start_reward_worker(self, index: int) -> tuple[Any, Any]:
        options = self._reservation.options("reward", index)
        actor: Any = ray.remote(RewardWorker).options(**options).remote()
        return actor, actor.build.remote(self.config, os.getcwd(), sys.path)

    def _workers(self) -> dict[str, Any]:
        """Return the actors that there are now, by the names that errors use."""
        found: dict[str, Any] = {}
        for role in ("learner", "reference", "rewards"):  # in the order in which they start
            if (group := getattr(self, role, None)) is not None:
                found |= group.named()
        if self._pool is not None:
            found |= {f"rollout worker {worker.index}": worker.actor for worker in list(self._pool.workers)}
        return found

    def _where(self) -> str:
        """Return the step that the run is at, for messages."""
        return f"step {self.learner.version + 1}" if hasattr(self, "learner") else "start-up"

    def _end_without_ray(self, what: str) -> None:
        """End this process, from any thread, with all that it has started: its calls of Ray would wait forever.

        Whatever a checkpoint needs is on disk at any moment. While everything is closed, only waiting ends.
        """
        self._ray_lost.set()
        if self._closing:
            return
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # bars hide the cursor
        doing = getattr(getattr(self, "learner", None), "doing", "") or "sampling"
        log.error(
            "%s, %s: %s. The run ends here. Run the same command to resume from its last checkpoint.",
            self._where(),
            doing,
            what,
        )
        abandon_ray(owned=self._owns_ray and not self.config.cluster.address)
        os._exit(RUN_ERROR)

    @property
    def _reservation(self) -> Reservation:
        assert self._seats is not None, "a worker before its reservation"
        return self._seats

    def _release_memory(self) -> None:
        """Let the learner and the reference give cached memory back to the devices."""
        for ranks in (self.learner, self.reference):
            if ranks is not None:
                ranks.release_memory()

    def _ranks(self, role: str) -> RayLearner:
        learner, options = self.config.learner, self._reservation.options
        actors = [
            ray.remote(concurrency_groups={"heartbeat": 1})(LearnerWorker)  # type: ignore[call-overload]
            .options(**options(role, rank))
            .remote(rank, learner.num_threads)
            for rank in range(learner.num_ranks)
        ]
        return RayLearner(role, actors, self.check_stop)

    def sample_and_score(
        self, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> Iterator[ScoredGroup | RolloutGroup]:
        """Sample prompts on the engines; score each group as soon as it is finished, while others still run."""
        rollout, given = self.config.rollout, {prompt.id: prompt for prompt in prompts}
        pieces = iter(shares(prompts, sampling.group_size, rollout.share_sequences, rollout.num_workers))
        # Nobody needs the images once a group is scored: the object store may forget them.
        for group in self._sample(lambda: next((([*map(store_images, piece)], sampling) for piece in pieces), None)):
            scored, sampled = (group, group.group) if isinstance(group, ScoredGroup) else (None, group)
            sampled = replace(sampled, prompt=given[sampled.prompt.id])
            yield replace(scored, group=sampled) if scored is not None else sampled

    def sample_to_learn(
        self, expected: Sequence[Prompt], next_share: NextShare
    ) -> Generator[ScoredGroup | RolloutGroup]:
        """Sample and score a training step; the learner decodes the images of the prompts expected in it meanwhile.

        Images go into the object store once, in threads, in the order in which they are expected. What is yielded
        refers to them there, for the learner.
        """
        with ThreadPoolExecutor(STORING_THREADS, thread_name_prefix="images") as threads:
            storing = [threads.submit(store_images, prompt) for prompt in expected]
            prefetching = threads.submit(lambda: self.learner.prefetch([stored.result() for stored in storing]))
            waiting = {id(prompt): future for prompt, future in zip(expected, storing, strict=True)}

            def stored(prompt: Prompt) -> Prompt:
                found = waiting.pop(id(prompt), None)
                return store_images(prompt) if found is None else found.result()

            def next_stored() -> Share | None:
                share = next_share()
                return None if share is None else ([stored(prompt) for prompt in share[0]], share[1])

            try:
                yield from self._sample(next_stored)
            finally:
                prefetching.result()  # it must reach the learner before the update

    def _sample(self, next_share: NextShare) -> Generator[ScoredGroup | RolloutGroup]:
        scoring = self.rewards.batch()
        for group in self.rollouts.stream(next_share, also=scoring.calls, check=self.check_stop):
            if group is not None and group.error is not None:
                yield group
            elif group is not None:
                scoring.add(group)
            yield from scoring.scored(timeout_s=0)

    def learn(self, groups: Sequence[TrainGroup], loss_weights_K: Sequence[float], version: int) -> dict[str, float]:
        """Take the optimiser steps of one batch; the weights are `version` afterwards.

        Engines may sample meanwhile. One that is lost then is given `version` as soon as that exists.
        """
        return self.learner.update(groups, loss_weights_K, version)

    def rest_engines(self) -> None:
        """Let engines on the learner's devices give up memory until the next sync (`rollout.vllm.sleep_level`)."""
        cluster, rollout = self.config.cluster, self.config.rollout
        if cluster.placement == "colocated" and self._backend != "load" and rollout.vllm.sleep_level:
            self.rollouts.sleep()
            self._resting = True

    def sync_weights(self, version: int) -> None:
        """Bring every engine to the learner's weights; they sample with `version` from here on.

        Raises:
            WorkerError: it failed, and restarting the engines did not help.
        """
        with self.rollouts.changing:
            self.learner.version = version
            self.rollouts.take_back()
            if self._resting:
                self._release_memory()  # what the update left cached is room that the engines need
                self.rollouts.wake("weights")
            try:
                self._send_weights(self.rollouts.workers)
            except WorkerError as error:
                self.rollouts.replace(self.rollouts.workers, error)  # any of them may have half of the weights
            if self._resting:
                self.rollouts.wake("kv_cache")
            self._resting = False
            if self.config.changes_weights_in_flight:
                self.rollouts.step_ended()

    def check_engines(self, prompts: Sequence[Prompt], version: int) -> None:
        """Compare every engine with the learner on `prompts`.

        Raises:
            EnginesDiffer: they disagree; the message is the whole table.
        """
        check_engines(self.config, self.rollouts, self.learner, prompts, version)

    def _send_weights(self, engines: Sequence[WorkerHandle]) -> None:
        if self._backend == "load":
            version, chunks = self.learner.weight_chunks(SYNC_CHUNK_BYTES)
            self.rollouts.sync(chunks, version, engines)
        else:
            self.learner.send_weights(engines, self.config.rollout, self._backend)

    def engine_metrics(self) -> dict[str, float]:
        """Return engines, restarts so far and, of vLLM, its speed and cache hits since the last call."""
        metrics = {
            "rollout/engines": float(len(self.rollouts.workers)),
            "rollout/engine_restarts": float(self.rollouts.num_restarts),
            "rollout/reward_restarts": float(self.rewards.num_restarts),
        }
        stats = [counts for counts in self.rollouts.stats() if counts]
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
            return self.reference.logprobs(groups)
        return self.learner.logprobs(groups, reference=True)

    def memory_mb(self) -> dict[str, float]:
        """Resident memory of each role, summed over its workers, in MiB."""
        memory = {"learner": self.learner.memory_mb(), "reward": self.rewards.memory_mb()}
        if self.reference is not None:
            memory["reference"] = self.reference.memory_mb()
        return memory | {"rollout": self.rollouts.memory_mb()}

    def close(self, *, hurry: bool = False) -> None:
        """Stop all workers and leave (or end) the Ray cluster.

        hurry: after a signal, which may have reached the whole process group and so Ray, which then does not answer
            for a minute. A Ray of our own ends with this process: only engines with processes are told.
        """
        self._closing = True
        if not hurry:
            self._close_in_time()
            return
        if self._owns_ray and not any(worker.has_processes for worker in self.rollouts.workers):
            return
        closing = threading.Thread(target=self.rollouts.close if self._owns_ray else self._close, daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)

    def _close_in_time(self) -> None:
        """Close; give up as soon as Ray turns out to be gone."""
        self._watch.stop_asking()
        closing = threading.Thread(target=self._close, daemon=True, name="close")
        closing.start()
        while closing.is_alive() and not self._ray_lost.is_set():
            closing.join(timeout=0.2)
        self._watch.stop()
        if closing.is_alive():
            log.warning("Ray did not end by itself: it is killed.")
            abandon_ray(owned=self._owns_ray and not self.config.cluster.address)

    def _close(self) -> None:
        if not ray.is_initialized():
            return
        if self._pool is not None:
            self._pool.close()  # engines may have processes of their own, which Ray does not know
            self._pool = None
        if self._seats is not None:
            self._seats.release()
            self._seats = None
        if self._owns_ray:
            ray.shutdown()
