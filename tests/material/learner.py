"""Groups and learners for the learner's tests; no test itself, and importable in spawned ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rollout.config import InputsConfig
from rollout.types import Prompt
from rsgrpo.config.train import AlgorithmConfig, LearnerConfig, ModelConfig
from rsgrpo.learning.learner import Learner
from rsgrpo.types import Sample, TrainGroup

INPUTS = InputsConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
# With a large eps AdamW's step is nearly proportional to the gradient, and with a large lr it is large beside the
# rounding of the weights: what differs between two updates is then what differs between two gradients.
SMALL: dict[str, Any] = {"device": "cpu", "precision": "float32", "num_threads": 1, "lr": 0.1, "eps": 0.1}


def make_learner(path: str, *, algorithm: AlgorithmConfig | None = None, **options: Any) -> Learner:
    """Return a float32 CPU learner; `options` go to LearnerConfig, ModelConfig or Learner, whoever knows them."""
    model = {key: options.pop(key) for key in list(options) if key in ModelConfig.__dataclass_fields__}
    learner = {key: options.pop(key) for key in list(options) if key in LearnerConfig.__dataclass_fields__}
    options.setdefault("total_steps", 10)
    return Learner(
        ModelConfig(path=path, **model),
        LearnerConfig(**(SMALL | learner)),
        INPUTS,
        algorithm=algorithm or AlgorithmConfig(),
        **options,
    )


def learnt(metrics: dict[str, float]) -> dict[str, float]:
    """Return what an update learnt, without how long it took and what it reused."""
    return {key: value for key, value in metrics.items() if not key.startswith(("time/", "perf/"))}


def make_groups(
    images: Sequence[str], counts: Sequence[int], *, num_samples: int = 3, num_terms: int = 2, seed: int = 0
) -> list[TrainGroup]:
    """Return one group per entry of `counts`, its number of images, with random responses, scopes and advantages."""
    rng = np.random.default_rng(seed)
    groups = []
    for index, count in enumerate(counts):
        text = "<image>" * count + f"what amount is on page {index}?"
        samples = []
        for _ in range(num_samples):
            length = int(rng.integers(2, 12))
            scope_KT = rng.random((num_terms, length)) < 0.6
            advantages_KT = np.where(scope_KT, rng.normal(size=(num_terms, 1)), 0.0).astype(np.float32)
            engine_T = rng.normal(-6.0, 0.2, length).astype(np.float32)
            samples.append(Sample(rng.integers(0, 300, length), scope_KT, advantages_KT, engine_T))
        groups.append(TrainGroup(Prompt(f"p{index}", text, tuple(images[:count])), tuple(samples)))
    return groups
