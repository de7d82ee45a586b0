"""Sampling that requests choose: within the owner's limits, seeded, cut at stop texts, with usage and earlier turns."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from recipes.answers.endpoint.client import Endpoint
from recipes.answers.engine import LocalAnswerer
from recipes.answers.spec import AnswerModelConfig, AnswerSpec, EndpointConfig
from recipes.answers.types import Answer
from recipes.serve.chat_request import RequestLimits
from recipes.serve.sampling import SamplingRules, StopWatch, cut
from recipes.serve.server import ServeConfig, Server
from rollout.config import InputsConfig
from rollout.inputs.processor import InputProcessor
from rollout.types import Prompt, SamplingParams
from tests.material.answering import GREEDY, SMALL, write_page
from tests.material.serve import COMPLETE, SAMPLING, FakeAnswerer, data_url, image_part, post, refusal, request_of, talk

FREE = SamplingRules(SAMPLING, is_free=True)


def turn(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def test_a_request_chooses_its_sampling_within_the_owners_limits():
    answerer = FakeAnswerer()
    wanted = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 11, "max_tokens": 9}
    assert post(request_of(**wanted), answerer, rules=FREE)[0] == 200
    assert answerer.samplings == [SamplingParams(1, 0.7, 0.9, 5, 9, 11)]
    assert post(request_of(max_tokens=9_999), answerer, rules=FREE)[0] == 200  # cut off at the owner's limit
    assert answerer.samplings[1] == SAMPLING


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 2.5}, "temperature must be between 0 and 2, got 2.5"),
        ({"top_p": 0}, "top_p must be between 1e-06 and 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"n": 5}, "n must be between 1 and 4, got 5"),
        ({"n": 1.5}, "n must be a whole number, got 1.5"),
        ({"n": 2, "stream": True}, "n=2 cannot be streamed: set n to 1, or stream to false"),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"stop": ["a"] * 9}, "stop must be at most 8 texts"),
        ({"stop": ""}, "stop must be at most 8 texts"),
        ({"top_logprobs": 3}, "top_logprobs=3 is not supported: omit the field"),
        ({"presence_penalty": 0.5}, "presence_penalty=0.5 is not supported: omit the field"),
    ],
)
def test_what_is_outside_of_the_limits_is_refused(fields, message):
    status, said = refusal(request_of(**fields), rules=FREE)
    assert status == 400
    assert said.startswith(message)


def test_without_the_option_requests_choose_nothing():
    assert refusal(request_of(stop="x"))[1] == "stop is not supported: this server was started without --allow-sampling"
    messages = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    assert "earlier turns are not supported" in refusal({"messages": messages})[1]


def test_a_server_in_front_of_another_knows_no_logprobs():
    rules = replace(FREE, has_logprobs=False)
    assert "logprobs are not known" in refusal(request_of(logprobs=True), rules=rules)[1]


def test_an_answer_ends_before_the_first_stop_text_with_the_tokens_that_are_left():
    answer = Answer(
        Prompt("p", "t"), "one two three", "length", tokens=("one ", "two ", "three"), logprobs=(-1, -2, -3)
    )
    found = cut(replace(answer, num_response_tokens=3), ["three", "wo"])
    assert (found.text, found.finish_reason, found.tokens, found.logprobs) == (
        "one t",
        "stop",
        ("one ", "two "),
        (-1, -2),
    )
    assert found.num_response_tokens == 2
    assert cut(answer, ["four"]) is answer


def test_a_stop_text_is_found_across_pieces_and_never_sent_in_part():
    stops = StopWatch(["</answer>"])
    sent = [stops.pass_on(piece) for piece in ("16", "%</ans", "wer>", " more")]
    assert "".join(sent) == "16%"
    assert stops.is_over
    assert "".join(StopWatch([]).pass_on(piece) for piece in ("a", "b")) == "ab"


def test_a_stream_stops_at_a_stop_text_and_ends_with_the_usage_if_asked():
    async def scene(client: Any) -> str:
        body = request_of(stream=True, stop=["</observe>"], stream_options={"include_usage": True})
        return await (await client.post(COMPLETE, json=body)).text()

    class Counting(FakeAnswerer):
        def stream(self, prompt):
            for piece in super().stream(prompt):
                counted: Any = {"num_prompt_tokens": 5, "num_response_tokens": 7}
                yield replace(piece, **counted) if isinstance(piece, Answer) else piece

    *lines, done = [line.removeprefix("data: ") for line in talk(scene, Counting(), rules=FREE).split("\n\n") if line]
    chunks = [json.loads(line) for line in lines]
    assert done == "[DONE]"
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    assert text == FakeAnswerer().text.partition("</observe>")[0]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["total_tokens"]) == ([], 12)


def test_earlier_turns_go_to_the_model_with_their_pages():
    answerer = FakeAnswerer()
    messages = [
        turn("system", "be brief"),
        turn("user", image_part(data_url()), "what is it?"),
        turn("assistant", "a page"),
        turn("user", "and its size?"),
    ]
    status, reply, _ = post({"messages": messages}, answerer, rules=FREE, template="")
    assert status == 200
    [prompt] = answerer.prompts
    assert (prompt.system, prompt.history, prompt.text) == (
        "be brief",
        (("<image>what is it?", "a page"),),
        "and its size?",
    )
    assert len(prompt.images) == 1
    assert reply["parsed"]["evidence"][0]["image"] is None
    for wrong in (messages[:3], [*messages[:2], messages[1]], [messages[2]]):
        assert "must alternate from user to user" in refusal({"messages": wrong}, rules=FREE)[1]


def test_earlier_turns_are_rendered_as_the_chat_template_says_and_sent_on_to_endpoints(
    tiny_model_path, serve, tmp_path
):
    page = write_page(tmp_path)
    history = (("<image>what is it?", "a page"),)
    prompt = Prompt("p", "and <image>?", (page, page), system="brief", history=history)
    rendered = InputProcessor(tiny_model_path, InputsConfig(784, 3136)).template.prompt(prompt)
    places = [rendered.index(text) for text in ("brief", "what is it?", "a page", "and ")]
    assert places == sorted(places)
    assert rendered.count("<|image_pad|>") == 2
    stub = serve()
    endpoint = Endpoint(EndpointConfig(stub.url, model="m"), GREEDY, SMALL)
    try:
        list(endpoint.sampled(replace(GREEDY, max_tokens=5)).answer([prompt]))
    finally:
        endpoint.close()
    sent = stub.bodies[-1]
    assert [message["role"] for message in sent["messages"]] == ["system", "user", "assistant", "user"]
    assert sent["max_tokens"] == 5
    kinds = [[part["type"] for part in sent["messages"][number]["content"]] for number in (1, 3)]
    assert kinds == [["image_url", "text"], ["text", "image_url", "text"]]


def test_a_real_engine_answers_seeded_requests_alike_and_choices_differently(tiny_model_path):
    engine = LocalAnswerer(AnswerSpec(AnswerModelConfig(tiny_model_path), inputs=SMALL))
    engine.start()
    rules = SamplingRules(SamplingParams(temperature=0.0, max_tokens=12), is_free=True)

    async def play() -> list[dict[str, Any]]:
        server = Server(ServeConfig("", "", rules, RequestLimits()), engine)
        async with TestClient(TestServer(server.app)) as client:
            body = request_of(data_url(), temperature=1, seed=3, n=2, logprobs=True)
            asked = [
                client.post(COMPLETE, json=one) for one in (body, body, body | {"seed": 4}, body | {"max_tokens": 4})
            ]
            return [await reply.json() for reply in await asyncio.gather(*asked)]

    one, same, other, short = asyncio.run(play())
    texts = [[choice["message"]["content"] for choice in reply["choices"]] for reply in (one, same, other)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]
    first = one["choices"][0]
    assert "".join(token["token"] for token in first["logprobs"]["content"]) == first["message"]["content"]
    assert all(math.isfinite(token["logprob"]) and token["logprob"] < 0 for token in first["logprobs"]["content"])
    assert short["usage"]["completion_tokens"] <= 2 * 4
    assert one["usage"]["total_tokens"] == one["usage"]["prompt_tokens"] + one["usage"]["completion_tokens"]
