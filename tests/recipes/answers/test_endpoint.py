"""Asking an OpenAI-compatible endpoint: what is sent, what is retried, what stops, and streaming."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

from recipes.answers.endpoint.client import Endpoint, EndpointError
from recipes.answers.spec import EndpointConfig
from rollout.types import Prompt
from rsgrpo.errors import RsgrpoError
from tests.material.answering import GREEDY, SMALL, prompts_of
from tests.material.http_stub import ANSWER, EndpointStub


@pytest.fixture
def connect() -> Iterator[Callable[..., Endpoint]]:
    """Open endpoints that hardly wait between tries."""
    opened: list[Endpoint] = []

    def start(server: EndpointStub, **settings: Any) -> Endpoint:
        defaults: dict[str, Any] = {"url": server.url, "backoff_s": 0.01, "max_tries": 3}
        config = EndpointConfig(**(defaults | settings))
        opened.append(Endpoint(config, GREEDY, SMALL))
        return opened[-1]

    yield start
    for endpoint in opened:
        endpoint.close()


def texts(endpoint: Endpoint, prompts: list[Prompt]) -> dict[str, str]:
    return {output.prompt.id: output.error or output.text for output in endpoint.answer(prompts)}


def test_an_endpoint_answers_every_prompt(serve, connect):
    server = serve(lambda _, body: body["messages"][0]["content"][-1]["text"].upper())
    assert texts(connect(server), prompts_of(20)) == {f"q{number}": f"QUESTION {number}" for number in range(20)}


def test_the_request_holds_pages_and_text_in_order_and_the_sampling(serve, connect, page):
    server = serve()
    prompt = Prompt("q", "first <image> then <image> last", (page, page), system="Be brief.")
    assert [output.text for output in connect(server).answer([prompt])] == [ANSWER]
    body = server.bodies[0]
    kinds = [part["type"] for part in body["messages"][1]["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    assert body["messages"][0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("served-model", 0.0, 64)
    assert "top_k" not in body


def test_pages_are_sent_as_training_sees_them(serve, connect, page):
    server = serve()
    list(connect(server).answer(prompts_of(1, page)))
    url = server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as sent:
        assert sent.size == (56, 28)  # 200 x 100 within 3136 pixels, sides multiples of 28


def test_the_key_comes_from_the_environment(serve, connect, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    server = serve()
    list(connect(server, api_key_env="MY_KEY").answer(prompts_of(1)))
    list(connect(server, api_key_env="NO_SUCH_KEY").answer(prompts_of(1)))
    assert server.keys == ["Bearer secret", None]


def test_failures_that_pass_are_tried_again(serve, connect):
    server = serve(lambda number, _: (503, {"Retry-After": "0"}, "busy") if number < 3 else ANSWER)
    assert texts(connect(server), prompts_of(1)) == {"q0": ANSWER}
    assert len(server.bodies) == 3


def test_a_request_that_the_server_refuses_stops_no_other(serve, connect):
    def reply(_, body):
        if "question 1" in str(body):
            return 400, {}, json.dumps({"error": {"message": "too long"}})
        return ANSWER

    found = texts(connect(serve(reply)), prompts_of(3))
    assert found == {"q0": ANSWER, "q1": "the endpoint refuses the request, HTTP 400: too long", "q2": ANSWER}


def test_a_request_that_always_crashes_the_server_stops_no_other(serve, connect):
    server = serve(lambda _, body: (500, {}, "boom") if "question 0" in str(body) else ANSWER)
    found = texts(connect(server, concurrency=2), prompts_of(6))
    assert found.pop("q0") == "the endpoint failed 3 times, the last time with HTTP 500: boom"
    assert set(found.values()) == {ANSWER}


def test_a_page_that_is_missing_or_too_many_pages_are_that_prompts_error(serve, connect, tmp_path, page):
    prompts = [*prompts_of(1, str(tmp_path / "none.png")), Prompt("many", "<image>" * 3, (page,) * 3)]
    found = texts(connect(serve()), prompts)
    assert found["q0"].endswith("none.png does not exist")
    assert found["many"] == "the prompt has 3 images, inputs.max_images is 2"


@pytest.mark.parametrize(("status", "hint"), [(401, "OPENAI_API_KEY"), (404, "usually ends in /v1")])
def test_a_hopeless_refusal_stops_at_once_and_says_why(serve, connect, status, hint):
    server = serve(lambda *_: (status, {}, "no"))
    with pytest.raises(EndpointError, match=f"HTTP {status}: no; .*{hint}"):
        list(connect(server).answer(prompts_of(1)))
    assert len(server.bodies) == 1


def test_a_server_that_is_down_is_an_error_with_the_reason():
    config = EndpointConfig(url="http://127.0.0.1:9/v1", model="m", max_tries=2, backoff_s=0.0)
    endpoint = Endpoint(config, GREEDY, SMALL)
    with pytest.raises(EndpointError, match=r"127.0.0.1:9/v1 did not answer in 2 tries, the last was ConnectError"):
        list(endpoint.answer(prompts_of(3)))
    endpoint.close()


def test_a_streamed_answer_comes_in_pieces_and_then_whole(serve, connect):
    *pieces, output = connect(serve()).stream(prompts_of(1)[0])
    assert len(pieces) > 5
    assert "".join(pieces) == ANSWER
    assert (output.text, output.finish_reason, output.error) == (ANSWER, "stop", "")


def test_a_server_that_does_not_stream_answers_at_once(serve, connect):
    body = json.dumps({"choices": [{"message": {"content": ANSWER}, "finish_reason": "length"}]})
    *pieces, output = connect(serve(lambda *_: (200, {}, body))).stream(prompts_of(1)[0])
    assert pieces == [ANSWER]
    assert output.finish_reason == "length"


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("", "the answer broke off: EOFError: the stream ended before the answer did"),
        ('data: {"error": {"message": "out of memory"}}\n\ndata: [DONE]\n\n', "broke off: out of memory"),
        ('data: {"error": "gone"}\n\n', "broke off: gone"),
        ('data: {"choices": [{"delta": null, "finish_reason": "length"}]}\n\n', ""),  # and no [DONE]
    ],
)
def test_a_stream_without_an_end_is_no_whole_answer(serve, connect, end, why):
    event = 'data: {"choices": [{"delta": {"content": "<obs"}}]}\n\n'
    reply = (200, {"Content-Type": "text/event-stream"}, event + end)
    *pieces, output = connect(serve(lambda *_: reply)).stream(prompts_of(1)[0])
    assert ("".join(pieces), output.text) == ("<obs", "<obs")
    assert output.finish_reason == ("error" if why else "length")
    assert output.error.endswith(why)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"url": "localhost:8000"}, "must start with http"),
        ({"concurrency": 0}, "endpoint.concurrency must be >= 1"),
        ({"max_tries": 0}, "endpoint.max_tries must be >= 1"),
        ({"timeout_s": 0}, "endpoint.timeout_s must be > 0"),
    ],
)
def test_impossible_endpoint_settings_are_refused(settings, complaint):
    with pytest.raises(RsgrpoError, match=complaint):
        EndpointConfig(**settings)
