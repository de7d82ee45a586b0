"""Documents become pages: kinds of files, faults, updates, and a process killed on the way."""

from __future__ import annotations

import errno
import os
import stat
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes import retrieve
from recipes.retrieval.pages.ingest import IngestReport
from recipes.retrieval.pages.libreoffice import office_to_pdf
from recipes.retrieval.pages.settings import DocumentError, RenderSettings
from recipes.retrieval.pages.store import (
    PageStore,
    StoreError,
    hash_file,
    shown,
    single_writer,
    writing,
)
from recipes.retrieval.pages.tasks import content_writer
from recipes.retrieval.pages.workers import run_tasks
from rsgrpo.errors import RsgrpoError
from tests.material.retrieval import ingested, rendered, stop_python, write_encrypted_pdf, write_image, write_pdf


def run(docs: Path, out: Path, dpi: int = 72) -> IngestReport:
    return ingested(out, docs, dpi=dpi)


def faults(report: IngestReport) -> dict[str, str]:
    return {row.document: row.error for row in report.errors}


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp"])
def test_an_image_is_one_page_with_its_pixels(tmp_path, name):
    write_image(tmp_path / name, "red", 40, 30)
    pages, fault = rendered(tmp_path / name)
    assert [(page.number, page.width, page.height) for page in pages] == [(1, 40, 30)]
    assert fault == ""
    pixel = np.asarray(Image.open(tmp_path / "pages" / pages[0].image))[5, 5].astype(int)
    assert np.abs(pixel - [255, 0, 0]).max() < 15


def test_every_frame_of_a_tiff_is_a_page(tmp_path):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "scan.tiff", save_all=True, append_images=frames[1:])
    pages, _ = rendered(tmp_path / "scan.tiff")
    colours = [Image.open(tmp_path / "pages" / page.image).getpixel((0, 0)) for page in pages]
    assert colours == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_a_large_image_is_scaled_down_and_one_beyond_safety_is_refused(tmp_path, monkeypatch):
    write_image(tmp_path / "large.png", "red", 400, 100)
    pages, _ = rendered(tmp_path / "large.png", max_page_pixels=10_000)
    assert (pages[0].width, pages[0].height) == (200, 50)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    with pytest.raises(DocumentError, match=r"400 x 100 pixels|decompression bomb"):
        rendered(tmp_path / "large.png")


def test_office_files_say_what_is_missing_without_libreoffice(tmp_path, monkeypatch):
    (tmp_path / "note.txt").write_text("hello")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DocumentError, match=r"\.txt files need LibreOffice.*install it and run the same command"):
        office_to_pdf(tmp_path / "note.txt", tmp_path, RenderSettings())


