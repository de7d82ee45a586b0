"""Environments that answer something else: the policy is told, and the run goes on (`tests.runs.fuzz` tries more)."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rollout.config import InputsConfig, TurnsConfig
from rollout.inputs.images import PromptError
from rollout.inputs.processor import InputProcessor
from rollout.turns.environment import Reply
from rollout.turns.episode import begin_episodes
from rollout.types import Observation, Prompt

Untyped: Any = Reply


@pytest.fixture(scope="module")
def processor(tiny_model_path):
    return InputProcessor(tiny_model_path, InputsConfig(min_pixels=784, max_pixels=50_176, max_prompt_tokens=400))


def observed(processor: InputProcessor, make: Any, **attributes: Any) -> tuple[Observation, ...]:
    """Return the observations of an episode of one turn, to which `make()` is the answer."""

    class Rubbish:
        def __init__(self, prompt: Prompt) -> None:
            vars(self).update(attributes)

        def step(self, turn: str) -> Any:
            return make()

    limits = TurnsConfig(max_observation_tokens=600, max_images=2)
    (episode,) = begin_episodes(Rubbish, Prompt("q", "?"), 1, processor, limits)
    ids = processor.tokenizer("page", add_special_tokens=False)["input_ids"]
    episode.answer(ids, [0.0] * len(ids))
    return episode.rollout(0).observations


@pytest.mark.parametrize(
    ("make", "fault", "says"),
    [
        (lambda: "text", "exception", "step() must return a Reply or None, got str"),
        (lambda: Untyped(None), "exception", "Reply.text is a NoneType"),
        (lambda: Untyped("half \ud800"), "exception", "surrogates not allowed"),
        (lambda: Untyped(images=None), "exception", "Reply.images is a NoneType"),
        (lambda: Untyped("<image>", images=[3]), "exception", "Reply.images are paths or compressed bytes, got int"),
        (lambda: Untyped(facts=[1]), "exception", "Reply.facts is a list"),
        (lambda: Untyped(facts={(1, 2): 3}), "exception", "Reply.facts are JSON values"),
        (lambda: Untyped(facts={"score": math.nan}), "exception", "Reply.facts are JSON values"),
        (lambda: Untyped(fault="bad\ncall"), "exception", "one word of at most 40 characters"),
        (lambda: Untyped("a " * 50_000), "limit", "100000 characters"),
        (lambda: Untyped("two <image> marks"), "unreadable", "It cannot be shown"),
        (lambda: Untyped("<image>", images=[b"GIF8"]), "unreadable", "It cannot be shown"),
    ],
)  # fmt: skip
def test_an_answer_that_is_not_one_becomes_an_observation_that_says_so(processor, make, fault, says):
    (observation,) = observed(processor, make)
    assert observation.fault == fault
    assert says in observation.text


def raises(error: BaseException) -> Any:
    raise error


def test_an_error_whose_text_cannot_be_written_is_told_in_another_way(processor):
    (observation,) = observed(processor, lambda: raises(SystemExit("\ud800")))
    assert observation.fault == "exception"
    observation.text.encode()


@pytest.mark.parametrize("stop", [("",), 3, (3,)])
def test_what_ends_a_turn_are_strings(processor, stop):
    with pytest.raises(PromptError, match="the environment cannot begin"):
        observed(processor, lambda: None, stop=stop)
