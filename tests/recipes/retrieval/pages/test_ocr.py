"""Text of pages that have none: by the real Tesseract where it is installed, a clear message where not."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from recipes import retrieve
from recipes.retrieval.pages.store import PageStore, StoreError
from tests.material.retrieval import ingested, rendered, write_image


@pytest.fixture
def tesseract() -> None:
    pytest.importorskip("pytesseract", reason="needs the ocr extra")
    if shutil.which("tesseract") is None:
        pytest.skip("needs the program tesseract")


def write_scan(path: Path, text: str) -> None:
    image = Image.new("L", (600, 100), "white")
    ImageDraw.Draw(image).text((20, 20), text, "black", ImageFont.load_default(44))
    image.save(path)


def run(source: Path, out: Path, ocr: str) -> list[str]:
    ingested(out, source, ocr=ocr)
    return [page.text for page in PageStore.open(out).pages()]


def test_a_scan_gets_its_text_only_when_asked(tesseract, tmp_path):
    write_scan(tmp_path / "scan.png", "Harvest of plums 410 t")
    assert run(tmp_path / "scan.png", tmp_path / "plain", "") == [""]
    assert run(tmp_path / "scan.png", tmp_path / "read", "eng") == ["Harvest of plums 410 t"]
    with pytest.raises(StoreError, match=r"other settings \(ocr None -> eng\)"):
        run(tmp_path / "scan.png", tmp_path / "plain", "eng")
    with pytest.raises(StoreError, match=r"other settings \(ocr eng -> None\)"):
        run(tmp_path / "scan.png", tmp_path / "read", "")


def test_a_page_that_cannot_be_read_keeps_its_pixels(tesseract, tmp_path):
    write_image(tmp_path / "a.png")
    pages, fault = rendered(tmp_path / "a.png", ocr="xyz")
    assert [page.text for page in pages] == [""]
    assert fault.startswith("page 1: Tesseract cannot read it")


def test_a_language_that_is_not_there_is_named(tesseract, tmp_path, capsys):
    write_image(tmp_path / "a.png")
    arguments = ["ingest", str(tmp_path / "a.png"), "--out", str(tmp_path / "s"), "--ocr", "eng+xyz"]
    assert retrieve.main(arguments) == 2
    assert "--ocr eng+xyz: Tesseract lacks xyz; choose from eng" in capsys.readouterr().err


def test_without_the_package_or_the_program_the_message_says_what_to_install(tmp_path, monkeypatch, capsys):
    write_image(tmp_path / "a.png")
    arguments = ["ingest", str(tmp_path / "a.png"), "--out", str(tmp_path / "s"), "--ocr", "eng"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytesseract", None)
        assert retrieve.main(arguments) == 2
    assert 'pip install -e ".[ocr]"' in capsys.readouterr().err
    pytest.importorskip("pytesseract", reason="needs the ocr extra")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert retrieve.main(arguments) == 2
    assert "needs the program `tesseract`, which is not on PATH" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