def fake_office(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "soffice"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_office_files_go_through_libreoffice_and_its_failure_is_an_error_of_that_document(tmp_path, monkeypatch):
    write_pdf(tmp_path / "made.pdf", ["x"])
    (tmp_path / "scratch").mkdir()
    (tmp_path / "note.txt").write_text("hello")
    # the last argument is the source, the one before it the folder
    fake_office(tmp_path, f'for a; do o=$s; s=$a; done; cp {tmp_path}/made.pdf "$o/document.pdf"', monkeypatch)
    pdf, _ = office_to_pdf(tmp_path / "note.txt", tmp_path / "scratch", RenderSettings())
    assert pdf.read_bytes() == (tmp_path / "made.pdf").read_bytes()
    fake_office(tmp_path, "echo source file could not be loaded >&2; exit 1", monkeypatch)
    with pytest.raises(DocumentError, match="source file could not be loaded"):
        office_to_pdf(tmp_path / "note.txt", tmp_path / "scratch", RenderSettings())


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    fake_office(tmp_path, "exit 1", monkeypatch)
    with zipfile.ZipFile(tmp_path / "bomb.docx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b"0" * (3 << 20))
    with pytest.raises(DocumentError, match="unpacks to more than --max-unpacked-mb 1"):
        office_to_pdf(tmp_path / "bomb.docx", tmp_path, RenderSettings(max_unpacked_mb=1))


def test_pages_have_ids_that_survive_renames_and_follow_content(tmp_path, docs):
    (docs / "deep" / "er").mkdir(parents=True)
    write_image(docs / "a.png", "red")
    write_image(docs / "deep" / "er" / "b.png", "blue")
    (docs / "notes.xyz").write_text("not a document")
    report = run(docs, tmp_path / "store")
    assert (report.num_rendered, report.num_pages, report.num_skipped, report.errors) == (2, 2, 1, ())
    store = PageStore.open(tmp_path / "store")
    before = {page.document: page.page_id for page in store.pages()}
    assert before["a.png"] == f"{hash_file(docs / 'a.png')[:16]}-00001"
    assert set(before) == {"a.png", "deep/er/b.png"}
    (docs / "a.png").rename(docs / "renamed.png")
    report = run(docs, tmp_path / "store")
    assert (report.num_removed, report.num_unchanged, report.num_pages) == (1, 1, 2)
    after = {page.document: page.page_id for page in store.pages()}
    assert after == {"renamed.png": before["a.png"], "deep/er/b.png": before["deep/er/b.png"]}
    assert all(Path(page.image).exists() for page in store.pages())


def test_add_change_delete_and_copies(tmp_path, docs):
    write_image(docs / "a.png", "red")
    write_image(docs / "b.png", "blue")
    run(docs, tmp_path / "store")
    store = PageStore.open(tmp_path / "store")
    first = set(store.page_ids())
    write_image(docs / "a.png", "lime", 50, 50)  # changed
    (docs / "b.png").unlink()  # gone
    write_image(docs / "c.png", "white")  # new
    (docs / "copy.png").write_bytes((docs / "c.png").read_bytes())  # the same page twice
    report = run(docs, tmp_path / "store")
    assert (report.num_rendered, report.num_removed, report.num_pages) == (3, 1, 2)
    assert {page.document for page in store.pages()} == {"a.png", "c.png"}
    assert not first & set(store.page_ids())
    assert len(list((tmp_path / "store").glob("pages/*/*"))) == 2


def test_another_root_is_added_and_the_first_kept(tmp_path, docs):
    write_image(docs / "a.png", "red")
    other = tmp_path / "other"
    other.mkdir()
    write_image(other / "b.png", "blue")
    run(docs, tmp_path / "store")
    assert run(other, tmp_path / "store").num_pages == 2
    assert run(other / "b.png", tmp_path / "store").num_pages == 2


def test_faulty_files_become_error_rows_and_the_rest_is_rendered(tmp_path, docs):
    pytest.importorskip("pypdfium2", reason="needs the retrieval extra")
    write_pdf(docs / "good.pdf", ["one", "two"])
    write_pdf(docs / "zero.pdf", [])
    write_encrypted_pdf(docs / "locked.pdf")
    (docs / "broken.pdf").write_bytes(b"%PDF-1.4 and nothing else")
    (docs / "empty.png").write_bytes(b"")
    (docs / "text.png").write_text("no image at all")
    write_image(docs / "image.pdf.png")
    (docs / "image.pdf.png").rename(docs / "image.pdf")  # a wrong extension; the bytes count
    write_image(docs / "cut.jpg", "red", 200, 200)
    (docs / "cut.jpg").write_bytes((docs / "cut.jpg").read_bytes()[:400])
    report = run(docs, tmp_path / "store")
    wrong = faults(report)
    assert set(wrong) == {"zero.pdf", "locked.pdf", "broken.pdf", "empty.png", "text.png", "cut.jpg"}
    assert "encrypted" in wrong["locked.pdf"]
    assert wrong["zero.pdf"] == wrong["broken.pdf"] == "the PDF is broken or has no pages"
    assert "0 bytes" in wrong["empty.png"]
    assert "neither a PDF, an image nor DjVu" in wrong["text.png"]
    store = PageStore.open(tmp_path / "store")
    assert sorted((page.document, page.number) for page in store.pages()) == [
        ("good.pdf", 1), ("good.pdf", 2), ("image.pdf", 1)
    ]  # fmt: skip
    assert {row.document for row in store.documents() if row.error} == set(wrong)
    (docs / "empty.png").unlink()
    write_image(docs / "empty.png", "blue")
    assert run(docs, tmp_path / "store").num_pages == 4  # an error is tried again


def test_a_pdf_page_has_its_text_and_the_wanted_resolution_within_the_limit(tmp_path):
    pytest.importorskip("pypdfium2", reason="needs the retrieval extra")
    write_pdf(tmp_path / "a.pdf", ["Hello (world)"], width=200, height=100)
    pages, _ = rendered(tmp_path / "a.pdf", dpi=144)
    assert (pages[0].width, pages[0].height, pages[0].text) == (400, 200, "Hello (world)")
    write_pdf(tmp_path / "huge.pdf", ["x"], width=50_000, height=50_000)
    pages, _ = rendered(tmp_path / "huge.pdf", max_page_pixels=250_000)
    assert pages[0].width * pages[0].height <= 251_001


def test_a_name_that_is_not_utf8_is_shown_escaped(tmp_path, docs):
    name = os.fsdecode(b"caf\xe9.png")
    write_image(docs / "a.png")
    (docs / "a.png").rename(docs / name)
    run(docs, tmp_path / "store")
    (page,) = PageStore.open(tmp_path / "store").pages()
    assert page.document == shown(name) == "caf\\xe9.png"
    assert run(docs, tmp_path / "store").num_unchanged == 1


def test_clear_errors_for_what_cannot_be_ingested(tmp_path, docs, capsys):
    assert retrieve.main(["ingest", str(docs), "--out", str(tmp_path / "store")]) == 2
    assert "no documents in" in capsys.readouterr().err
    assert retrieve.main(["ingest", str(tmp_path / "nowhere"), "--out", str(tmp_path / "store")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("x")
    write_image(docs / "a.png")
    with pytest.raises(StoreError, match="neither empty nor a page store"):
        run(docs, tmp_path / "full")
    run(docs, tmp_path / "ok")
    with pytest.raises(StoreError, match=r"other settings \(dpi 72 -> 100\)"):
        run(docs, tmp_path / "ok", dpi=100)
    with pytest.raises(StoreError, match="not a page store; create it with"):
        PageStore.open(tmp_path / "nowhere")
    with pytest.raises(RsgrpoError, match=r"--dpi must be in \[10, 1200\], got 5"):
        RenderSettings(dpi=5)


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        ("ingest", ["(default: 150)", "(default: 10000)", "(default: 120.0)"]),
        ("search", ["(default: 5)", "(default: 100)", "(default: vectors)", "(default: image)"]),
        ("ask", ["(default: hf)", "(default: multi_image)"]),
    ],
)
def test_help_names_the_defaults(command, defaults, capsys):
    with pytest.raises(SystemExit):
        retrieve.main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert [default for default in defaults if default not in said] == []


def test_two_writers_exclude_each_other(tmp_path, docs):
    write_image(docs / "a.png")
    run(docs, tmp_path / "store")
    with single_writer(tmp_path / "store"), pytest.raises(StoreError, match="another process is writing"):
        run(docs, tmp_path / "store")


def test_two_first_ingests_at_once_do_not_mix_their_settings(tmp_path, docs, monkeypatch):
    write_image(docs / "a.png")
    store, create = tmp_path / "store", PageStore.create

    def overtaken(folder, settings):
        made = create(folder, settings)
        monkeypatch.setattr(PageStore, "create", create)
        (folder / "store.json").write_text((folder / "store.json").read_text().replace('"dpi": 72', '"dpi": 300'))
        return made

    monkeypatch.setattr(PageStore, "create", overtaken)
    with pytest.raises(StoreError, match="was created with other settings"):
        run(docs, store)
    assert not (store / "pages.parquet").exists()


def test_a_full_disk_keeps_what_is_there(tmp_path, docs, monkeypatch):
    write_image(docs / "a.png")
    run(docs, tmp_path / "store")
    before = PageStore.open(tmp_path / "store").page_ids()
    write_image(docs / "b.png", "blue")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"No space left on device; finished work is intact\. Make room"):
            run(docs, tmp_path / "store")
    assert PageStore.open(tmp_path / "store").page_ids() == before
    assert run(docs, tmp_path / "store").num_pages == 2
    assert not list((tmp_path / "store").glob(".*.writing"))


def test_a_content_folder_is_whole_or_absent(tmp_path):
    def fail() -> None:
        with content_writer(tmp_path / "ab") as folder:
            (folder / "00001.png").write_bytes(b"half")
            raise DocumentError("broken")

    with pytest.raises(DocumentError, match="broken"):
        fail()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StoreError, match="cannot write"), writing(tmp_path):
        raise OSError(errno.EROFS, "")


