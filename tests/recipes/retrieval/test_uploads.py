"""How much added documents may take: of a store, of a visit, and before they are added."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pypdfium2", reason="needs the retrieval extra")

from PIL import Image

from recipes import app
from recipes.retrieval.answers.library import Library, LibrarySettings
from recipes.retrieval.answers.uploads import MIB, Quota, Quotas, Room, VisitSettings, WaitingRoom, folder_bytes
from recipes.retrieval.pages.settings import RenderSettings
from recipes.retrieval.search.retriever import SearchSettings
from rsgrpo.errors import InputError
from tests.material.retrieval import QUIET, write_pdf


def library(store: Path, **limits: Any) -> Library:
    settings = LibrarySettings(workers=1, **limits)
    return Library(store, store / "index", None, None, settings, QUIET, SearchSettings(by="words"))


def pdf(path: Path, num_pages: int) -> Path:
    write_pdf(path, [f"{path.stem} {number}" for number in range(num_pages)])
    return path


def noise(path: Path) -> Path:
    """Write a picture of 1.3 MiB, whose page takes 2.0."""
    Image.effect_noise((1200, 1200), 90).save(path)
    return path


def test_a_store_takes_as_many_pages_as_its_quota(tmp_path):
    docs = library(tmp_path / "store", max_added_pages=5)
    added = docs.add([pdf(tmp_path / "a.pdf", 3)])
    assert (added.num_added, added.faults, added.room.num_pages) == (1, (), 3)
    two, one = pdf(tmp_path / "b.pdf", 2), pdf(tmp_path / "c.pdf", 1)
    added = docs.add([two, one, pdf(tmp_path / "d.pdf", 4)])
    assert added.faults == (
        ("d.pdf", "it has 4 pages, more than the 2 that --max-added-pages 5 leaves to each file; raise it"),
        ("c.pdf", "together with the files before it, it has 3 pages, and 2 of --max-added-pages 5 are left; remove "
         "documents, or raise it"),
    )  # fmt: skip
    assert (added.num_added, docs.num_pages) == (1, 5)
    assert sorted(file.name for file in docs.uploads_folder.iterdir()) == ["a.pdf", "b.pdf"]
    docs.remove([f"{docs.uploads_folder.resolve()}/a.pdf"])
    assert docs.add([one]).num_added == 1


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        (4, r"b.png: it takes 1.3 MiB, and 0.\d MiB of --max-added-mb 4 are left; remove documents, or raise it"),
        (5, r"b.png: its first 1 pages take 2 MiB, more than the 1 that --max-added-mb 5 leaves to each file"),
    ],
)
def test_a_store_takes_as_many_bytes_as_its_quota_pages_included(tmp_path, limit, says):
    docs = library(tmp_path / "store", max_added_mb=limit)
    assert 3.2 * MIB < docs.add([noise(tmp_path / "a.png")]).room.num_bytes < 3.5 * MIB
    try:
        faults = docs.add([noise(tmp_path / "b.png")]).faults
    except InputError as error:
        faults = (("", str(error)),)
    assert re.search(says, ": ".join(faults[0])), faults
    assert [row.document for row in docs.documents() if row.num_pages] == ["a.png"]
    assert folder_bytes(tmp_path / "store") < limit * MIB


def test_a_visit_has_a_quota_of_its_own_over_all_that_it_adds(tmp_path):
    pytest.importorskip("gradio", reason="needs the app extra")
    do = app.Handlers(library(tmp_path / "store"), "docs", tmp_path, VisitSettings(max_visit_pages=3))
    *_, taken = do.add([str(pdf(tmp_path / "a.pdf", 2))], Room())
    assert taken.num_pages == 2
    said, *_, after = do.add([str(pdf(tmp_path / "b.pdf", 2))], taken)
    assert "more than the 1 that --max-visit-pages 3 leaves to each file" in said
    assert after.num_pages == 2
    *_, other = do.add([str(tmp_path / "b.pdf")], Room())
    assert other.num_pages == 2


def test_while_files_are_rendered_they_share_what_is_left():
    quotas = Quotas(Quota("--max-added", 100, 50, Room(20 * MIB, 10)), Quota("--max-visit", 500, 30, Room()))
    assert quotas.bounds(RenderSettings(), 4) == {"max_pages": 30, "max_rendered_mb": 20}


@pytest.mark.parametrize(
    ("path", "size", "status", "says"),
    [
        ("/gradio_api/upload", b"1000", 200, ""),
        ("/gradio_api/upload", b"600000", 507, "--max-waiting-mb 1"),
        ("/gradio_api/upload", b"", 411, "must say its size"),
        ("/gradio_api/upload", None, 411, "must say its size"),
        ("/gradio_api/queue/join", None, 200, ""),
    ],
)
def test_uploads_that_nobody_adds_take_only_so_much_room(tmp_path, path, size, status, says):
    (tmp_path / "somebody").mkdir()
    (tmp_path / "somebody" / "left.pdf").write_bytes(bytes(MIB // 2))
    found, text = asyncio.run(asked(WaitingRoom(page, tmp_path, 1), path, size))
    assert found == status
    assert says in text


def test_uploads_that_still_arrive_count_and_those_that_ended_do_not(tmp_path):
    async def scene() -> list[int]:
        gate = asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await gate.wait()
            await page(scope, receive, send)

        room = WaitingRoom(slow, tmp_path, 1)
        first = asyncio.ensure_future(asked(room, "/gradio_api/upload", b"600000"))
        await asyncio.sleep(0)
        second = await asked(room, "/gradio_api/upload", b"600000")
        gate.set()
        return [(await first)[0], second[0], (await asked(room, "/gradio_api/upload", b"600000"))[0]]

    assert asyncio.run(scene()) == [200, 507, 200]


async def page(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def asked(room: WaitingRoom, path: str, size: bytes | None) -> tuple[int, str]:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [] if size is None else [(b"content-length", size)]
    await room({"type": "http", "method": "POST", "path": path, "headers": headers}, None, send)
    return sent[0]["status"], sent[1]["body"].decode()
