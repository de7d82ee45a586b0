"""A store over HTTP: pages, answers and documents, what is refused and how, and questions while documents change."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData
from aiohttp.test_utils import TestClient, TestServer

pytest.importorskip("pypdfium2", reason="needs the retrieval extra")

from recipes import retrieve
from recipes.answers.reader import Reader
from recipes.retrieval.answers.library import Library, LibrarySettings
from recipes.retrieval.search.retriever import SearchSettings
from recipes.serve.documents import ROUTES, DocumentServer, DocumentServerConfig
from recipes.serve.door import Door
from tests.material.answering import Scripted, response
from tests.material.retrieval import QUIET, ingested, write_pdf

WORDS = SearchSettings(by="words")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of one PDF of two pages."""
    (tmp_path / "docs").mkdir()
    write_pdf(tmp_path / "docs/animals.pdf", ["the ibex climbs", "the otter swims"])
    ingested(tmp_path / "store", tmp_path / "docs")
    return tmp_path / "store"


def talk(store: Path, scene: Callable[[Any], Awaitable[Any]], *, reads: bool = True, **settings: Any) -> Any:
    """Start a server over the store, play one scene with a client, and stop it."""
    said = response("a goat", "the ibex climbs", "no relevant information")
    reader = Reader(Scripted(lambda _: said), "{images}\n{question}", "", "") if reads else None
    library = Library(store, store / "index", None, reader, LibrarySettings(workers=1), QUIET, WORDS)
    config = DocumentServerConfig(k=2, **settings)

    async def play() -> Any:
        async with TestClient(TestServer(DocumentServer(library, config).app)) as client:
            return await scene(client)

    return asyncio.run(play())


async def said(reply: Any) -> tuple[int, Any]:
    return reply.status, await reply.json()


def test_pages_are_found_shown_and_read(store):
    async def scene(client: Any) -> Any:
        found = await (await client.post("/v1/search", json={"query": "which animal is an ibex?"})).json()
        image = await (await client.get(found["pages"][0]["image"])).read()
        answered = await (await client.post("/v1/ask", json={"question": "what is an ibex?"})).json()
        return found, image, answered

    found, image, answered = talk(store, scene)
    assert (found["pages"][0]["document"], found["pages"][0]["number"]) == ("animals.pdf", 1)
    assert image[:4] == b"\x89PNG"
    assert (answered["answer"], answered["cited"][0]["page"]) == ("a goat", 1)
    assert str(store) not in json.dumps([found, answered])


