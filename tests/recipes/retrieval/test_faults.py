"""Odd files, odd names, damaged stores and indexes: an error row or one clear line, and nothing else is harmed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from recipes import retrieve
from recipes.retrieval.pages.documents import why_skipped
from recipes.retrieval.pages.libreoffice import office_to_pdf
from recipes.retrieval.pages.settings import DocumentError, RenderSettings
from recipes.retrieval.pages.store import PageStore, StoreError
from recipes.retrieval.pages.tasks import RenderTask, render_document
from recipes.retrieval.search.index import IndexFault, VectorIndex
from rsgrpo.errors import RsgrpoError
from tests.material import ROOT
from tests.material.retrieval import (
    coloured_store,
    ingested,
    rendered,
    stop_python,
    write_form,
    write_image,
    write_pdf,
    write_vectors,
)
from tests.recipes.retrieval.search.test_index import make, random_vectors


def ink(file: Path) -> np.ndarray:
    """Return where the first page is dark, at 72 dpi."""
    pages, _ = rendered(file, dpi=72)
    return np.asarray(Image.open(file.parent / "pages" / pages[0].image).convert("L")) < 128


def test_what_is_written_in_a_form_is_drawn(tmp_path):
    pytest.importorskip("pypdfium2", reason="needs the retrieval extra")
    write_form(tmp_path / "empty.pdf", "")
    write_form(tmp_path / "filled.pdf", "seventy-two")
    assert ink(tmp_path / "empty.pdf").sum() == 0
    assert ink(tmp_path / "filled.pdf").sum() > 50


def test_a_turned_page_is_rendered_as_it_is_read(tmp_path):
    pytest.importorskip("pypdfium2", reason="needs the retrieval extra")
    write_pdf(tmp_path / "a.pdf", ["left"], width=300, height=100)
    turned = (tmp_path / "a.pdf").read_bytes().replace(b"/Contents", b"/Rotate 90 /Contents")
    (tmp_path / "turned.pdf").write_bytes(turned)
    upright, sideways = ink(tmp_path / "a.pdf"), ink(tmp_path / "turned.pdf")
    assert (upright.shape, sideways.shape) == ((100, 300), (300, 100))
    assert np.argwhere(sideways).mean(axis=0)[0] < 100  # the left end of the line is at the top now


def png(path: Path, width: int, height: int) -> None:
    """Write a real image of black pixels, one bit each, a row at a time."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + packer.flush()
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
        content += len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")
    path.write_bytes(content)


