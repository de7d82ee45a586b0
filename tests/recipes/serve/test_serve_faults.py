"""Clients that misbehave on the wire: who leaves is not answered, and a broken request is a clear one."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import pytest

from recipes.answers.engine import LocalAnswerer
from recipes.answers.spec import AnswerModelConfig, AnswerRolloutConfig, AnswerSpec
from recipes.answers.types import Answer
from recipes.serve.chat_request import MIB
from recipes.serve.queue import Piece, PromptQueue
from rollout.config import InputsConfig
from rollout.types import Prompt
from tests.material.serve import COMPLETE, FakeAnswerer, png, refusal, request_of, talk

HEAD = f"POST {COMPLETE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class EndlessAnswerer(FakeAnswerer):
    """Writes piece after piece until nobody listens. num_open: streams that it writes now."""

    def __init__(self) -> None:
        super().__init__()
        self.num_open = 0

    def stream(self, prompt: Prompt) -> Generator[str | Answer]:
        self.prompts.append(prompt)
        self.num_open += 1
        try:
            while True:
                time.sleep(0.005)
                yield "word "
        finally:
            self.num_open -= 1


def until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def say(client: Any, text: str, body: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Write to the server what no HTTP client would."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.server.port)
    writer.write(text.encode() + body)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_nobody_waits_for_any_more_is_ended_and_its_place_is_free(stream):
    answerer = EndlessAnswerer()

    async def scene(client: Any) -> Any:
        body = json.dumps(request_of(stream=stream)).encode()
        reader, writer = await say(client, f"{HEAD}Content-Length: {len(body)}\r\n\r\n", body)
        if stream:
            await reader.readuntil(b"word")
        await asyncio.to_thread(until, lambda: answerer.num_open == 1)
        writer.close()
        await asyncio.to_thread(until, lambda: answerer.num_open == 0)
        return (await (await client.get("/health")).json())["requests"]

    assert talk(scene, answerer, max_requests=1) == 0


def test_who_leaves_while_waiting_is_never_asked_for():
    answerer = FakeAnswerer()
    answerer.gate.clear()
    heard: list[Piece] = []
    prompts = PromptQueue(answerer, num_threads=1, batch_size=1)
    prompts.ask(Prompt("first", "t"), heard.append, streams=False)
    until(lambda: len(answerer.prompts) == 1)
    prompts.ask(Prompt("left", "t"), heard.append, streams=False).set()
    prompts.ask(Prompt("last", "t"), heard.append, streams=False)
    answerer.gate.set()
    until(lambda: sum(isinstance(piece, Answer) for piece in heard) == 2)
    prompts.close()
    assert [prompt.id for prompt in answerer.prompts] == ["first", "last"]


def test_an_engine_stops_writing_when_its_listener_has_left(tiny_model_path):
    rollout = AnswerRolloutConfig(temperature=1.0, max_response_tokens=400, num_threads=1)
    inputs = InputsConfig(min_pixels=784, max_pixels=3136, max_prompt_tokens=400)
    engine = LocalAnswerer(AnswerSpec(AnswerModelConfig(tiny_model_path), rollout, inputs, seed=1))
    prompts = PromptQueue(engine, num_threads=1, batch_size=4)
    heard: list[Piece] = []
    begun = threading.Event()

    def hear(piece: Piece) -> None:
        heard.append(piece)
        begun.set()

    left = prompts.ask(Prompt("long", "<image>what?", (png(),)), hear, streams=True)
    assert begun.wait(60)
    left.set()
    answered: list[Piece] = []
    prompts.ask(Prompt("next", "<image>what?", (png(),)), answered.append, streams=False)  # the engine is free
    until(lambda: bool(answered))
    prompts.close()
    engine.close()
    assert isinstance(answered[-1], Answer)
    assert not any(isinstance(piece, Answer) for piece in heard)
    assert len(heard) < 400


def test_a_body_that_cannot_be_unpacked_or_unpacks_to_too_much_is_refused():
    async def scene(client: Any) -> Any:
        replies = []
        for body in (b"no gzip", gzip.compress(b" " * 50 * MIB)):
            headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
            reply = await client.post(COMPLETE, data=body, headers=headers, compress=None)
            replies.append((reply.status, (await reply.json())["error"]["message"]))
        return replies

    broken, bomb = talk(scene, request_bytes=2 * MIB)
    assert broken[0] == 400
    assert broken[1].startswith("the body cannot be read: ")
    assert bomb == (413, "the request is larger than 2,097,152 bytes")


def test_a_request_that_does_not_arrive_gives_its_place_back(monkeypatch):
    monkeypatch.setattr("recipes.serve.server.BODY_TIMEOUT_S", 0.2)

    async def scene(client: Any) -> Any:
        reader, writer = await say(client, f"{HEAD}Content-Length: 1000\r\n\r\n", b"{")
        line = await reader.readline()
        writer.close()
        monkeypatch.setattr("recipes.serve.server.BODY_TIMEOUT_S", 60.0)  # a slow machine must not time this one out
        return line, (await client.post(COMPLETE, json=request_of())).status

    line, status = talk(scene, max_requests=1)
    assert line.split()[1] == b"408"
    assert status == 200


@pytest.mark.parametrize(
    "framing",
    ["Content-Length: -5", "Content-Length: 5\r\nContent-Length: 6", "Content-Length: 5\r\nTransfer-Encoding: chunked",
     "X: " + "a" * 20_000, "\r\n".join(f"X{number}: a" for number in range(2000))],
)  # fmt: skip
def test_what_is_no_http_is_a_400_and_the_server_goes_on(framing):
    async def scene(client: Any) -> Any:
        reader, writer = await say(client, f"{HEAD}{framing}\r\n\r\n", b"{}")
        line = await reader.readline()
        writer.close()
        return line, (await client.post(COMPLETE, json=request_of())).status

    line, status = talk(scene)
    assert line.split()[1] == b"400"
    assert status == 200


@pytest.mark.parametrize(
    "url",
    ["data:image/png;base64,", "data:image/svg+xml;base64,PHN2Zz4=", "data:image/png,abc", "\ud800.png", "file://",
     "a.png\0", "%2e%2e/a.png", "http:a.png"],
)  # fmt: skip
def test_an_address_that_means_nothing_is_refused(url, tmp_path):
    assert refusal(request_of(url), folders=[tmp_path])[0] in (400, 403)
