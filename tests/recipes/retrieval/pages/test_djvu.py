"""DjVu documents by the real DjVuLibre where it is installed; a reason that names it where not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("pypdfium2", reason="needs the retrieval extra")

from PIL import Image

from recipes import retrieve
from recipes.retrieval.pages import djvu
from recipes.retrieval.pages.settings import DocumentError
from recipes.retrieval.pages.store import PageStore
from tests.material.retrieval import ingested, rendered, write_image, write_pdf


@pytest.fixture
def tools() -> None:
    if missing := [name for name in (*djvu.PROGRAMS, "c44", "djvm", "djvmcvt") if shutil.which(name) is None]:
        pytest.skip(f"needs DjVuLibre (Debian: djvulibre-bin): {', '.join(missing)} is not on PATH")


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


def write_djvu(file: Path, *pages: tuple[str, str], dpi: int = 200) -> None:
    """Write a document of pages of 400 x 200 pixels, each of a colour and with a text layer."""
    parts = []
    for number, (colour, text) in enumerate(pages, 1):
        image, part = file.with_name("page.ppm"), file.with_name(f"part{number}.djvu")
        Image.new("RGB", (400, 200), colour).save(image)
        run("c44", "-dpi", str(dpi), image, part)
        (layer := file.with_name("layer")).write_text(f'(page 0 0 400 200 (line 9 9 300 40 "{text}"))')
        run("djvused", part, "-e", f"select 1; set-txt {layer}; save")
        parts.append(part)
    run("djvm", "-c", file, *parts)
    for part in (*parts, image, layer):
        part.unlink()


def colours(folder: Path) -> list[tuple[tuple[int, int], str]]:
    """Return size and colour of each page of the only document in a store."""
    found = []
    for file in sorted(folder.glob("pages/*/*/*.png")):
        with Image.open(file) as image:
            pixel = image.convert("RGB").getpixel((5, 5))
            assert isinstance(pixel, tuple)
            found.append((image.size, ["red", "green", "blue"][pixel.index(max(pixel))]))
    return found


def test_pages_have_pixels_text_and_labels_and_are_found(tools, tmp_path, capsys):
    docs, store = tmp_path / "docs", tmp_path / "store"
    docs.mkdir()
    write_djvu(docs / "- %41 b\u00f6ok.djvu", ("red", "p\\303\\244ge one"), ("blue", "of the ibex"))
    run("djvused", docs / "- %41 b\u00f6ok.djvu", "-e", 'select 2; set-page-title "xii"; save')
    shutil.copy(docs / "- %41 b\u00f6ok.djvu", docs / "copy.bin")  # the bytes say what it is
    report = ingested(store, docs, dpi=100)
    assert (report.errors, report.num_pages, report.num_skipped) == ((), 2, 0)
    assert colours(store) == [((200, 100), "red"), ((200, 100), "blue")]  # 2 inches by 1
    pages = list(PageStore.open(store).pages())
    assert [page.text for page in pages] == ["p\u00e4ge one", "of the ibex"]
    assert [page.label for page in pages] == ["", "printed xii"]
    assert retrieve.main(["search", str(store), "ibex", "--by", "words"]) == 0
    assert "2 (printed xii)" in capsys.readouterr().out


def test_large_pages_are_scaled_down_and_long_documents_refused(tools, tmp_path):
    write_djvu(tmp_path / "a.djv", ("green", "x"), ("green", "y"), dpi=25)
    (pages, fault) = rendered(tmp_path / "a.djv", max_page_pixels=5_000)
    assert [(page.width, page.height) for page in pages] == [(100, 50)] * 2
    assert fault == ""
    with pytest.raises(DocumentError, match="it has 2 pages, more than --max-pages 1; raise it"):
        rendered(tmp_path / "a.djv", max_pages=1)


def test_faulty_documents_are_error_rows_and_faulty_pages_faults(tools, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    write_djvu(docs / "whole.djvu", ("red", "one"), ("blue", "two"))
    whole = (docs / "whole.djvu").read_bytes()
    (docs / "cut.djvu").write_bytes(whole[:-40])
    (docs / "start.djvu").write_bytes(whole[:70])
    (docs / "nonsense.djvu").write_bytes(b"AT&TFORM\0\0\0\x20DJVUnothing of a page")
    (docs / "empty.djvu").write_bytes(b"")
    (docs / "text.djvu").write_text("hello")
    run("djvmcvt", "-i", docs / "whole.djvu", docs, docs / "index.djvu")
    report = ingested(tmp_path / "store", docs)
    errors = {row.document: row.error for row in report.errors}
    assert errors.pop("cut.djvu") == "page 2: `djvused` cannot read it: Unexpected End Of File."
    assert errors.pop("start.djvu").startswith("`djvused` cannot read it: ")
    assert errors.pop("nonsense.djvu").startswith("`djvused` cannot read it: ")
    assert errors == {
        "empty.djvu": "the file is empty (0 bytes)",
        "index.djvu": "its pages are in other files; put them into one (`djvmcvt -b`)",
        "text.djvu": "the content is neither a PDF, an image nor DjVu, despite the extension '.djvu'",
    }
    pages = [(page.document, page.number) for page in PageStore.open(tmp_path / "store").pages()]
    assert {("whole.djvu", 1), ("whole.djvu", 2), ("cut.djvu", 1)} <= set(pages)
    assert not any(str(tmp_path) in row.error for row in report.errors)


def test_without_djvulibre_the_reason_says_what_to_install(tmp_path, monkeypatch):
    docs = tmp_path / "docs"
    docs.mkdir()
    write_image(docs / "a.png")
    (docs / "book.djvu").write_bytes(b"AT&TFORM\0\0\0\x20DJVUINFO")
    monkeypatch.setenv("PATH", str(tmp_path))
    report = ingested(tmp_path / "store", docs)
    assert [row.error for row in report.errors] == [
        ".djvu files need DjVuLibre, but `djvused` is not on PATH; install it (Debian: djvulibre-bin) and run the same "
        "command again, or convert the file to PDF"
    ]
    assert report.num_pages == 1


@pytest.mark.slow
def test_a_page_that_takes_too_long_is_a_fault_and_others_are_kept(tools, tmp_path, monkeypatch):
    real, programs = shutil.which("ddjvu"), tmp_path / "programs"
    programs.mkdir()
    (programs / "ddjvu").write_text(f'#!/bin/sh\ncase "$*" in *-page=1*) sleep 60;; esac\nexec {real} "$@"\n')
    (programs / "ddjvu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(djvu, "TIMEOUT_S", 1)
    write_djvu(tmp_path / "a.djvu", ("red", "one"), ("blue", "two"))
    pages, fault = rendered(tmp_path / "a.djvu")
    assert ([page.number for page in pages], fault) == ([2], "page 1: `ddjvu` took more than 1 s")


def test_a_pdf_called_djvu_is_a_pdf(tmp_path):
    write_pdf(tmp_path / "a.djvu", ["words"])
    pages, fault = rendered(tmp_path / "a.djvu")
    assert ([page.text for page in pages], fault) == (["words"], "")