def test_a_folder_of_oddities_gives_its_good_pages_and_an_error_row_for_each_other(tmp_path, caplog):
    pytest.importorskip("pypdfium2", reason="needs the retrieval extra")
    docs = tmp_path / "docs"
    docs.mkdir()
    os.mkfifo(docs / "pipe.pdf")  # opening it would block forever
    (docs / "round").symlink_to(docs)
    (docs / "self.png").symlink_to(docs / "self.png")
    (docs / "nowhere.pdf").symlink_to("/nowhere")
    write_image(docs / "good.png")
    (docs / "link.png").symlink_to(docs / "good.png")
    png(docs / "bomb.png", 50_000, 50_000)
    png(docs / "large.png", 10_000, 9_000)
    png(docs / "strip.png", 50_000, 200)
    (docs / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    (docs / "note").write_text("this speaks of %PDF-1.4 and is none\n")
    write_pdf(docs / "nan.pdf", ["x"])
    (docs / "nan.pdf").write_bytes((docs / "nan.pdf").read_bytes().replace(b"0 0 200 100", b"0 0 1e99 /x"))
    (docs / "cycle.pdf").write_bytes(
        b"%PDF-1.4\n1 0 obj << /Type /Catalog /Pages 2 0 R >> endobj "
        b"2 0 obj << /Type /Pages /Kids [2 0 R 2 0 R] /Count 99999999 >> endobj trailer << /Root 1 0 R >>"
    )
    (docs / os.fsdecode(b"\xe9[/b]\x1b[31m\n.pdf".replace(b"/", b""))).write_bytes(b"%PDF-1.4 junk")
    report = ingested(tmp_path / "store", docs)
    store = PageStore.open(tmp_path / "store")
    assert {page.document for page in store.pages()} == {"good.png", "nan.pdf"}
    errors = {row.document: row.error for row in report.errors}
    assert {name: text for name, text in errors.items() if "pixels" in text} == {
        "bomb.png": errors["bomb.png"], "large.png": errors["large.png"], "strip.png": errors["strip.png"]
    }  # fmt: skip
    assert set(errors) == {
        "bomb.png", "large.png", "strip.png", "program.png", "cycle.pdf", "\\xe9[b]\\x1b[31m\\x0a.pdf"
    }  # fmt: skip
    assert errors["strip.png"].startswith("page 1: 50000 x 200 pixels, one side is more than 200 times")
    assert errors["program.png"].startswith("the content is neither a PDF, an image nor DjVu")
    assert {row.document: row.skipped for row in store.documents() if row.skipped} == {
        "note": "a file without an extension is not read, and its content is neither a PDF, an image nor DjVu",
        "pipe.pdf": "not a regular file (a pipe, a device)",
        "round": "a link to a folder is not followed; name its target",
        "self.png": "the link leads nowhere",
        "nowhere.pdf": "the link leads nowhere",
    }
    assert report.num_skipped == 5
    assert "round is a link to a folder and is not followed" in caplog.text
    again = ingested(tmp_path / "store", docs)
    assert (again.num_unchanged, len(again.errors)) == (3, len(errors))


def test_only_a_file_that_calls_itself_a_pdf_may_begin_with_something_else(tmp_path):
    for name in ("a.pdf", "a.bin"):
        (tmp_path / name).write_bytes(b"junk\n%PDF-1.4")
    (tmp_path / "b.bin").write_bytes(b"%PDF-1.4")
    assert [why_skipped(tmp_path / name) == "" for name in ("a.pdf", "a.bin", "b.bin")] == [True, False, True]


def test_what_is_not_a_folder_of_documents_is_refused(tmp_path, capsys):
    store = coloured_store(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    itself = "is the store itself"
    for root, fault in ((store, itself), (store / "pages", itself), (tmp_path / "pipe", "(a pipe, a device)")):
        assert retrieve.main(["ingest", str(root), "--out", str(store)]) == 2
        assert fault in capsys.readouterr().err
    assert retrieve.main(["ingest", str(tmp_path / "docs"), "--out", str(store), "--page-timeout-s", "nan"]) == 2
    assert "--page-timeout-s must be > 0, got nan" in capsys.readouterr().err
    assert len(PageStore.open(store).page_ids()) == 3


def test_a_folder_that_cannot_be_read_takes_no_document_out(tmp_path, monkeypatch):
    store, scan = coloured_store(tmp_path), os.scandir

    def refuse(path: Any) -> Any:
        if os.fspath(path).endswith("docs"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(RsgrpoError, match=r"the folder .*docs cannot be read: Permission denied"):
            ingested(store, tmp_path / "docs")
    assert len(PageStore.open(store).page_ids()) == 3


def test_a_file_that_changes_while_it_is_read_leaves_no_pages_under_the_old_name(tmp_path):
    write_image(tmp_path / "a.png", "red")
    store = PageStore.create(tmp_path / "store", RenderSettings().pixels())
    task = RenderTask(os.fsencode(tmp_path / "a.png"), str(store.folder), RenderSettings())
    with pytest.raises(DocumentError, match="changed while it was read"):
        render_document(task, lambda: write_image(tmp_path / "a.png", "blue"))
    assert not list(store.folder.glob("pages/*/*"))
    content, num_pages, fault, _ = render_document(task, lambda: None)
    assert (store.has_content(content), num_pages, fault) == (True, 1, "")


def test_a_slow_libreoffice_is_stopped_with_all_its_processes(tmp_path, monkeypatch):
    program = tmp_path / "soffice"
    mark = str(uuid.uuid4())
    program.write_text(f"#!/bin/sh\nsh -c 'sleep 300; : {mark}' &\n: > {tmp_path}/began\nwait\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(DocumentError, match="took more than 1 s; raise --office-timeout-s"):
        office_to_pdf(tmp_path / "note.txt", tmp_path, RenderSettings(office_timeout_s=1))
    assert (tmp_path / "began").exists()
    deadline = time.monotonic() + 10
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def marked_processes(mark: str) -> list[int]:
    """The processes whose command line contains a mark, by their ids outside of any namespace."""
    return [
        process.pid for process in psutil.process_iter(["cmdline"]) if mark in " ".join(process.info["cmdline"] or ())
    ]


@pytest.mark.parametrize(("name", "size"), [("documents.parquet", 0), ("documents.parquet", 200), ("store.json", 1)])
def test_a_damaged_file_of_a_store_stops_an_ingest_before_it_harms_anything(tmp_path, name, size):
    store = coloured_store(tmp_path)
    (store / name).write_bytes((store / name).read_bytes()[:size])
    before = {file: file.stat().st_mtime_ns for file in store.rglob("*.p*")}
    with pytest.raises(StoreError, match=rf"{name} (is damaged|cannot be read)"):
        ingested(store, tmp_path / "docs")
    assert {file: file.stat().st_mtime_ns for file in store.rglob("*.p*")} == before


def test_a_lost_catalogue_of_documents_is_not_taken_for_an_empty_one(tmp_path):
    store = coloured_store(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in store.glob("pages/*/*/*")}
    (tmp_path / "other").mkdir()
    write_image(tmp_path / "other" / "other.png", "white")
    (store / "documents.parquet").unlink()
    fault = r"documents\.parquet is missing; delete it and pages\.parquet, and ingest all"
    with pytest.raises(StoreError, match=fault):
        ingested(store, tmp_path / "other")
    (store / "pages.parquet").unlink()  # as the error says
    assert ingested(store, tmp_path / "other", tmp_path / "docs").num_pages == 4
    assert before.items() <= {file: file.stat().st_mtime_ns for file in store.glob("pages/*/*/*")}.items()


def test_damaged_pages_of_a_store_are_rendered_again_as_the_error_says(tmp_path):
    store = coloured_store(tmp_path)
    (store / "pages.parquet").write_bytes(b"PAR1")
    for read in (PageStore.page_ids, lambda it: list(it.pages()), lambda it: it.find(["x"])):
        with pytest.raises(StoreError, match=r"pages\.parquet is damaged .*; delete it and run the last ingest again"):
            read(PageStore.open(store))
    (store / "pages.parquet").unlink()
    assert ingested(store, tmp_path / "docs").num_pages == 3
    (tmp_path / "other").mkdir()
    write_image(tmp_path / "other" / "other.png", "white")
    record = next(store.glob("pages/*/*/pages.json"))
    record.write_text("{")
    with pytest.raises(StoreError, match=r"pages\.json is damaged .*; delete .* and ingest all folders"):
        ingested(store, tmp_path / "other")
    shutil.rmtree(record.parent)
    assert ingested(store, tmp_path / "other", tmp_path / "docs").num_pages == 4


def broken_manifests(good: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in good:
        yield {key: value for key, value in good.items() if key != name}
        yield good | {name: {"unlike": "anything"} if name != "encoder" else []}
    yield good | {"shards": [{"name": "../../elsewhere", "num_pages": 1}]}
    yield good | {"dtype": "float99"}
    yield good | {"dim": 7}
    yield good | {"shards": [{"name": "000077", "num_pages": 3}]}


def test_a_manifest_that_was_edited_is_refused_by_every_reader(tmp_path):
    vectors = random_vectors(5)
    make(tmp_path, vectors)
    file = tmp_path / "manifest.json"
    good = json.loads(file.read_text())
    for manifest in broken_manifests(good):
        file.write_text(json.dumps(manifest))
        with pytest.raises(IndexFault, match=r"damaged|format|cannot be read|has length 16, but those of .* have 7"):
            VectorIndex.open(tmp_path).search([vectors["p0001"]], 3)
    file.write_text(json.dumps(good))
    assert VectorIndex.open(tmp_path).search([vectors["p0001"]], 1)[0][0].page_id == "p0001"


@pytest.mark.parametrize("name", ["000001.npy", "000001.ids"])
def test_a_damaged_shard_is_named(tmp_path, name):
    vectors = random_vectors(5)
    index = make(tmp_path, vectors, shard=5)
    for content in ((tmp_path / "shards" / name).read_bytes()[:20], b"", None):
        if content is None:
            (tmp_path / "shards" / name).unlink()
        else:
            (tmp_path / "shards" / name).write_bytes(content)
        with pytest.raises(IndexFault, match=r"shard .*000001 is damaged: .*; delete .* and index again"):
            VectorIndex.open(tmp_path).search([vectors["p0001"]], 3)
    assert len(index) == 5


def test_an_index_that_changes_under_a_reader_says_so(tmp_path):
    vectors = random_vectors(6)
    make(tmp_path, vectors)
    reader, writer = VectorIndex.open(tmp_path), VectorIndex.open(tmp_path)
    with writer.locked():
        writer.remove(["p0000", "p0001"])  # most of the first shard: its files go
    with pytest.raises(IndexFault, match="has changed while it was read; run the command again"):
        reader.search([vectors["p0001"]], 3)


def command(*arguments: str | Path) -> list[bytes]:
    return [os.fsencode(part) for part in (sys.executable, "-m", "recipes.retrieve", *arguments)]


def test_a_store_at_a_path_that_is_not_utf8_works_from_end_to_end(tmp_path):
    pytest.importorskip("faiss", reason="needs the retrieval extra")
    place = tmp_path / os.fsdecode(b"stor\xe9")
    place.mkdir()
    store = coloured_store(place)
    vectors = write_vectors(place / "vectors", PageStore.open(store).page_ids(), np.eye(3), {"first": [1, 0, 0]})
    imported: list[str | Path] = ["--kind", "imported", "--model", vectors]
    index = subprocess.run(command("index", store, *imported, "--faiss", "flat"), cwd=ROOT, capture_output=True)
    assert (index.returncode, index.stderr) == (0, b"")
    search = command("search", store, "first", *imported, "--backend", "flat", "--json", "-k", "1")
    found = subprocess.run(search, cwd=ROOT, capture_output=True)
    assert found.returncode == 0, found.stderr
    (page,) = json.loads(found.stdout)["pages"]
    assert page["page_id"] == PageStore.open(store).page_ids()[0]
    assert Path(page["image"]).exists()


def test_ctrl_c_is_one_line_and_the_command_resumes(tmp_path):
    docs, store = tmp_path / "docs", tmp_path / "store"
    docs.mkdir()
    for number in range(40):
        write_image(docs / f"{number:03d}.png", f"#{number:02x}4080", 700, 700)
    code, said = stop_python(
        ["-m", "recipes.retrieve", "ingest", docs, "--out", store, "--workers", "1"],
        lambda: len(list(store.glob("pages/*/*/pages.json"))) >= 3, signal.SIGINT,
    )  # fmt: skip
    assert (code, said) == (130, b"Stopped; finished work is kept; run the same command to resume.\n")
    assert ingested(store, docs).num_pages == 40
