"""Engines behind the HTTP server: what waits is one batch, one listener hears pieces, and a real one does both."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from aiohttp.test_utils import TestClient, TestServer

from recipes.answers.engine import LocalAnswerer
from recipes.answers.spec import AnswerModelConfig, AnswerRolloutConfig, AnswerSpec
from recipes.answers.types import Answer
from recipes.serve.chat_request import RequestLimits
from recipes.serve.queue import Piece, PromptQueue
from recipes.serve.sampling import SamplingRules
from recipes.serve.server import ServeConfig, Server
from rollout.config import InputsConfig
from rollout.types import Prompt, SamplingParams
from tests.material.serve import COMPLETE, TEMPLATE, data_url, request_of


def test_an_engine_is_given_what_waits_as_one_batch(monkeypatch):
    engine = LocalAnswerer(AnswerSpec(AnswerModelConfig("m")))
    batches: list[list[str]] = []
    heard: list[Piece] = []
    gate = threading.Event()

    def answer(prompts: Sequence[Prompt]) -> Iterator[Answer]:
        batches.append([prompt.id for prompt in prompts])
        assert gate.wait(10)
        yield from (Answer(prompt, "text", "stop") for prompt in prompts[:2])

    monkeypatch.setattr(engine, "answer", answer)
    prompts = PromptQueue(engine, num_threads=9, batch_size=3)
    prompts.ask(Prompt("first", "t"), heard.append, streams=False)
    while not batches:
        threading.Event().wait(0.01)
    for name in "abcd":
        prompts.ask(Prompt(name, "t"), heard.append, streams=False)
    gate.set()
    while len(heard) < 5:
        threading.Event().wait(0.01)
    prompts.close()
    assert batches == [["first"], ["a", "b", "c"], ["d"]]
    assert [type(piece).__name__ for piece in heard] == ["Answer", "Answer", "Answer", "RsgrpoError", "Answer"]


def test_an_engine_writes_for_one_listener_at_a_time_and_for_the_others_in_batches(monkeypatch):
    engine = LocalAnswerer(AnswerSpec(AnswerModelConfig("m")))
    worked: list[list[str]] = []
    gate, done = threading.Event(), threading.Semaphore(0)

    def answer(prompts: Sequence[Prompt]) -> Iterator[Answer]:
        assert gate.wait(10)
        worked.append([prompt.id for prompt in prompts])
        yield from (Answer(prompt, "text", "stop") for prompt in prompts)

    def stream(prompt: Prompt) -> Generator[str | Answer]:
        worked.append([f"{prompt.id} in pieces"])
        yield from ("te", "xt", Answer(prompt, "text", "stop"))

    def hear(piece: Piece) -> None:
        heard.append(piece)
        if not isinstance(piece, str):
            done.release()

    heard: list[Piece] = []
    monkeypatch.setattr(engine, "answer", answer)
    monkeypatch.setattr(engine, "steps", stream)
    prompts = PromptQueue(engine, num_threads=9, batch_size=3)
    for name in "abCDefg":
        prompts.ask(Prompt(name, "t"), hear, streams=name.isupper())
    gate.set()
    for _ in range(7):
        assert done.acquire(timeout=10)
    prompts.close()
    assert [name for batch in worked for name in batch] == ["a", "b", "C in pieces", "D in pieces", "e", "f", "g"]
    assert worked[-1] in (["e", "f", "g"], ["f", "g"], ["g"])
    assert sum(isinstance(piece, str) for piece in heard) == 4


def test_a_real_engine_streams_and_answers_in_one_server(tiny_model_path):
    """Transformers behind HTTP: pieces while they are written, then the parsed fields; and a whole answer beside it."""
    rollout = AnswerRolloutConfig(max_response_tokens=12, num_threads=1)
    inputs = InputsConfig(min_pixels=784, max_pixels=3136, max_prompt_tokens=400)
    engine = LocalAnswerer(AnswerSpec(AnswerModelConfig(tiny_model_path), rollout, inputs))
    limits = RequestLimits(max_images=2)

    async def play() -> Any:
        rules = SamplingRules(SamplingParams(temperature=0.0, max_tokens=12))
        config = ServeConfig(TEMPLATE, "", rules, limits)
        async with TestClient(TestServer(Server(config, engine).app)) as client:
            streamed = client.post(COMPLETE, json=request_of(data_url(), stream=True))
            whole = client.post(COMPLETE, json=request_of(data_url()))
            first, second = await asyncio.gather(streamed, whole)
            return await first.text(), await second.json()

    text, reply = asyncio.run(play())
    engine.close()
    *events, end = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    chunks = [json.loads(event) for event in events]
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert end == "[DONE]"
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == reply["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == reply["choices"][0]["finish_reason"]
    assert chunks[-1]["parsed"]["raw"] == reply["parsed"]["raw"]
