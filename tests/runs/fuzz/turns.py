"""Environments that answer anything: what they return or raise, and what an episode makes of it."""

from __future__ import annotations

import asyncio
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.runs.fuzz.mutations import images, mutated, texts

TURNS = 4


class NoRepr:
    """What cannot be shown."""

    def __repr__(self) -> str:
        raise ValueError("not today")


def circle() -> dict[str, Any]:
    """Return what contains itself."""
    found: dict[str, Any] = {}
    found["a"] = found
    return found


def deep() -> list[Any]:
    """Return a list that is nested beyond any limit of recursion."""
    found: list[Any] = []
    for _ in range(100_000):
        found = [found]
    return found


WORDS = ("<image>", "<image><image>", "<|im_end|>", "<|vision_pad|>", "\ud800", "\0", "x" * 300_000, "💥", "")
ODD: tuple[Any, ...] = (
    None, 0, -1, 1.5, math.nan, True, "x", b"x", [], (), {}, [None], object(), NoRepr(), circle(), 10**400, "\ud800",
)  # fmt: skip
RAISED = (ValueError, KeyboardInterrupt, SystemExit, RecursionError, MemoryError, StopIteration)


class Rubbish:
    """Draws what an environment answers.

    draw: of the attempt that runs now.
    """

    def __init__(self, draw: random.Random) -> None:
        self.draw, self._deep = draw, deep()
        self._pictures, self._written = images(), texts(draw)

    def text(self) -> Any:
        written = self._written
        choices = (self.draw.choice(WORDS), next(written), f"{next(written)}<image>", self.draw.choice(ODD))
        return self.draw.choice(choices)

    def sources(self) -> Any:
        draw, pictures = self.draw, self._pictures
        one = draw.choice((draw.choice(pictures), mutated(draw.choice(pictures), draw), "nowhere.png", "\0", "/", ""))
        many = [one] * draw.choice((1, 2, 50))
        return draw.choice(((), (one,), many, draw.choice(ODD), [draw.choice(ODD)], iter([one])))

    def facts(self) -> Any:
        draw = self.draw
        key = draw.choice(("call", "page", "", "at_char", "\ud800", (1, 2), 3, None))
        return draw.choice(({}, {key: draw.choice(ODD)}, {"a": self._deep}, draw.choice(ODD)))

    def answer(self) -> Any:
        """Return or raise anything, most often a reply with some rubbish in it."""
        from rollout.turns.environment import Reply

        draw = self.draw
        kind = draw.random()
        if kind < 0.7:
            fault = draw.choice(("", "bad_call", "a b", "\n", "x" * 99, draw.choice(ODD)))
            given: dict[str, Callable[[], Any]] = {
                "text": self.text,
                "images": self.sources,
                "facts": self.facts,
                "fault": lambda: fault,
                "ends": lambda: False,
            }
            return Reply(**{name: make() for name, make in given.items() if draw.random() < 0.5})
        if kind < 0.8:
            return draw.choice((*ODD, Reply, Reply("fine"), Reply(ends=True)))
        if kind < 0.9:
            return asyncio.sleep(0, draw.choice((Reply("late"), None, 3)))
        raise draw.choice(RAISED)("\ud800")


class Hostile:
    """An environment of one episode whose answers are rubbish."""

    def __init__(self, prompt: Any, rubbish: Rubbish) -> None:
        self._rubbish, draw = rubbish, rubbish.draw
        if draw.random() < 0.1:
            self.stop: Any = draw.choice((*ODD, ("</a>",), ["</a>", ""], "</a>"))
        if draw.random() < 0.1:
            self.max_turn_tokens: Any = draw.choice((3, *ODD))
        if draw.random() < 0.02:
            raise draw.choice((ValueError, SystemExit, RecursionError))("no")

    def step(self, turn: str) -> Any:
        return self._rubbish.answer()


def episode_of(rubbish: Rubbish, processor: Any) -> str:
    """Run one episode; return what became of its turns."""
    from rollout.config import TurnsConfig
    from rollout.errors import RsgrpoError
    from rollout.turns.episode import begin_episodes
    from rollout.types import Prompt

    limits = TurnsConfig(max_turns=TURNS, max_observation_tokens=600, max_images=3, timeout_s=30)
    try:
        (episode,) = begin_episodes(partial(Hostile, rubbish=rubbish), Prompt("q", "?"), 1, processor, limits)
    except RsgrpoError as error:
        return "cannot begin" if "\n" not in str(error) else "a message of several lines"
    ids = processor.tokenizer("page", add_special_tokens=False)["input_ids"]
    for _ in range(TURNS):
        episode.has_stopped(ids)
        if episode.answer(ids, [0.0] * len(ids)) is None:
            break
    rollout = episode.rollout(0)
    read = [observation for observation in rollout.observations if observation.token_ids_S]
    assert sum(len(observation.token_ids_S) for observation in read) <= limits.max_observation_tokens
    assert sum(len(observation.images) for observation in read) <= limits.max_images
    assert len(rollout.token_ids_T) == len(rollout.token_spans_T) == len(rollout.logprobs_T)
    for observation in rollout.observations:
        observation.text.encode()
        json.dumps(dict(observation.facts), default=str, allow_nan=False)
        assert observation.fault.isprintable()
    return ", ".join(sorted({observation.fault or "read" for observation in rollout.observations})) or "nothing said"


def environment_attempts(draw: random.Random) -> Iterator[Callable[[], str]]:
    """Episodes in an environment whose every answer may be rubbish."""
    from recipes.demo.model import build_model, save_model_folder, train_tokenizer
    from rollout.config import InputsConfig
    from rollout.inputs.processor import InputProcessor
    from tests.conftest import CORPUS

    rubbish = Rubbish(draw)

    def attempt(seed: int, processor: InputProcessor) -> str:
        rubbish.draw = random.Random(seed)
        return episode_of(rubbish, processor)

    with tempfile.TemporaryDirectory(prefix="rsgrpo-fuzz-") as folder:
        tokenizer = train_tokenizer(CORPUS, vocab_size=400)
        model = build_model(tokenizer, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, vision_hidden_size=64)
        save_model_folder(model, tokenizer, Path(folder))
        processor = InputProcessor(folder, InputsConfig(min_pixels=784, max_pixels=50_176, max_prompt_tokens=400))
        while True:
            seed = draw.randrange(2**32)
            yield lambda seed=seed: attempt(seed, processor)  # type: ignore[misc]
