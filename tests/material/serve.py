"""A server, its answerer and its requests, for the tests of `recipes.serve`."""

from __future__ import annotations

import asyncio
import atexit
import base64
import io
import json
import threading
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from aiohttp.test_utils import TestClient, TestServer
from PIL import Image

from recipes.answers.types import Answer
from recipes.serve.chat_request import MIB, RequestLimits
from recipes.serve.sampling import SamplingRules
from recipes.serve.server import ServeConfig, Server
from rollout.inputs.isolated import IsolatedDecoders
from rollout.types import Prompt, SamplingParams
from rsgrpo.errors import RsgrpoError
from tests.material.http_stub import ANSWER

TEMPLATE = "{images}\nQuestion: {question}"
SAMPLING = SamplingParams(temperature=0.0, top_p=1.0, seed=0, max_tokens=64)
COMPLETE = "/v1/chat/completions"
DECODERS = IsolatedDecoders(2)  # started once for all tests
atexit.register(DECODERS.close)


class FakeAnswerer:
    """Says ANSWER in pieces, remembers what it was asked, and waits for `gate` before it answers."""

    name = "served"
    is_concurrent = True

    def __init__(self, text: str = ANSWER) -> None:
        self.text = text
        self.prompts: list[Prompt] = []
        self.samplings: list[SamplingParams] = []
        self.gate = threading.Event()
        self.gate.set()

    def start(self) -> None:
        pass

    def stream(self, prompt: Prompt) -> Generator[str | Answer]:
        self.prompts.append(prompt)
        assert self.gate.wait(10)
        if self.text == "down":
            raise RsgrpoError("endpoint is down")
        if self.text == "bug":
            raise ZeroDivisionError
        if self.text == "refused":
            yield Answer(prompt, "", "error", "the prompt is too long")
            return
        yield self.text[:10]
        yield self.text[10:]
        yield Answer(prompt, self.text, "stop")

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        for prompt in prompts:
            yield from (piece for piece in self.stream(prompt) if isinstance(piece, Answer))

    def sampled(self, sampling: SamplingParams) -> FakeAnswerer:
        self.samplings.append(sampling)
        return self

    def close(self) -> None:
        pass


def png(width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(buffer, "PNG")
    return buffer.getvalue()


def data_url(content: bytes | None = None) -> str:
    return "data:image/png;base64," + base64.b64encode(png() if content is None else content).decode()


def image_part(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def request_of(*urls: Any, **fields: Any) -> dict[str, Any]:
    content = [*map(image_part, urls), {"type": "text", "text": "how much?"}]
    return {"messages": [{"role": "user", "content": content}]} | fields


def talk(
    scene: Callable[[Any], Awaitable[Any]],
    answerer: FakeAnswerer | None = None,
    *,
    folders: Sequence[Path] = (),
    **settings: Any,
) -> Any:
    """Start a server, play one scene with a client, and stop it."""
    limits = RequestLimits(max_images=2, image_bytes=MIB, image_pixels=10_000, folders=tuple(folders))
    config = ServeConfig(
        settings.pop("template", TEMPLATE), "", settings.pop("rules", SamplingRules(SAMPLING)), limits, **settings
    )

    async def play() -> Any:
        server = Server(config, answerer or FakeAnswerer(), DECODERS)
        async with TestClient(TestServer(server.app)) as client:
            return await scene(client)

    return asyncio.run(play())


def post(body: Any, answerer: FakeAnswerer | None = None, **settings: Any) -> tuple[int, dict[str, Any], Any]:
    """Send one request; return status, JSON body and headers."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def scene(client: Any) -> Any:
        reply = await client.post(COMPLETE, data=io.BytesIO(raw), headers={"Content-Type": "application/json"})
        return reply.status, await reply.json(), reply.headers

    return talk(scene, answerer, **settings)


def refusal(body: Any, **settings: Any) -> tuple[int, str]:
    """Send a request that is refused before the model sees it; return status and message."""
    answerer = FakeAnswerer()
    status, reply, _ = post(body, answerer, **settings)
    assert answerer.prompts == []
    assert reply["error"]["code"] == status
    return status, reply["error"]["message"]
