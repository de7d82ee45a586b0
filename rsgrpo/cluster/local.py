"""The roles of a run in this process: one learner rank, one engine, the rewards. No Ray.

For `cluster=inline`, supervised training on one device, notebooks and tests. With the embedded engine it computes what
`rsgrpo.cluster.ray_cluster` computes with one rank and one engine, bit for bit on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch

from rollout.build import build_engine, hide_progress_bars
from rollout.engine import Engine, NextShare, shares
from rollout.types import Prompt, RolloutGroup, SamplingParams
from rsgrpo.algorithm.scoring import RewardSet
from rsgrpo.cluster.engine_check import check_engines
from rsgrpo.config.train import TrainConfig
from rsgrpo.learning.learner import Learner
from rsgrpo.learning.policy import frozen_model
from rsgrpo.types import ScoredGroup, TrainGroup


class OneEngine:
    """An engine as the engine check asks it (`rsgrpo.cluster.engine_check.Engines`)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def generate_on_each(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[RolloutGroup]]:
        """Return the groups of all prompts, in their order, as those of the only engine."""
        by_id = {group.prompt.id: group for group in self._engine.generate(prompts, sampling)}
        return [[by_id[prompt.id] for prompt in prompts]]

    def count_vision(self, prompts: Sequence[Prompt]) -> list[list[tuple[int, int, int]]]:
        """Return `rollout.engine.Engine.count_vision` of the only engine."""
        return [self._engine.count_vision(prompts)]


class LocalCluster:
    """Learner, engine and rewards of one process; the methods are those of `rsgrpo.cluster.protocol.Cluster`.

    The engine is started when something is first sampled; until then it costs nothing. It has weights of its own, so
    that it can sample the next step while the learner works (`algorithm.max_staleness`).
    """

    def __init__(self, config: TrainConfig, *, total_steps: int, run_dir: Path, check_stop: Callable[[], None]) -> None:
        """Load the model. check_stop: called between sampled groups; raises to give up the rest."""
        hide_progress_bars()
        self.config = config
        self.check_stop = check_stop
        learner = partial(
            Learner,
            learner=config.learner,
            inputs=config.inputs,
            algorithm=config.algorithm,
            temperature=config.rollout.temperature,
            total_steps=total_steps,
            seed=config.seed,
            debug_dir=run_dir,
        )
        self._reference = None
        if config.needs_reference_workers:
            self._reference = learner(frozen_model(config.model), trainable=False, same_tokens_as=config.model.path)
        self.learner = learner(config.model)  # the last one: it seeds the random numbers of training
        self.rewards = RewardSet.from_config(config)
        self._engine: Engine | None = None
        self._version: int | None = None  # of weights that the engine has yet to be given

    def sample_and_score(
        self, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> Iterator[ScoredGroup | RolloutGroup]:
        """Sample prompts and score each group; a prompt that cannot be sampled yields its RolloutGroup."""
        pieces = iter(shares(prompts, sampling.group_size, self.config.rollout.share_sequences, num_engines=1))
        return self._sample(lambda: next(((piece, sampling) for piece in pieces), None))

    def sample_to_learn(
        self, expected: Sequence[Prompt], next_share: NextShare
    ) -> Generator[ScoredGroup | RolloutGroup]:
        """Sample and score a training step; the learner's threads decode images of the expected prompts meanwhile."""
        self.learner.prefetch(expected)
        return self._sample(next_share)

    def _sample(self, next_share: NextShare) -> Generator[ScoredGroup | RolloutGroup]:
        engine = self._ready_engine()
        while share := next_share():
            for group in engine.generate(*share):
                self.check_stop()
                if group.error is not None:
                    yield group
                else:
                    yield from self.rewards.score([group])

    def learn(self, groups: Sequence[TrainGroup], loss_weights_K: Sequence[float], version: int) -> dict[str, float]:
        """Take the optimiser steps of one batch; the weights are `version` afterwards."""
        return self.learner.update(groups, loss_weights_K)

    def rest_engines(self) -> None:
        """Nothing to give up: the engine stays."""

    def sync_weights(self, version: int) -> None:
        """Give the engine the learner's weights; one that has not been needed yet is given them when it is started."""
        self._version = version
        if self._engine is not None or self.config.algorithm.max_staleness:  # it may sample while the learner works
            self._ready_engine()

    def ref_logprobs(self, groups: Sequence[TrainGroup]) -> list[list[np.ndarray]]:
        """Log-probabilities of every response under the reference; LoRA runs switch the adapter off instead."""
        if self._reference is not None:
            return self._reference.logprobs(groups)
        return self.learner.logprobs(groups, reference=True)

    def engine_metrics(self) -> dict[str, float]:
        """Return the engines and restarts: none, since the engine lives and dies with the run."""
        engines = float(self.config.rollout.num_workers)
        return {"rollout/engines": engines, "rollout/engine_restarts": 0.0, "rollout/reward_restarts": 0.0}

    def check_engines(self, prompts: Sequence[Prompt], version: int) -> None:
        """Compare the engine with the learner on `prompts`.

        Raises:
            EnginesDiffer: they disagree; the message is the whole table.
        """
        check_engines(self.config, OneEngine(self._ready_engine()), self.learner, prompts, version)

    def memory_mb(self) -> dict[str, float]:
        """Return the resident memory of this process, which has all roles, in MiB."""
        return {"process": psutil.Process().memory_info().rss / 2**20}

    def close(self, *, hurry: bool = False) -> None:
        """Free the engine; `hurry` changes nothing, since there is no other process to wait for."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _ready_engine(self) -> Engine:
        if self._engine is None:
            # The learner's random numbers are those of a run with a process per role.
            with torch.random.fork_rng(devices=[]):
                self._engine = run_engine(self.config)
        if self._version is not None:
            self._engine.load_weights(self.learner.gather_weights())
            self._engine.finish_weights(self._version)
            self._version = None
        return self._engine


def run_engine(config: TrainConfig) -> Engine:
    """Build a run's engine in this process, on the learner's device."""
    return build_engine(
        config.model.path,
        config.rollout,
        config.inputs,
        num_threads=config.learner.num_threads,
        device=config.learner.device,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
    )
