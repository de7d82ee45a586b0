"""Groups and learners for the learner's tests; no test itself, and importable in spawned ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rollout.config import InputsConfig
from rollout.inputs.processor import InputProcessor
from rollout.types import Observation, Prompt
from rsgrpo.config.train import AlgorithmConfig, LearnerConfig, ModelConfig
from rsgrpo.learning.learner import Learner
from rsgrpo.learning.response_rows import row_length
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


PER_TURN: list[list[list[int]]] = [[[]], [[2], [0, 3], [1, 1, 2]], [[], [4]], [[3], []]]
"""Of each sample of a group the images of each observation: one to four turns, 0 to 3 images each."""


def _observation(processor: InputProcessor, at: int, images: Sequence[str | bytes], *, has_ended: bool) -> Observation:
    text = "page: " + "<image> " * len(images)
    ids = processor.encode_observation(text, images, has_ended=has_ended).token_ids_T
    return Observation(at, 0, tuple(ids), text, tuple(images))


def _conversation(processor: InputProcessor, images: Sequence[Sequence[str | bytes]], seed: int) -> Sample:
    """Return turns of 1 to 7 random tokens with these images between them, and the note that ends an episode."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 8, len(images) + 1)
    places = np.cumsum(lengths)
    observations = [
        _observation(processor, int(at), own, has_ended=bool(index % 2))
        for index, (at, own) in enumerate(zip(places, images, strict=False))
    ]
    length = int(places[-1])
    scope_KT = rng.random((2, length)) < 0.6
    advantages_KT = np.where(scope_KT, rng.normal(size=(2, 1)), 0.0).astype(np.float32)
    end = Observation(length, 0, facts={"done": True})
    tokens_T = rng.integers(0, 300, length)
    return Sample(
        tokens_T, scope_KT, advantages_KT, rng.normal(-6, 0.2, length).astype(np.float32), None, (*observations, end)
    )


def make_conversations(processor: Any, pages: Sequence[Any], counts: Sequence[int]) -> list[TrainGroup]:
    """Return groups as `make_groups` does, whose responses read observations with up to three images in four turns."""
    groups = []
    for index, count in enumerate(counts):
        prompt = Prompt(f"p{index}", "<image>" * count + f"what amount is on page {index}?", tuple(pages[:count]))
        samples = [
            _conversation(processor, [[pages[page] for page in own] for own in images], seed=10 * index + number)
            for number, images in enumerate(PER_TURN[index % 2 :] if index else PER_TURN)
        ]
        samples.append(dataclasses.replace(samples[0], observations=()))
        groups.append(TrainGroup(prompt, tuple(samples)))
    return groups


def with_experts(processor: Any, groups: Sequence[TrainGroup], num_layers: int = 3) -> list[TrainGroup]:
    """Return groups that were sampled with two of eight experts per token and layer, at random."""
    rng, found = np.random.default_rng(0), []

    def choices(num_tokens: int) -> np.ndarray:
        return rng.random((num_tokens, num_layers, 8)).argsort(-1)[..., :2].astype(np.uint8)

    for group in groups:
        samples = tuple(
            dataclasses.replace(sample, experts_RLk=choices(row_length(sample) - 1)) for sample in group.samples
        )
        experts = choices(processor.count_tokens(group.prompt))
        found.append(dataclasses.replace(group, samples=samples, prompt_experts_TLk=experts))
    return found