def crash_or_double(task: int, alive: object) -> int:
    if task == 1:
        os._exit(7)
    if task == 2:
        time.sleep(60)
    if task == 3:
        raise ValueError("three")
    if task == 6:
        raise OSError
    return 2 * task


def test_a_worker_that_dies_or_hangs_costs_one_task():
    outcomes = run_tasks(crash_or_double, range(7), num_workers=2, timeout_s=lambda _: 5, on_alive=lambda: None)
    found = {outcome.task: outcome for outcome in outcomes}
    assert sorted(found) == list(range(7))
    assert [found[task].value for task in (0, 4, 5)] == [0, 8, 10]
    assert "exit code 7" in found[1].died
    assert "no progress for 5 s" in found[2].died
    assert (found[3].error_type, found[3].error) == ("ValueError", "three")
    assert (found[6].error_type, found[6].error) == ("OSError", "OSError")


def reports_for_ever(task: int, alive: Callable[[], None]) -> None:
    while True:
        alive()
        time.sleep(0.01)


def test_a_document_that_makes_progress_for_ever_is_abandoned():
    (outcome,) = run_tasks(
        reports_for_ever, [3], num_workers=1, timeout_s=lambda _: 60, on_alive=lambda: None, total_s=1.0
    )
    assert outcome.died == "not finished after 1 s; the process was stopped"


