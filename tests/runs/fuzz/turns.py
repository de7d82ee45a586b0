"""Environments that answer anything: what they return or raise, and what an episode makes of it."""

from __future__ import annotations

import asyncio
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.runs.fuzz.mutations import images, mutated, texts

TURNS = 4


def environment_attempts(draw: random.Random) -> Iterator[Callable[[], str]]:
    """Episodes in an environment whose every answer may be rubbish."""
    from recipes.demo.model import build_model, save_model_folder, train_tokenizer
    from rollout.config import InputsConfig, TurnsConfig
    from rollout.errors import RsgrpoError
    from rollout.inputs.processor import InputProcessor
    from rollout.turns.environment import Reply
    from rollout.turns.episode import begin_episodes
    from rollout.types import Prompt
    from tests.conftest import CORPUS

    class Odd:
        def __repr__(self) -> str:
            raise ValueError("not today")

    circle: dict[str, Any] = {}
    circle["a"] = circle
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    pictures, written = images(), texts(draw)
    words = ("<image>", "<image><image>", "<|im_end|>", "<|vision_pad|>", "\ud800", "\0", "x" * 300_000, "💥", "")
    odd: tuple[Any, ...] = (
        None,
        0,
        -1,
        1.5,
        math.nan,
        True,
        "x",
        b"x",
        [],
        (),
        {},
        [None],
        object(),
        Odd(),
        circle,
        10**400,
        "\ud800",
    )

    def text() -> Any:
        return draw.choice((draw.choice(words), next(written), f"{next(written)}<image>", draw.choice(odd)))

    def sources() -> Any:
        one = draw.choice((draw.choice(pictures), mutated(draw.choice(pictures), draw), "nowhere.png", "\0", "/", ""))
        return draw.choice(
            ((), (one,), [one] * draw.choice((1, 2, 50)), draw.choice(odd), [draw.choice(odd)], iter([one]))
        )

    def facts() -> Any:
        key = draw.choice(("call", "page", "", "at_char", "\ud800", (1, 2), 3, None))
        return draw.choice(({}, {key: draw.choice(odd)}, {"a": deep}, draw.choice(odd)))

    def answer() -> Any:
        kind = draw.random()
        if kind < 0.7:
            fault = draw.choice(("", "bad_call", "a b", "\n", "x" * 99, draw.choice(odd)))
            given = {"text": text, "images": sources, "facts": facts, "fault": lambda: fault, "ends": lambda: False}
            return Reply(**{name: make() for name, make in given.items() if draw.random() < 0.5})
        if kind < 0.8:
            return draw.choice((*odd, Reply, Reply("fine"), Reply(ends=True)))
        if kind < 0.9:
            return asyncio.sleep(0, draw.choice((Reply("late"), None, 3)))
        raise draw.choice((ValueError, KeyboardInterrupt, SystemExit, RecursionError, MemoryError, StopIteration))(
            "\ud800"
        )

    class Hostile:
        def __init__(self, prompt: Any) -> None:
            if draw.random() < 0.1:
                self.stop: Any = draw.choice((*odd, ("</a>",), ["</a>", ""], "</a>"))
            if draw.random() < 0.1:
                self.max_turn_tokens: Any = draw.choice((3, *odd))
            if draw.random() < 0.02:
                raise draw.choice((ValueError, SystemExit, RecursionError))("no")

        def step(self, turn: str) -> Any:
            return answer()

    def attempt(seed: int, processor: InputProcessor) -> str:
        nonlocal draw
        draw = random.Random(seed)
        limits = TurnsConfig(max_turns=TURNS, max_observation_tokens=600, max_images=3, timeout_s=30)
        try:
            (episode,) = begin_episodes(Hostile, Prompt("q", "?"), 1, processor, limits)
        except RsgrpoError as error:
            return "cannot begin" if "\n" not in str(error) else "a message of several lines"
        ids = processor.tokenizer("page", add_special_tokens=False)["input_ids"]
        for _ in range(TURNS):
            episode.has_stopped(ids)
            inputs = episode.answer(ids, [0.0] * len(ids))
            if inputs is None:
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
        return (
            ", ".join(sorted({observation.fault or "read" for observation in rollout.observations})) or "nothing said"
        )

    with tempfile.TemporaryDirectory(prefix="rsgrpo-fuzz-") as folder:
        tokenizer = train_tokenizer(CORPUS, vocab_size=400)
        model = build_model(tokenizer, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, vision_hidden_size=64)
        save_model_folder(model, tokenizer, Path(folder))
        processor = InputProcessor(folder, InputsConfig(min_pixels=784, max_pixels=50_176, max_prompt_tokens=400))
        while True:
            seed = draw.randrange(2**32)
            yield lambda seed=seed: attempt(seed, processor)  # type: ignore[misc]
