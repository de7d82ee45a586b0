"""The HTTP server: what it answers, what it refuses and how, how much it takes at once, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Generator
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from recipes.answers.types import Answer
from recipes.serve import server as serve
from recipes.serve.chat_request import MIB, RequestLimits
from recipes.serve.sampling import SamplingRules
from recipes.serve.server import ServeConfig, Server
from rollout.types import Observation, Prompt
from tests.material.http_stub import ANSWER
from tests.material.serve import (
    COMPLETE,
    SAMPLING,
    TEMPLATE,
    FakeAnswerer,
    data_url,
    image_part,
    png,
    post,
    refusal,
    request_of,
    talk,
)

# Answers


def test_an_answer_has_the_usual_choices_and_the_parsed_fields_beside_them():
    answerer = FakeAnswerer()
    status, reply, _ = post(request_of(data_url(), model="served", temperature=0, max_tokens=500), answerer)
    assert status == 200
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": ANSWER}
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert (reply["object"], reply["model"]) == ("chat.completion", "served")
    parsed = reply["parsed"]
    assert (parsed["answer"], parsed["format_ok"], parsed["citations"]) == ("16%", True, [1])
    assert parsed["evidence"] == [{"index": 1, "image": None, "relevant": True, "text": "16%"}]
    assert answerer.prompts[0].text == "[1]: <image>\nQuestion: how much?"
    assert answerer.prompts[0].images == (png(),)


def test_a_system_message_and_plain_text_content_are_taken():
    answerer = FakeAnswerer()
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    assert post({"messages": messages}, answerer)[0] == 200
    assert (answerer.prompts[0].system, answerer.prompts[0].text) == ("be brief", "\nQuestion: why?")


def test_a_stream_ends_with_the_parsed_fields():
    async def scene(client: Any) -> str:
        reply = await client.post(COMPLETE, json=request_of(data_url(), stream=True))
        assert reply.content_type == "text/event-stream"
        return await reply.text()

    events = [line.removeprefix("data: ") for line in talk(scene).split("\n\n") if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == ANSWER
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert chunks[-1]["parsed"]["answer"] == "16%"


class Looks(FakeAnswerer):
    """Opens a page before it answers."""

    def steps(self, prompt: Prompt) -> Generator[str | Observation | Answer]:
        yield "<open>1</open>"
        step = Observation(0, 14, (), "[1]<image>", (png(),), {"call": "open", "number": 1})
        yield step
        yield ANSWER
        yield Answer(prompt, f"<open>1</open>\n{ANSWER}", "stop", observations=(step,))


def test_a_stream_tells_the_steps_of_a_model_that_looks_for_its_pages():
    async def scene(client: Any) -> str:
        return await (await client.post(COMPLETE, json=request_of(stream=True))).text()

    chunks = [json.loads(line.removeprefix("data: ")) for line in talk(scene, Looks()).split("\n\n")[:-2]]
    told = {"call": "open", "number": 1, "at_char": 14, "fault": "", "text": "[1]<image>", "images": 1}
    assert [chunk.get("step") for chunk in chunks] == [None, told, None, None]
    assert (chunks[-1]["parsed"]["answer"], chunks[-1]["parsed"]["steps"]) == ("16%", [told])
    status, reply, _ = post(request_of(), Looks())
    assert (status, reply["parsed"]["steps"]) == (200, [told])


def test_a_file_in_an_allowed_folder_is_read_by_path_or_file_address(tmp_path):
    (tmp_path / "a b.png").write_bytes(png())
    for address in ("a b.png", str(tmp_path / "a b.png"), f"file://{tmp_path}/a%20b.png"):
        status, reply, _ = post(request_of(address), folders=[tmp_path])
        assert status == 200, address
        assert reply["parsed"]["evidence"][0]["image"] == address


def test_health_and_models():
    async def scene(client: Any) -> Any:
        return await (await client.get("/health")).json(), await (await client.get("/v1/models")).json()

    health, models = talk(scene)
    assert health == {"status": "ok", "model": "served", "requests": 0, "max_requests": 32}
    assert [model["id"] for model in models["data"]] == ["served"]


# Refusals


def test_a_100_mb_request_is_refused_by_its_length_and_also_while_it_arrives():
    body = request_of("data:image/png;base64," + "A" * 100_000_000)
    assert refusal(body)[0] == 413

    async def scene(client: Any) -> Any:
        async def chunks() -> Any:
            for _ in range(100):
                yield b" " * 1_000_000

        reply = await client.post(COMPLETE, data=chunks(), headers={"Content-Type": "application/json"})
        return reply.status, (await reply.json())["error"]["message"]

    assert talk(scene, request_bytes=2 * MIB) == (413, "the request is larger than 2,097,152 bytes")


def test_an_image_may_be_too_large_in_bytes_or_in_pixels(tmp_path):
    status, message = refusal(request_of("data:image/png;base64," + "A" * 2_000_000))
    assert (status, message) == (413, "image 1 has 1,500,000 bytes; this server takes 1,048,576")
    assert refusal(request_of(data_url(png(200, 100)))) == (
        413,
        "image 1 has 200 x 100 pixels; this server takes 10,000",
    )
    (tmp_path / "big.png").write_bytes(b"0" * (MIB + 1))
    assert refusal(request_of("big.png"), folders=[tmp_path])[0] == 413


def test_a_thousand_images_are_refused():
    assert refusal(request_of(*[data_url()] * 1000)) == (400, "the request has 1000 images; this server takes 2")


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"1", b'{"a":' + b"9" * 5000 + b"}"])
def test_a_body_that_is_no_json_object_is_refused(body):
    assert refusal(body)[0] == 400


def test_no_file_outside_of_the_allowed_folders_is_read(tmp_path):
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (allowed / "\u00e9.png").write_bytes(png())
    (allowed / "link.png").symlink_to(tmp_path / "secret.png")
    (allowed / "loop.png").symlink_to(allowed / "loop.png")
    (allowed / "folder").symlink_to(tmp_path)
    os.mkfifo(allowed / "pipe.png")
    addresses = [
        "../secret.png", f"{allowed}/../secret.png", "/etc/passwd", "file:///etc/passwd", "file://..%2Fsecret.png",
        *(f"file://{allowed}/{dots}/secret.png" for dots in ("..", "%2e%2e", "%252e%252e")), "link.png", "loop.png",
        "folder/secret.png", "pipe.png", "e\u0301.png", "a\0.png", "x" * 5000, "missing.png", ".",
    ]  # fmt: skip
    for address in addresses:
        status, message = refusal(request_of(address), folders=[allowed])
        assert status == 403, address
        assert message.startswith("image 1 must be a file in an allowed folder, its path relative to that folder; got ")


def test_without_an_allowed_folder_no_file_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    assert "no --allow-folder" in refusal(request_of(str(tmp_path / "a.png")))[1]


@pytest.mark.parametrize("address", ["http://example.com/a.png", "HTTPS://example.com/a.png", "ftp://example.com/a"])
def test_addresses_are_not_fetched(address, tmp_path):
    status, message = refusal(request_of(address), folders=[tmp_path])
    assert status == 400
    assert "are not fetched; send the image as a data URL" in message


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (
            [{"role": "tool", "content": "x"}],
            "messages[0].role must be 'system', 'developer', 'user' or 'assistant', got 'tool'",
        ),
        ([{"role": "assistant", "content": "x"}], "one question per request"),
        ([{"role": "user", "content": "x"}] * 2, "one user message, got 2"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "x"}], "must be the first one"),
        ([{"role": "user", "content": [{"type": "video"}]}], "messages[0].content[0]: Input tag 'video'"),
        ([{"role": "user", "content": [image_part(5)]}], "content[0].image_url.url must be a valid string, got 5"),
        ([{"role": "user", "content": [image_part("a.png")]}], "no text"),
        (
            [{"role": "user", "content": [image_part(None), {"type": "text", "text": "q"}]}],
            "content[0].image_url.url must be a valid string, got None",
        ),
        ([{"role": "user", "content": "what is <image>?"}], "must not contain <image>"),
        ([{"role": "user", "content": "  "}], "no text"),
        ([{"role": "user", "content": "\ud800"}], "the body: Invalid JSON"),
        ([{"role": "user"}], "messages[0].content is missing"),
        ([{"role": "user", "content": 5}], "messages[0].content must be a valid array, got 5"),
        ([{"content": "x"}], "messages[0].role is missing"),
        ([], "messages: List should have at least 1 item"),
        (None, "messages is missing"),
    ],
)
def test_messages_that_are_no_question_are_refused(messages, says):
    status, message = refusal({"messages": messages})
    assert status == 400
    assert says in message


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"model": "other"}, 404, "model 'other' is not served here"),
        ({"temperature": 1.0}, 400, "temperature=1 is not supported: this server always uses 0. Omit the field."),
        ({"n": 3}, 400, "n=3 is not supported"),
        ({"max_tokens": 5}, 400, "this server always allows 64 tokens"),
        ({"tools": []}, 400, "field 'tools' is not supported"),
        ({"stream": "yes"}, 400, "stream must be a valid boolean, got 'yes'"),
    ],
)
def test_a_field_that_this_server_cannot_honour_is_refused(fields, status, says):
    found, message = refusal(request_of(data_url(), **fields))
    assert found == status
    assert says in message


@pytest.mark.parametrize(
    "url",
    [data_url(b"no image"), data_url(png()[:60]), "data:image/png;base64,???", "data:text/html;base64,AA==", "data:,x"],
)
def test_an_image_that_cannot_be_read_is_refused(url):
    assert refusal(request_of(url))[0] == 400


def test_other_paths_methods_and_content_types_are_json_errors_too():
    async def scene(client: Any) -> Any:
        replies = [
            await client.get("/nowhere"),
            await client.get(COMPLETE),
            await client.post(COMPLETE, data="{}", headers={"Content-Type": "text/plain"}),
        ]
        return [(reply.status, (await reply.json())["error"]["code"]) for reply in replies]

    assert talk(scene) == [(404, 404), (405, 405), (415, 415)]


# Faults behind the server


def test_a_prompt_that_the_model_refuses_is_the_clients_fault_and_a_model_that_is_down_is_not():
    status, reply, _ = post(request_of(data_url()), FakeAnswerer("refused"))
    assert (status, reply["error"]["message"]) == (422, "the question cannot be answered: the prompt is too long")
    status, reply, headers = post(request_of(data_url()), FakeAnswerer("down"))
    assert (status, reply["error"]["message"], headers["Retry-After"]) == (502, "endpoint is down", "5")
    status, reply, _ = post(request_of(data_url(), stream=True), FakeAnswerer("down"))
    assert (status, reply["error"]["message"]) == (502, "endpoint is down")


def test_a_bug_behind_the_server_is_one_answer_and_not_the_end():
    async def scene(client: Any) -> list[int]:
        return [(await client.post(COMPLETE, json=request_of(data_url()))).status for _ in range(2)]

    assert talk(scene, FakeAnswerer("bug"), max_requests=1) == [502, 502]


# How much at once, and the end


def test_requests_over_the_limit_are_told_to_come_back():
    answerer = FakeAnswerer()
    answerer.gate.clear()

    async def scene(client: Any) -> Any:
        first = [asyncio.create_task(client.post(COMPLETE, json=request_of(data_url()))) for _ in range(2)]
        while (await (await client.get("/health")).json())["requests"] < 2:
            await asyncio.sleep(0.01)
        third = await client.post(COMPLETE, json=request_of(data_url()))
        answerer.gate.set()
        done = [(await task).status for task in first]
        fourth = await client.post(COMPLETE, json=request_of(data_url()))
        return third.status, third.headers["Retry-After"], done, fourth.status

    assert talk(scene, answerer, max_requests=2) == (429, "5", [200, 200], 200)


def test_a_closing_server_finishes_what_it_took_and_takes_no_more():
    answerer = FakeAnswerer()
    answerer.gate.clear()

    async def play() -> Any:
        server = Server(ServeConfig(TEMPLATE, "", SamplingRules(SAMPLING), RequestLimits()), answerer)
        async with TestClient(TestServer(server.app)) as client:
            taken = asyncio.create_task(client.post(COMPLETE, json=request_of(data_url())))
            while not answerer.prompts:
                await asyncio.sleep(0.01)
            await server.app.shutdown()
            late = await client.post(COMPLETE, json=request_of(data_url()))
            answerer.gate.set()
            health = await client.get("/health")
            return (await taken).status, late.status, late.headers["Retry-After"], health.status

    assert asyncio.run(play()) == (200, 503, "5", 503)


# The command line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--allow-folder", "nowhere"], "--allow-folder nowhere is not a folder"),
        (["--max-requests", "0"], "--max-requests must be >= 1, got 0"),
        (["--max-image-mib", "0"], "--max-image-mib must be >= 1, got 0"),
        ([], "--model is empty"),
        (["--prompt", "evidenc"], "did you mean evidence?"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, says, capsys):
    assert serve.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
