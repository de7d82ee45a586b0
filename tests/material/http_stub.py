"""Servers for tests, on this machine: any HTTP handler in a thread, an OpenAI-compatible endpoint, and a teacher."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWER = "<observe>o</observe>\n<evidence>\n[1]: 16%\n</evidence>\n<think>[1]</think>\n<answer>16%</answer>"


class QuietHandler(BaseHTTPRequestHandler):
    """Reads a body, sends a reply, and writes no log."""

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def send_json(self, status: int, value: Any) -> None:
        self.send(status, {"Content-Type": "application/json"}, json.dumps(value).encode())


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve in a thread; the value is the server's address, http://127.0.0.1:PORT."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@dataclass
class EndpointStub:
    """An OpenAI-compatible endpoint that behaves as `reply` says.

    reply: (number of the request, request body) -> (status, headers, reply body); a text answers with a completion.
    model: the one it serves. usage: (prompt tokens, response tokens) of every completion; None tells none.
    """

    reply: Callable[[int, dict[str, Any]], Any]
    model: str = "served-model"
    usage: tuple[int, int] | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""


def endpoint_handler(stub: EndpointStub) -> type[QuietHandler]:
    """Return the HTTP side of an endpoint."""
    lock = threading.Lock()

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            self.send_json(200, {"data": [{"id": stub.model}]})

        def do_POST(self) -> None:
            body = json.loads(self.body())
            with lock:
                stub.bodies.append(body)
                stub.keys.append(self.headers.get("Authorization"))
                reply = stub.reply(len(stub.bodies), body)
            if isinstance(reply, tuple):
                self.send(reply[0], reply[1], reply[2].encode())
            elif body.get("stream"):
                pieces = [reply[place : place + 7] for place in range(0, len(reply), 7)]
                events: list[dict[str, Any]] = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
                events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
                text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
                self.send(200, {"Content-Type": "text/event-stream"}, text.encode())
            else:
                choice = {"message": {"content": reply}, "finish_reason": "stop"}
                usage = dict(zip(("prompt_tokens", "completion_tokens"), stub.usage or (), strict=False))
                self.send_json(200, {"choices": [choice]} | ({"usage": usage} if usage else {}))

    return Handler


def start_endpoint(
    stack: ExitStack, reply: Callable[[int, dict[str, Any]], Any] = lambda *_: ANSWER, **settings: Any
) -> EndpointStub:
    """Start an endpoint that ends with the stack. settings: fields of EndpointStub."""
    stub = EndpointStub(reply, **settings)
    stub.url = stack.enter_context(serving(endpoint_handler(stub))) + "/v1"
    return stub


Say = Callable[[Any, int], str | int]
"""Takes what is asked about and how often it was asked about before; returns a text, or an HTTP status."""


class Teacher:
    """An endpoint that answers by what it is asked about; every answer costs 1000 and 100 tokens.

    subject: takes the content of the user message and returns what it asks about.
    """

    def __init__(self, stack: ExitStack, subject: Callable[[list[dict[str, Any]]], Any], say: Say) -> None:
        self.say = say
        self.asked: list[Any] = []
        self.texts: list[str] = []
        self.seeds: list[int] = []
        self.times: list[float] = []
        self._subject = subject
        self.url = start_endpoint(stack, self._reply, model="teacher", usage=(1000, 100)).url

    def _reply(self, _: int, body: dict[str, Any]) -> Any:
        content = body["messages"][-1]["content"]
        subject = self._subject(content)
        said = self.say(subject, self.asked.count(subject))
        self.asked.append(subject)
        self.texts.append("".join(part.get("text", "") for part in content))
        self.seeds.append(body["seed"])
        self.times.append(time.monotonic())
        return (said, {}, '{"error": {"message": "no"}}') if isinstance(said, int) else said
