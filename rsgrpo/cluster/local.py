"""The roles of a run in this process: one learner rank, one engine, the rewards. No Ray.

For supervised training on one device, notebooks and tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil

from rollout.build import build_engine, hide_progress_bars
from rollout.engine import Engine
from rollout.types import Prompt, RolloutGroup, SamplingParams
from rsgrpo.algorithm.scoring import RewardSet
from rsgrpo.config.train import TrainConfig
from rsgrpo.learning.learner import Learner
from rsgrpo.types import ScoredGroup, TrainGroup


class LocalCluster:
    """Learner, engine and rewards of one process; the methods are those of `rsgrpo.cluster.protocol.Cluster`.

    The engine is started, and given the newest weights, when something is sampled; until then it costs nothing.
    """

    def __init__(self, config: TrainConfig, *, total_steps: int, run_dir: Path, check_stop: Callable[[], None]) -> None:
        """Load the model. check_stop: called between sampled groups; raises to give up the rest."""
        hide_progress_bars()
        self.config = config
        self.check_stop = check_stop
        self.learner = Learner(
            config.model,
            config.learner,
            config.inputs,
            algorithm=config.algorithm,
            temperature=config.rollout.temperature,
            total_steps=total_steps,
            seed=config.seed,
            debug_dir=run_dir,
        )
        self.rewards = RewardSet.from_config(config)
        self._engine: Engine | None = None
        self._version: int | None = None  # of weights that the engine has yet to be given

    def sample_and_score(
        self, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> Iterator[ScoredGroup | RolloutGroup]:
        """Sample prompts and score each group; a prompt that cannot be sampled yields its RolloutGroup."""
        for group in self._ready_engine().generate(prompts, sampling):
            self.check_stop()
            if group.error is not None:
                yield group
            else:
                yield from self.rewards.score([group])

    def sample_to_learn(
        self, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> Iterator[ScoredGroup | RolloutGroup]:
        """Sample and score prompts of a training step; the learner's threads decode their images meanwhile."""
        self.learner.prefetch(prompts)
        yield from self.sample_and_score(prompts, sampling)

    def learn(self, groups: Sequence[TrainGroup], loss_weights_K: Sequence[float], version: int) -> dict[str, float]:
        """Take the optimiser steps of one batch; the weights are `version` afterwards."""
        return self.learner.update(groups, loss_weights_K)

    def rest_engines(self) -> None:
        """Nothing to give up: the engine stays."""

    def sync_weights(self, version: int) -> None:
        """Let the engine sample with the learner's weights once it next samples."""
        self._version = version

    def ref_logprobs(self, groups: Sequence[TrainGroup]) -> list[list[np.ndarray]]:
        """Log-probabilities under the reference: the model without its adapters (LoRA runs only)."""
        return self.learner.logprobs(groups, reference=True)

    def engine_metrics(self) -> dict[str, float]:
        """Nothing is counted here."""
        return {}

    def check_engines(self, prompts: Sequence[Prompt], version: int) -> None:
        """Nothing to compare: the engine is given the learner's weights in this process."""

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
            config = self.config
            self._engine = build_engine(
                config.model.path,
                config.rollout,
                config.inputs,
                num_threads=config.learner.num_threads,
                device=config.learner.device,
                revision=config.model.revision,
                trust_remote_code=config.model.trust_remote_code,
            )
        if self._version is not None:
            self._engine.load_weights(self.learner.gather_weights())
            self._engine.finish_weights(self._version)
            self._version = None
        return self._engine
