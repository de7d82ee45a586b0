"""What an endpoint may send instead of an answer: each is that prompt's error or a clear stop, and nothing is lost."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from recipes.answers.endpoint.client import Endpoint, EndpointError
from recipes.answers.spec import EndpointConfig
from recipes.answers.types import Answer
from rollout.config import InputsConfig
from rollout.types import Prompt, SamplingParams
from rsgrpo.errors import InputError
from tests.material.http_stub import QuietHandler, serving

EVENTS = {"Content-Type": "text/event-stream"}
Reply = Callable[[QuietHandler], None]


def ask(reply: Reply, *, stream: bool = False, timeout_s: float = 30.0) -> tuple[Answer, int]:
    """Ask once; return what came of it and the number of requests."""
    num_requests = 0

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            nonlocal num_requests
            num_requests += 1
            self.body()
            reply(self)

    with serving(Handler) as url:
        config = EndpointConfig(url=f"{url}/v1", model="m", max_tries=2, backoff_s=0.01, timeout_s=timeout_s)
        endpoint = Endpoint(config, SamplingParams(max_tokens=5), InputsConfig())
        try:
            prompt = Prompt("q", "why?")
            *_, output = endpoint.stream(prompt) if stream else endpoint.answer([prompt])
        finally:
            endpoint.close()
    assert isinstance(output, Answer)
    return output, num_requests


def send(content: Any, status: int = 200, **headers: str) -> Reply:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda handler: handler.send(
        status, {name.replace("_", "-"): value for name, value in headers.items()}, body
    )


def completion(**choice: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"} | choice]}


def events(*found: Any) -> bytes:
    return b"".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode() for event in found)


def delta(text: Any, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": reason}]}


def in_pieces(pieces: Sequence[bytes], headers: dict[str, str], wait_s: float = 0.0) -> Reply:
    """A reply without a length, piece by piece, until the other side has had enough."""

    def reply(handler: QuietHandler) -> None:
        handler.send_response(200)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.close_connection = True
        try:
            for piece in pieces:
                handler.wfile.write(piece)
                handler.wfile.flush()
                time.sleep(wait_s)
        except OSError:
            pass  # it hung up

    return reply


@pytest.mark.parametrize(
    "content",
    [b'{"choices": [{"mess', b"<html>Welcome</html>", b"", b"[" * 100_000, [1], None, {"choices": []},
     {"error": {"message": "no"}}, completion(message=None),
     completion(message={"content": [{"type": "text", "text": "yes"}]}),
     completion(message={"content": 5}), '{"choices": "é"}'.encode("latin-1")],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_is_no_completion_is_that_prompts_error_and_not_asked_again(content, stream):
    output, num_requests = ask(send(content), stream=stream)
    assert (output.finish_reason, output.text, num_requests) == ("error", "", 1)
    assert output.error.startswith("the answer broke off" if stream else "the reply is not a chat completion")


def test_the_error_shows_how_a_strange_reply_begins():
    assert "it begins b'<html>Welcome</html>'" in ask(send(b"<html>Welcome</html>"))[0].error


@pytest.mark.parametrize("usage", [[1], "many", {"prompt_tokens": "many", "completion_tokens": -1.5}, None])
def test_an_answer_is_not_lost_for_the_strange_count_of_its_tokens(usage):
    output, _ = ask(send(completion() | {"usage": usage}))
    assert (output.text, output.error) == ("yes", "")
    assert (output.num_prompt_tokens, output.num_response_tokens) == (None, None)


def test_what_is_no_unicode_in_an_answer_can_still_be_written():
    output, _ = ask(send(b'{"choices": [{"message": {"content": "a\\ud800b"}, "finish_reason": "length"}]}'))
    assert (output.text, output.finish_reason) == ("a?b", "length")
    output, _ = ask(in_pieces([events(delta("x"))[:-2] + b'\n\ndata: {"choices": [{"delta": {"content": "\\ud800"}, '
                               b'"finish_reason": "stop"}]}\n\n'], EVENTS), stream=True)  # fmt: skip
    assert output.text == "x?"


def test_a_redirect_is_a_stop_that_names_the_other_address():
    with pytest.raises(EndpointError, match=r"redirects to https://else\.where/v1: set endpoint\.url to that"):
        ask(send(b"", 307, Location="https://else.where/v1"))


def test_an_answer_that_never_ends_ends_at_its_time_limit():
    since = time.monotonic()
    with pytest.raises(EndpointError, match=r"the last was not finished within 0\.3 s"):
        ask(in_pieces([b" "] * 100, {"Content-Length": "100000"}, 0.05), timeout_s=0.3)
    output, _ = ask(in_pieces([events(delta("x"))] * 100, EVENTS, 0.05), stream=True, timeout_s=0.3)
    assert (output.finish_reason, output.error) == ("error", "the answer broke off: not finished within 0.3 s")
    assert set(output.text) == {"x"}
    assert time.monotonic() - since < 5


def test_a_stream_is_read_across_any_cut_and_only_a_line_feed_ends_a_line():
    text = "é€😀 a\u2028b\x85c\x0cd"
    whole = events(delta(text), delta("", "length")) + b"data: [DONE]\r\n\r\n"
    for ends in (whole, whole.replace(b"\n", b"\r\n")):
        output, _ = ask(in_pieces([bytes([byte]) for byte in ends], EVENTS), stream=True)
        assert (output.text, output.finish_reason, output.error) == (text, "length", "")


@pytest.mark.parametrize(
    "event",
    [*map(events, (5, [1], {"choices": [None]}, {"choices": "abc"}, {"choices": [{"delta": "x"}]}, delta(5))),
     b"data: {broken\n\n"],
)  # fmt: skip
def test_an_event_of_another_form_ends_the_stream_and_keeps_its_text(event):
    output, _ = ask(in_pieces([events(delta("half")) + event], EVENTS), stream=True)
    assert (output.finish_reason, output.text) == ("error", "half")
    assert output.error.startswith("the answer broke off: ")


def test_our_own_server_is_refused_where_it_would_put_our_prompt_into_its_own():
    class Handler(QuietHandler):
        def do_GET(self) -> None:
            self.send_json(200, {"data": [{"id": "m", "owned_by": "rsgrpo", "has_template": True}]})

    with serving(Handler) as url, pytest.raises(InputError, match="start it with --prompt raw"):
        Endpoint(EndpointConfig(url=f"{url}/v1"), SamplingParams(), InputsConfig())


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_is_too_long_or_compressed_is_refused_and_not_asked_for_again(monkeypatch, status, stream):
    monkeypatch.setattr("recipes.answers.endpoint.replies.MAX_REPLY_BYTES", 1 << 20)
    long = json.dumps(completion(message={"content": "x" * (2 << 20)})).encode()
    answer, num_requests = ask(send(long, status), stream=stream)
    assert "the reply is longer than 1 MiB" in str(answer.error)
    assert num_requests == 1
    answer, num_requests = ask(send(gzip.compress(long), status, Content_Encoding="gzip"), stream=stream)
    assert "the reply is compressed (gzip)" in str(answer.error)
    assert num_requests == 1
