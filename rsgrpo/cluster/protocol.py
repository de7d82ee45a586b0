"""What a run asks of its learner and of the processes around it, wherever these are.

`rsgrpo.cluster.ray_cluster` puts them into Ray actors, `rsgrpo.cluster.local` into this process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from rollout.config import Dtype
from rollout.engine import NextShare
from rollout.types import Prompt, RolloutGroup, SamplingParams
from rsgrpo.config.train import TrainConfig
from rsgrpo.types import ScoredGroup, TrainGroup


class LearnerRanks(Protocol):
    """All ranks of the learner as one, with the methods of `rsgrpo.learning.learner.Learner` that a driver calls."""

    def update(self, groups: Sequence[TrainGroup], loss_weights_K: Sequence[float]) -> dict[str, float]:
        """Take the optimiser steps of one batch of rollouts; return its metrics."""

    def supervised_update(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Take one optimiser step on the mean negative log-likelihood per response token."""

    def supervised_loss(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Return the metrics of `supervised_update` without learning from the groups."""

    def logprobs(
        self, groups: Sequence[TrainGroup], reference: bool = False, temperature: float | None = None
    ) -> list[list[np.ndarray]]:
        """Return (T,) float32 log-probabilities of every response."""

    def count_vision(self, prompts: Sequence[Prompt]) -> list[tuple[int, int, int]]:
        """Return, for each prompt, (tokens, image tokens among them, image features)."""

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        """Begin to decode images that a later update will need; returns at once."""

    def begin_save(self, folder: Path) -> None:
        """Begin to write the state that `load` reads, on any number of ranks; further calls do not change it."""

    def is_saved(self) -> bool:
        """Return whether it has been written; raise why it could not be."""

    def load(self, folder: Path) -> None:
        """Continue exactly where `begin_save` was called."""

    def export(self, folder: Path, dtype: Dtype) -> None:
        """Write a Hugging Face folder with tokenizer and processor."""


class Cluster(Protocol):
    """Everything that works for the driver: engines, rewards, learner, reference."""

    @property
    def learner(self) -> LearnerRanks:
        """The ranks that train."""

    def sample_and_score(
        self, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> Iterator[ScoredGroup | RolloutGroup]:
        """Sample prompts and score each group once it is finished; a prompt that failed yields its RolloutGroup."""

    def sample_to_learn(
        self, expected: Sequence[Prompt], next_share: NextShare
    ) -> Generator[ScoredGroup | RolloutGroup]:
        """Sample and score the shares of a training step, as `sample_and_score`, until there is none.

        expected: prompts that the step begins with; the learner decodes their images meanwhile. Closing the iterator
        abandons what is still being sampled.
        """

    def learn(self, groups: Sequence[TrainGroup], loss_weights_K: Sequence[float], version: int) -> dict[str, float]:
        """Take the optimiser steps of one batch; the weights are `version` afterwards."""

    def rest_engines(self) -> None:
        """Let engines on the learner's devices give up memory until the next sync."""

    def sync_weights(self, version: int) -> None:
        """Let every engine sample with the learner's current weights, which are `version`."""

    def ref_logprobs(self, groups: Sequence[TrainGroup]) -> list[list[np.ndarray]]:
        """Return log-probabilities of every response under the reference."""

    def engine_metrics(self) -> dict[str, float]:
        """Return what the engines counted since the last call."""

    def check_engines(self, prompts: Sequence[Prompt], version: int) -> None:
        """Compare every engine with the learner (`rsgrpo.cluster.engine_check`); raise EnginesDiffer."""

    def memory_mb(self) -> dict[str, float]:
        """Return each role's resident memory, in MiB."""

    def close(self, *, hurry: bool = False) -> None:
        """End everything; `hurry` after a signal, which may have taken some of it already."""


class StartCluster(Protocol):
    """Makes a cluster; both implementations' classes are one."""

    def __call__(
        self, config: TrainConfig, *, total_steps: int, run_dir: Path, check_stop: Callable[[], None]
    ) -> Cluster:
        """Start everything and load the model; `check_stop` is called while waiting, and raises to give up."""
