"""Values where the project expects certain ones: settings of a run, what rewards return, what endpoints reply."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from tests.runs.fuzz.mutations import VALUES, exchange, mutated

SETTINGS = (
    "0", "1", "-1", "2.5", "1e-5", "1e400", "nan", "true", "null", '""', "x", "[1,2]", "{a: 1}", "{learner: -1}", "~",
    "../up", "rewards.evisrag:accuracy", "${seed}", "${nothing}", "'", '"', "a=b", "💥", "1_000", "0x10", "sweep,two",
)  # fmt: skip
SPANS = (None, (0, 0), (0, 5), (5, 0), (-3, 2), (0, 10**9), (2, 2))


def config_attempts(draw: random.Random) -> Iterator[Callable[[], str]]:
    """One to four settings of a run with strange values, on top of a recipe."""
    from rollout.keys import sections
    from rsgrpo.cli import compose_or_explain, groups
    from rsgrpo.config.checks import validate
    from rsgrpo.config.train import TrainConfig
    from rsgrpo.errors import InputError

    recipes = groups(TrainConfig)["recipe"]
    names = [section.name(field) for section in sections(TrainConfig) for field in section.keys]
    marks = ("", "", "", "+", "++", "~")

    def attempt(overrides: list[str]) -> str:
        try:
            config = compose_or_explain(TrainConfig, "config", overrides)
            validate(config)
        except InputError as error:
            return "refused" if str(error).strip() else "no message"
        return "taken"

    while True:
        overrides = [f"recipe={draw.choice(recipes)}"]
        for _ in range(draw.randint(1, 4)):
            name = draw.choice(names)
            if draw.random() < 0.1:
                name = mutated(name.encode(), draw).decode("utf-8", "replace")
            mark = draw.choice(marks)
            value = "" if mark == "~" and draw.random() < 0.5 else f"={draw.choice(SETTINGS)}"
            overrides.append(f"{mark}{name}{value}")
        yield lambda overrides=overrides: attempt(overrides)  # type: ignore[misc]


class NoFloat:
    """What cannot be turned into a number."""

    def __float__(self) -> float:
        raise ValueError("not today")


def odd_scores() -> tuple[Any, ...]:
    """Return numbers and other things that a reward may return."""
    import numpy as np
    import torch

    plain: tuple[Any, ...] = (
        0,
        1.0,
        -2.5,
        True,
        None,
        math.nan,
        math.inf,
        -math.inf,
        10**400,
        "1",
        "",
        b"1",
        [],
        {},
        1j,
        NoFloat(),
    )
    arrays = (np.float32(0.5), np.float64("nan"), np.array(1.0), np.array([1.0, 2.0]), np.int64(3))
    tensors = (torch.tensor(0.5), torch.tensor([1.0, 2.0]), torch.tensor(float("nan")))
    return (*plain, object, *arrays, *tensors)


def odd_value(draw: random.Random, scores: Sequence[Any]) -> Any:
    """Return or raise what a reward may: a score, credits in several containers, an error, a generator."""
    from rewards.api import Credit, Span

    def credit() -> Any:
        span = draw.choice(SPANS)
        name: Any = draw.choice(("a", "b", "", None, 3))
        return Credit(name, draw.choice(scores), None if span is None else Span(*span))

    kind = draw.random()
    if kind < 0.4:
        return draw.choice(scores)
    if kind < 0.8:
        return draw.choice((list, tuple, iter))([credit() for _ in range(draw.randint(0, 3))])
    if kind < 0.9:
        raise draw.choice((ValueError, KeyError, RecursionError, SystemExit, MemoryError, StopIteration))("raised")
    return (each for each in [draw.choice(scores)])


def reward_attempts(draw: random.Random) -> Iterator[Callable[[], str]]:
    """What a reward may return or raise; scores that are taken must be finite numbers and spans inside the text."""
    from rewards.api import Response, reward
    from rollout.types import Prompt, Rollout, RolloutGroup
    from rsgrpo.algorithm.scoring import NamedReward, RewardFailed, RewardSet

    text, scores = "<think>so</think><answer>7</answer>", odd_scores()
    spans = [(i, i + 1) for i in range(len(text))]
    rollout = Rollout([1] * len(text), [0.0] * len(text), text, spans, "stop", 0)
    group = RolloutGroup(Prompt("p", "?"), (rollout,))

    def attempt(seed: int) -> str:
        own = random.Random(seed)

        @reward
        def hostile(response: Response) -> Any:
            return odd_value(own, scores)

        try:
            (scored,) = RewardSet((NamedReward("hostile", hostile),), skip_errors=False).score([group])
        except RewardFailed as error:
            return "refused" if "hostile" in str(error) else "a nameless message"
        (number,), (credits,) = scored.scores_GK[0], scored.credits_GK[0]
        assert number is None or (isinstance(number, float) and math.isfinite(number)), number
        for each in credits:
            assert math.isfinite(each.score)
            assert each.span is None or 0 <= each.span.start <= each.span.end <= len(text), each.span
        return "none" if number is None else "taken"

    while True:
        seed = draw.randrange(2**32)
        yield lambda seed=seed: attempt(seed)  # type: ignore[misc]


def odd_reply(own: random.Random) -> tuple[bool, tuple[int, dict[str, str], bytes]]:
    """Return whether a reply is asked for as a stream, and its status, headers and content."""
    choice = {"message": {"content": "yes", "role": "assistant"}, "finish_reason": "stop"}
    event = {"choices": [{"delta": {"content": "yes"}, "finish_reason": "stop"}]}
    stream = own.random() < 0.4
    reply: Any = event if stream else {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    for _ in range(own.choice((0, 1, 1, 2))):
        exchange(reply, own)
    if own.random() < 0.05:
        reply = own.choice(VALUES)
    written = json.dumps(reply).encode()
    if stream:
        end = own.choice((b"data: [DONE]\n\n", b"", b"data: {\n\n", b": ping\n\n"))
        written = b"data: " + written + b"\n\n" + end
    headers = {"Content-Type": "text/event-stream" if stream else own.choice(("application/json", "text/html", ""))}
    if own.random() < 0.4:
        written = mutated(written, own)
    if own.random() < 0.1:
        written, headers["Content-Encoding"] = gzip.compress(written), own.choice(("gzip", "br", "deflate"))
    return stream, (own.choice((200,) * 12 + (204, 302, 400, 401, 404, 429, 500, 599)), headers, written)


def reply_attempts(draw: random.Random) -> Iterator[Callable[[], str]]:
    """What an endpoint may reply: other JSON, damaged bytes, other status codes and headers, streamed or not."""
    from recipes.answers.endpoint.client import Endpoint, EndpointError
    from recipes.answers.spec import EndpointConfig
    from recipes.answers.types import Answer
    from rollout.config import InputsConfig
    from rollout.types import Prompt, SamplingParams
    from tests.material.http_stub import QuietHandler, serving

    now: tuple[int, dict[str, str], bytes]

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            self.body()
            status, headers, content = now
            self.send(status, headers, content)

    with ExitStack() as stack:
        url = stack.enter_context(serving(Handler))
        config = EndpointConfig(url=f"{url}/v1", model="m", max_tries=1, backoff_s=0.0, timeout_s=20.0)
        endpoint = Endpoint(config, SamplingParams(max_tokens=5), InputsConfig())
        stack.callback(endpoint.close)
        prompt = Prompt("q", "why?")

        def attempt(seed: int) -> str:
            nonlocal now
            stream, now = odd_reply(random.Random(seed))
            try:
                *_, output = endpoint.stream(prompt) if stream else endpoint.answer([prompt])
            except EndpointError as error:
                return "a message of several lines" if "\n" in str(error) else "endpoint is down"
            assert isinstance(output, Answer)
            output.text.encode()
            return "error" if output.error else "answer"

        while True:
            seed = draw.randrange(2**32)
            yield lambda seed=seed: attempt(seed)  # type: ignore[misc]