def test_documents_are_added_listed_and_removed_and_searched_at_once(store, tmp_path):
    write_pdf(tmp_path / "new.pdf", ["a walrus dives"])

    async def scene(client: Any) -> Any:
        form = FormData()
        form.add_field("files", (tmp_path / "new.pdf").read_bytes(), filename="../../new.pdf")
        form.add_field("files", b"\x00\x01", filename="odd.xyz")
        added = await said(await client.post("/v1/documents", data=form))
        found = await (await client.post("/v1/search", json={"query": "walrus"})).json()
        listed = await (await client.get("/v1/documents")).json()
        removed = await said(await client.request("DELETE", "/v1/documents", json={"documents": ["new.pdf"]}))
        gone = await (await client.post("/v1/search", json={"query": "walrus"})).json()
        return added, found, listed, removed, gone

    (status, added), found, listed, (_, removed), gone = talk(store, scene)
    assert (status, added["added"], added["pages"]) == (200, 1, 3)
    assert [fault["file"] for fault in added["faults"]] == ["odd.xyz"]
    assert found["pages"][0]["document"] == "new.pdf"
    assert {row["document"] for row in listed["documents"]} == {"animals.pdf", "new.pdf"}
    assert removed == {"removed": ["new.pdf"], "pages": 2}
    assert gone["pages"] == []


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/v1/search", {"query": ""}, 400, "query: String should have at least 1 character"),
        ("POST", "/v1/search", {"query": "a", "k": 21}, 400, "k must be less than or equal to 20, got 21"),
        ("POST", "/v1/search", {"query": "a", "top": 3}, 400, "field 'top' is not supported; supported are query, k"),
        ("POST", "/v1/ask", {"question": "  "}, 400, "the question is empty"),
        ("POST", "/v1/ask", [], 400, "the body must be"),
        ("DELETE", "/v1/documents", {"documents": ["none.pdf"]}, 400, "nothing in (a path) is called none.pdf"),
        ("GET", "/v1/pages/..%2F..%2Fstore.json", None, 404, "there is no such page"),
        ("GET", "/v1/nothing", None, 404, "GET /v1/nothing: Not Found"),
        ("POST", "/v1/documents", {"a": 1}, 415, "the content type must be multipart/form-data, got application/json"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_form(store, method, path, body, status, message):
    async def scene(client: Any) -> Any:
        return await said(await client.request(method, path, json=body))

    found, reply = talk(store, scene)
    assert found == status
    assert reply["error"]["message"].startswith(message)
    assert reply["error"]["code"] == status


def test_files_are_taken_within_limits_and_not_from_a_strangers_page(store):
    async def scene(client: Any) -> Any:
        def form(*sizes: int) -> FormData:
            fields = FormData()
            for number, size in enumerate(sizes):
                fields.add_field("files", bytes(size), filename=f"{number}.pdf")
            return fields

        large = await said(await client.post("/v1/documents", data=form(2_000)))
        many = await said(await client.post("/v1/documents", data=form(10, 10, 10)))
        together = await said(await client.post("/v1/documents", data=form(900, 900)))
        foreign = await said(
            await client.post("/v1/documents", data=form(10), headers={"Origin": "http://evil.example"})
        )
        return large, many, together, foreign

    limits: Any = {"file_bytes": 1_000, "max_files": 2, "upload_bytes": 1_500}
    replies = talk(store, scene, **limits)
    assert [status for status, _ in replies] == [413, 413, 413, 403]
    messages = [reply["error"]["message"] for _, reply in replies]
    assert "--max-file-mb of a file" in messages[0]
    assert messages[1] == "at most 2 files can be added at once"
    assert "all files together" in messages[2]


def test_a_token_opens_everything_but_health(store):
    async def scene(client: Any) -> Any:
        without = [(await client.request(one.method, one.path.format(page_id="x"))).status for one in ROUTES]
        key = {"Authorization": "Bearer secret"}
        return without, (await client.get("/v1/documents", headers=key)).status

    without, with_token = talk(store, scene, door=Door("secret"))
    assert (without, with_token) == ([200] + [401] * (len(ROUTES) - 1), 200)


def test_the_interface_describes_itself_and_loads_nothing(store):
    async def scene(client: Any) -> Any:
        return await (await client.get("/openapi.json")).json(), await (await client.get("/docs")).text()

    api, page = talk(store, scene)
    assert api["openapi"] == "3.1.0"
    assert {(method.upper(), path) for path, entry in api["paths"].items() for method in entry} == {
        (route.method, route.path) for route in ROUTES
    }
    body = api["paths"]["/v1/ask"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == {"question", "k", "history"}
    assert "http" not in page
    assert "src=" not in page


def test_without_an_answerer_pages_are_found_and_questions_refused(store):
    async def scene(client: Any) -> Any:
        asked = await said(await client.post("/v1/ask", json={"question": "what?"}))
        return asked, await said(await client.post("/v1/search", json={"query": "otter"}))

    (status, reply), (found, _) = talk(store, scene, reads=False)
    assert (status, found) == (404, 200)
    assert "started without --answer-model" in reply["error"]["message"]


def test_a_hundred_questions_while_documents_come_and_go_see_the_documents_of_their_moment(store, tmp_path):
    write_pdf(tmp_path / "walrus.pdf", ["a walrus dives"])
    content = (tmp_path / "walrus.pdf").read_bytes()

    async def scene(client: Any) -> Any:
        async def ask(number: int) -> tuple[int, int]:
            reply = await client.post("/v1/ask", json={"question": f"what does the ibex do? {number}"})
            return reply.status, len((await reply.json())["pages"])

        async def change() -> list[int]:
            statuses = []
            for _ in range(2):
                form = FormData()
                form.add_field("files", io.BytesIO(content), filename="walrus.pdf")
                statuses.append((await client.post("/v1/documents", data=form)).status)
                gone = {"documents": ["walrus.pdf"]}
                statuses.append((await client.request("DELETE", "/v1/documents", json=gone)).status)
            return statuses

        async def user(numbers: range) -> list[tuple[int, int]]:
            return [await ask(number) for number in numbers]

        users = [asyncio.create_task(user(range(n, 100, 4))) for n in range(4)]
        changed, asked = await change(), [await one for one in users]
        return changed, [one for answers in asked for one in answers]

    changed, asked = talk(store, scene)
    assert changed == [200] * 4
    assert [status for status, _ in asked] == [200] * 100
    assert all(count >= 1 for _, count in asked)


def test_the_command_names_a_wrong_option(tmp_path, capsys):
    assert retrieve.main(["serve", str(tmp_path / "none"), "--by", "words", "--max-requests", "0"]) == 2
    assert "--max-requests must be >= 1" in capsys.readouterr().err
