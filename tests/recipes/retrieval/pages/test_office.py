"""Office, text and HTML files through the real LibreOffice; skipped where it is not installed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("pypdfium2", reason="needs the retrieval extra")

from recipes.retrieval.pages.store import PageStore
from tests.material.office import write_book, write_docx, write_mail, write_opendocument, write_pptx, write_xlsx
from tests.material.retrieval import ingested, rendered

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("soffice") or shutil.which("libreoffice")),
        reason="needs LibreOffice: soffice or libreoffice on PATH",
    ),
]


def texts_of(file: Path, tmp_path: Path) -> list[str]:
    """Return the text of each page that a document becomes, its lines joined."""
    pages, fault = rendered(file, dpi=30)
    assert fault == ""
    assert all((tmp_path / "pages" / page.image).stat().st_size > 0 for page in pages)
    return [" ".join(page.text.split()) for page in pages]


def test_a_folder_of_every_kind_becomes_pages(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    write_docx(docs / "letter.docx", ["first & foremost", "second"])
    write_pptx(docs / "talk.pptx", ["slide alpha", "slide beta"])
    write_xlsx(docs / "sales.xlsx", [["region", "sales"], ["north", "42"]])
    for kind in ("odt", "ods", "odp"):
        write_opendocument(docs / f"open.{kind}", f"open {kind}")
    (docs / "note.txt").write_text("plain äöü\n")
    write_docx(docs / "broken.docx", ["gone"])
    (docs / "broken.docx").write_bytes((docs / "broken.docx").read_bytes()[:300])
    store = tmp_path / "store"
    report = ingested(store, docs, dpi=30)
    found = {(page.document, page.number): page.text for page in PageStore.open(store).pages()}
    expected = {
        ("letter.docx", 1): "first & foremost", ("letter.docx", 2): "second", ("talk.pptx", 1): "slide alpha",
        ("talk.pptx", 2): "slide beta", ("sales.xlsx", 1): "north 42", ("open.odt", 1): "open odt",
        ("open.ods", 1): "open ods", ("open.odp", 1): "open odp", ("note.txt", 1): "plain äöü",
    }  # fmt: skip
    for place, text in expected.items():
        assert text in found[place], place
    assert {row.document: row.error.partition(":")[0] for row in report.errors} == {
        "broken.docx": "LibreOffice cannot convert it"
    }


def test_macros_mail_and_books_become_pages_and_hidden_slides_count(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    write_pptx(docs / "talk.pptx", ["alpha", "secret", "gamma"], hidden=[2])
    write_xlsx(docs / "table.xlsx", [["north", "42"], ["south", "7"]], hidden_sheet="Past", hidden_rows=1)
    shutil.copy(docs / "table.xlsx", docs / "copy.xlsm")
    write_mail(docs / "mail.eml")
    write_book(docs / "book.epub", ["<p>It began.</p>", '<p>It ended. <img src="../p.png"/></p>'])
    (docs / "page.doc").write_text("<html><body><h1>Heading</h1><p>text</p></body></html>")
    report = ingested(tmp_path / "store", docs, dpi=30)
    assert report.errors == ()
    store = PageStore.open(tmp_path / "store")
    pages = {page.place: " ".join(page.text.split()) for page in store.pages()}
    assert pages["talk.pptx, page 1"] == "alpha"
    assert pages["talk.pptx, page 2 (slide 3)"] == "gamma"
    assert "Subject: sums" in pages["mail.eml, page 1"]
    assert "seven & more" in pages["mail.eml, page 1"]
    assert (pages["book.epub, page 1"], pages["book.epub, page 2"]) == ("It began.", "It ended.")
    assert pages["page.doc, page 1"] == "Heading text"
    assert {row.document: row.note for row in store.documents() if row.note} == {
        "talk.pptx": "1 hidden slide (2)",
        "table.xlsx": "1 hidden sheet (Past), 1 hidden row",
        "copy.xlsm": "1 hidden sheet (Past), 1 hidden row",
        "mail.eml": "1 attachment not read (sums.csv)",
    }


def test_html_keeps_its_headings(tmp_path):
    (tmp_path / "page.html").write_text("<html><body><h1>Heading</h1><p>text</p></body></html>")
    assert texts_of(tmp_path / "page.html", tmp_path) == ["Heading text"]


@pytest.mark.parametrize(
    ("content", "shown"),
    [("name,sum\nÄpfel,2\n".encode(), "Äpfel 2"), ("name;sum\nÄpfel;2,5\nx;1\n".encode("latin-1"), "Äpfel 2,5")],
)
def test_a_table_of_text_is_read_in_its_encoding_and_by_its_separator(tmp_path, content, shown):
    (tmp_path / "table.csv").write_bytes(content)
    (text,) = texts_of(tmp_path / "table.csv", tmp_path)
    assert shown in text


@pytest.mark.parametrize("content", ["Äpfel über alles\n".encode("latin-1"), "Äpfel über alles\r\n".encode("utf-16")])
def test_text_is_read_in_its_encoding(tmp_path, content):
    (tmp_path / "note.txt").write_bytes(content)
    assert texts_of(tmp_path / "note.txt", tmp_path) == ["Äpfel über alles"]


def test_text_is_text_whatever_its_words_look_like(tmp_path):
    # LibreOffice, left alone, takes it for a drawing
    (tmp_path / "page.md").write_text("In HTML this is like an `<svg>`.\n")
    assert texts_of(tmp_path / "page.md", tmp_path) == ["In HTML this is like an `<svg>`."]
