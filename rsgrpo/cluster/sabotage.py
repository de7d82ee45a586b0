"""Sabotages an engine in the ways in which engines are known to be silently wrong, and asks the engine check."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image

from rollout.build import hide_progress_bars
from rollout.errors import one_line
from rollout.inputs.images import decode
from rollout.types import Prompt, RolloutGroup, SamplingParams
from rsgrpo.cluster.engine_check import (
    CHECKED_PROMPTS,
    Check,
    blanked,
    choose_prompts,
    run_checks,
    table,
)
from rsgrpo.cluster.local import OneEngine, run_engine
from rsgrpo.config.train import TrainConfig
from rsgrpo.errors import InputError, RsgrpoError
from rsgrpo.learning.learner import Learner

STALE = 0.1
"""How far stale weights are off, in standard deviations of each tensor; for constant ones these count as 1."""


@dataclass(frozen=True, slots=True)
class Sabotage:
    """One way to be wrong. seen: what the engine is given of a prompt. said: what becomes of its answers."""

    name: str
    seen: Callable[[Prompt], Prompt] = lambda prompt: prompt
    said: Callable[[RolloutGroup], RolloutGroup] = lambda group: group


@dataclass(frozen=True, slots=True)
class Outcome:
    """caught_by: the checks that failed, nothing where the sabotage went unnoticed."""

    name: str
    caught_by: tuple[str, ...]


class _Sabotaged(OneEngine):
    def __init__(self, inner: OneEngine, sabotage: Sabotage) -> None:
        self._inner, self._sabotage = inner, sabotage

    def generate_on_each(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[RolloutGroup]]:
        answers = self._inner.generate_on_each(self._seen(prompts), sampling)
        return [[self._sabotage.said(group) for group in groups] for groups in answers]

    def count_vision(self, prompts: Sequence[Prompt]) -> list[list[tuple[int, int, int]]]:
        return self._inner.count_vision(self._seen(prompts))

    def _seen(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return [replace(self._sabotage.seen(prompt), id=prompt.id) for prompt in prompts]


def sabotages(vision_token_id: int) -> list[Sabotage]:
    """Return all but stale weights, which change the learner."""

    def sampled_image_token(group: RolloutGroup) -> RolloutGroup:
        first, *others = group.rollouts
        token_ids = [*first.token_ids_T]
        token_ids[len(token_ids) // 2] = vision_token_id
        return replace(group, rollouts=(replace(first, token_ids_T=token_ids), *others))

    return [
        Sabotage("images dropped (grey pages in their place)", blanked),
        Sabotage("second image unseen", _second_grey),
        Sabotage("images in another order", lambda prompt: replace(prompt, images=tuple(reversed(prompt.images)))),
        Sabotage("other resize", _half_size),
        Sabotage("sampled image token", said=sampled_image_token),
        Sabotage("truncated prompt", _truncated),
    ]


def try_all(config: TrainConfig, prompts: Sequence[Prompt]) -> list[Outcome]:
    """Check the run's engine and learner as they are, then once for every sabotage.

    Args:
        prompts: training rows; those with the most images are used.

    Raises:
        InputError: the rows have no prompt with two images.
        RsgrpoError: engine and learner differ without any sabotage.
    """
    chosen = choose_prompts(prompts, CHECKED_PROMPTS)
    if max((len(prompt.images) for prompt in chosen), default=0) < 2:
        raise InputError("--sabotage needs a training row with two images: only then can one of them be unseen")
    hide_progress_bars()
    learner = Learner(config.model, config.learner, config.inputs, algorithm=config.algorithm, total_steps=1)
    built = run_engine(config)
    engine = OneEngine(built)

    def ask(engines: OneEngine) -> list[Check]:
        return run_checks(config, engines, learner, chosen, 0)

    try:
        untouched = ask(engine)
        if not all(check.holds for check in untouched):
            raise RsgrpoError(f"Engine and learner differ without any sabotage:\n{table(untouched)}")
        ways = sabotages(learner.encoder.banned_token_ids[0])
        found = [_outcome(each.name, partial(ask, _Sabotaged(engine, each))) for each in ways]
        _move_weights(learner)
        return [*found, _outcome("stale weights under the current version", partial(ask, engine))]
    finally:
        built.close()


def _outcome(name: str, check: Callable[[], list[Check]]) -> Outcome:
    try:
        return Outcome(name, tuple(dict.fromkeys(each.what for each in check() if not each.holds)))
    except RsgrpoError as error:  # what the learner refuses to train on
        return Outcome(name, (one_line(error),))


def _move_weights(learner: Learner) -> None:
    """Let the learner have learned something that the engine does not know."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in learner.policy.trainable().values():
            tensor: torch.Tensor = getattr(parameter, "to_local", lambda whole=parameter: whole)()
            spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
            tensor.add_(STALE * (spread or 1.0) * torch.randn_like(tensor))


def _second_grey(prompt: Prompt) -> Prompt:
    grey = blanked(prompt).images
    return replace(prompt, images=tuple(grey[i] if i == 1 else page for i, page in enumerate(prompt.images)))


def _half_size(prompt: Prompt) -> Prompt:
    pages = []
    for source in prompt.images:
        page = decode(source)
        buffer = io.BytesIO()
        page.resize((max(1, page.width // 2), max(1, page.height // 2)), Image.Resampling.BICUBIC).save(buffer, "PNG")
        pages.append(buffer.getvalue())
    return replace(prompt, images=tuple(pages))


def _truncated(prompt: Prompt) -> Prompt:
    """Drop the last quarter of the words, but no image."""
    pieces = re.split(r"(<image>|\s+)", prompt.text)
    words = [index for index, piece in enumerate(pieces) if piece.strip() and piece != "<image>"]
    dropped = set(words[len(words) * 3 // 4 :])
    return replace(prompt, text="".join(piece for index, piece in enumerate(pieces) if index not in dropped))
