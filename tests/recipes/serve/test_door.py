"""What strangers may cost a server: nothing before they are let in, and little afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from typing import Any

import pytest
from PIL import Image

from recipes.serve.chat_request import MAX_JSON_BYTES, MIB, RequestError, json_bytes
from recipes.serve.door import Door
from recipes.serve.replies import without_paths
from rollout.inputs.images import PromptError
from rollout.inputs.isolated import IsolatedDecoders
from tests.material.serve import COMPLETE, FakeAnswerer, data_url, png, post, refusal, request_of, talk
from tests.runs.fuzz.hostile_images import EPS, saved, tile_bomb


def answered(**headers: str) -> Any:
    async def scene(client: Any) -> Any:
        reply = await client.post(COMPLETE, json=request_of(), headers=headers)
        return reply.status, (await reply.json()).get("error", {}).get("message", "")

    return scene


def test_with_a_token_nobody_is_heard_without_it():
    door = Door(token="s3cret")
    assert talk(answered(Authorization="Bearer s3cret"), door=door)[0] == 200
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic s3cret"},
        {"Authorization": "s3cret"},
    ):
        status, message = talk(answered(**headers), door=door)
        assert (status, message) == (401, "this server needs a token: send Authorization: Bearer TOKEN")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "192.0.2.7", "Known.Example:80", ""])
def test_the_servers_own_names_are_answered(host):
    Door(hosts=("known.example",)).check(host, "")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil"])
def test_a_name_that_a_stranger_made_lead_here_is_refused(host):
    with pytest.raises(RequestError, match="is not called") as caught:
        Door(hosts=("known.example",)).check(host, "")
    assert caught.value.status == 403
    assert talk(answered(Host=host))[0] == 403


def test_a_body_of_lists_is_refused_before_it_is_parsed():
    body = b'{"messages":[' + b"[]," * (3 * MIB) + b"[]]}"
    status, message = refusal(body)
    assert status == 413
    assert message.endswith("bytes beside its images; this server takes 1,048,576")


def test_base64_does_not_count_and_nothing_hides_in_it():
    image = data_url(b"x" * 3 * MIB)
    body = json.dumps(request_of(image)).encode()
    assert json_bytes(body) == len(body) - len(image) + len("data:image/png;base64,")
    hidden = b'{"a":";base64,","messages":[' + b"[]," * MIB + b"[]]}"
    assert json_bytes(hidden) > MAX_JSON_BYTES
    assert json_bytes(b'"' + b';base64,"' * (2 * MIB)) > MAX_JSON_BYTES


def test_a_long_text_is_refused_before_it_is_tokenised():
    content = [{"type": "text", "text": "a " * 300_000}]
    status, message = refusal({"messages": [{"role": "user", "content": content}]})
    assert (status, message) == (413, "the messages have 600,000 characters; this server takes 480,000")


@pytest.mark.parametrize("content", [EPS, saved("ICO"), b"", b"GIF89a"], ids=["eps", "ico", "empty", "torn"])
def test_a_strange_image_is_a_json_error_of_one_line(content):
    status, message = refusal(request_of(data_url(content)))
    assert status == 400
    assert message.startswith("image 1 cannot be read: ")
    assert "\n" not in message


def test_a_bomb_is_refused():
    assert "stored in tiles" in refusal(request_of(data_url(tile_bomb())))[1]


def test_a_decoder_that_takes_too_long_or_too_much_is_replaced(monkeypatch):
    decoders = IsolatedDecoders(1, timeout_s=0.0)
    with pytest.raises(PromptError, match="more memory or time"):
        decoders.check(png(), 10_000)
    decoders._timeout_s = 60.0
    assert decoders.check(png(40, 30), 10_000) == (30, 40)
    assert decoders.check(png(40, 30), 10) == (30, 40)  # not decoded, but told
    decoders.close()
    small, large = IsolatedDecoders(1, memory_bytes=300 << 20), io.BytesIO()
    Image.new("RGB", (9000, 9000)).save(large, "PNG", compress_level=1)
    with pytest.raises(PromptError, match=r"memory"):
        small.check(large.getvalue(), 10**9)
    assert small.check(png(), 10_000) == (30, 40)
    small.close()


def test_a_failure_of_ours_is_json_and_tells_no_path(monkeypatch):
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("/secret/place")

    monkeypatch.setattr("recipes.serve.server.read_request", fail)
    status, reply, _ = post(request_of())
    assert status == 500
    assert reply["error"]["message"] == "the server failed; its log has the reason"
    text = "the model /data/models/x-1/export cannot be started: see /tmp/y/z.log, http://host/v1/a and 3/4"
    assert without_paths(text) == "the model (a path) cannot be started: see (a path), http://host/v1/a and 3/4"


def test_who_leaves_before_a_reader_is_free_takes_the_request_along(monkeypatch):
    """The readers are all busy; whoever waits for one holds no thread, and leaves nothing behind."""
    from recipes.serve import server

    begun, gate, read = threading.Event(), threading.Event(), []
    real = server.read_request

    def slow(body: bytes, *rest: Any) -> Any:
        read.append(len(body))
        begun.set()
        assert gate.wait(60)
        return real(body, *rest)

    monkeypatch.setattr(server, "read_request", slow)
    monkeypatch.setattr(server, "NUM_DECODERS", 1)

    async def scene(client: Any) -> Any:
        first = asyncio.create_task(client.post(COMPLETE, json=request_of()))
        await asyncio.to_thread(begun.wait, 60)
        others = [asyncio.create_task(client.post(COMPLETE, json=request_of(user="x" * n))) for n in range(1, 9)]
        while (await (await client.get("/health")).json())["requests"] < 9:
            await asyncio.sleep(0)
        for other in others:
            other.cancel()
        while (await (await client.get("/health")).json())["requests"] > 1:
            await asyncio.sleep(0)
        gate.set()
        return (await first).status, (await client.post(COMPLETE, json=request_of())).status

    assert talk(scene, FakeAnswerer()) == (200, 200)
    assert len(read) == 2


SERVER = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
import asyncio
from recipes.serve import door
from recipes.serve.door import Door, listen
from recipes.serve.server import Server
door.KEEP_ALIVE_S = 3.0  # what the test has to wait for
from tests.material.serve import FakeAnswerer, ServeConfig, TEMPLATE, SAMPLING, RequestLimits, SamplingRules
config = ServeConfig(TEMPLATE, "", SamplingRules(SAMPLING), RequestLimits())
port = int(sys.argv[1])
asyncio.run(listen(lambda: Server(config, FakeAnswerer()).app, "127.0.0.1", port, door=config.door,
                   shutdown_timeout_s=5, on_ready=lambda: print("ready", flush=True)))
"""


def test_idle_connections_neither_lock_others_out_nor_fill_the_log(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", SERVER, str(port)], stdout=subprocess.PIPE, stderr=stderr, env=environment
        ) as server,
    ):
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        refused = 0
        for one in held[64:]:  # these many are served at most
            with contextlib.suppress(OSError):
                one.sendall(b"GET / HTTP/1.1\r\n")
            one.settimeout(30)
            with contextlib.suppress(OSError):
                refused += one.recv(1) == b""
        assert refused > 0
        for one in held:
            one.close()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as reply:
            assert json.load(reply)["status"] == "ok"
        server.terminate()
        assert server.wait(60) == 0
    assert log.stat().st_size < 2000


def test_image_parts_are_named_as_the_client_named_them(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    status, reply, _ = post(request_of("a.png", data_url()), folders=[tmp_path])
    assert status == 200
    assert str(tmp_path) not in json.dumps(reply)
    assert reply["parsed"]["evidence"][0]["image"] == "a.png"