def test_a_file_that_changed_under_the_same_size_and_time_is_found_by_its_checksum(tmp_path, docs):
    page, store = docs / "a.bmp", tmp_path / "store"
    write_image(page, "red", 40, 30)
    run(docs, store)
    before = page.stat()
    write_image(page, "blue", 40, 30)
    os.utime(page, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(docs, store).num_rendered == 0
    assert ingested(store, docs, dpi=72, checksum=True).num_rendered == 1
    assert ingested(store, docs, dpi=72, checksum=True).num_unchanged == 1


def test_ingest_killed_in_the_middle_resumes_without_loss_or_repetition(tmp_path, docs):
    for index in range(40):
        write_image(docs / f"{index:03d}.png", f"#{0x102030 + 977 * index:06x}", 700, 700)
    store = tmp_path / "store"
    command = ["-m", "recipes.retrieve", "ingest", docs, "--out", store, "--workers", "1"]
    stop_python(command, lambda: len(list(store.glob("pages/*/*/pages.json"))) >= 5)
    finished = {file: file.stat().st_mtime_ns for file in store.glob("pages/*/[!.]*/pages.json")}
    assert 5 <= len(finished) < 40
    (store / "pages" / "00").mkdir(exist_ok=True)
    (store / "pages" / "00" / f".{0:064x}.1").mkdir()  # what a worker killed while writing leaves
    report = run(docs, store, dpi=150)
    assert (report.num_pages, report.errors) == (40, ())
    ids = PageStore.open(store).page_ids()
    assert len(set(ids)) == len(ids) == 40
    assert {file: file.stat().st_mtime_ns for file in finished} == finished  # nothing was made twice
    assert not list(store.glob("pages/*/.*"))
