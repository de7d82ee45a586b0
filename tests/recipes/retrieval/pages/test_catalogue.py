"""What a store knows of files: roots within roots, copies, labels, notes, what is not read, and how it is taken out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("pypdfium2", reason="needs the retrieval extra")

from recipes import retrieve
from recipes.retrieval.pages.documents import labels_of, render
from recipes.retrieval.pages.ingest import ingest
from recipes.retrieval.pages.libreoffice import office_to_pdf
from recipes.retrieval.pages.mail_and_books import UnreadableError, to_html
from recipes.retrieval.pages.office_parts import OLE, HiddenParts, hidden_parts
from recipes.retrieval.pages.settings import DocumentError, RenderSettings
from recipes.retrieval.pages.store import PageStore, hash_file
from recipes.retrieval.pages.workers import no_progress
from tests.material.office import write_book, write_mail, write_pptx, write_xlsx
from tests.material.retrieval import QUIET, ingested, write_image, write_pdf


def documents(store: Path) -> dict[str, str]:
    """Return document -> root of what has pages."""
    return {row.document: row.root for row in PageStore.open(store).documents() if row.num_pages}


def test_a_folder_within_a_root_belongs_to_that_root(tmp_path):
    outer, inner, store = tmp_path / "r1", tmp_path / "r1" / "sub", tmp_path / "store"
    inner.mkdir(parents=True)
    write_image(outer / "a.png", "red")
    write_image(inner / "x.png", "blue")
    for first, second in ((outer, inner), (inner, outer)):
        shutil.rmtree(store, ignore_errors=True)
        ingested(store, first)
        assert ingested(store, second).num_removed == 0
        assert documents(store) == {"a.png": str(outer), "sub/x.png": str(outer)}
    (inner / "x.png").unlink()
    assert ingested(store, outer).num_removed == 1
    assert documents(store) == {"a.png": str(outer)}


def test_a_store_within_its_documents_keeps_what_was_uploaded_into_it(tmp_path):
    store = tmp_path / "store"
    write_image(tmp_path / "a.png", "red")
    ingested(store, tmp_path)
    (store / "uploads").mkdir()
    write_image(store / "uploads" / "b.png", "blue")
    ingested(store, store / "uploads")
    assert ingested(store, tmp_path).num_removed == 0
    assert documents(store) == {"a.png": str(tmp_path), "b.png": str(store / "uploads")}


def test_documents_folders_and_roots_that_are_gone_can_be_taken_out(tmp_path, capsys):
    roots = [tmp_path / "one", tmp_path / "two"]
    for number, root in enumerate(roots):
        (root / "deep").mkdir(parents=True)
        write_image(root / "a.png", "red", 40 + number, 30)
        write_image(root / "deep" / "b.png", "blue", 40 + number, 30)
    store = tmp_path / "store"
    ingested(store, *roots)
    shutil.rmtree(roots[1])
    assert retrieve.main(["remove", str(store), "nothing.pdf"]) == 2
    assert f"name a document, a folder or a root ({roots[0]}, {roots[1]})" in capsys.readouterr().err
    assert retrieve.main(["remove", str(store), str(roots[1])]) == 0
    assert "removed 2 files with 2 pages" in (shown := capsys.readouterr().out)
    assert "still exist" not in shown
    assert retrieve.main(["remove", str(store), "deep"]) == 0
    assert "1 of them still exist" in capsys.readouterr().out
    assert documents(store) == {"a.png": str(roots[0])}
    assert len(list(store.glob("pages/*/*"))) == 1


def test_what_is_not_read_is_listed_with_its_reason(tmp_path, capsys):
    docs, store = tmp_path / "docs", tmp_path / "store"
    (docs / ".git").mkdir(parents=True)
    write_image(docs / "a.png")
    (docs / "data.json").write_text("{}")
    (docs / "empty.pdf").write_bytes(b"")
    (docs / ".hidden.pdf").write_bytes(b"x")
    report = ingested(store, docs)
    assert (report.num_rendered, report.num_skipped, len(report.errors)) == (1, 3, 1)
    assert retrieve.main(["list", str(store), "--skipped"]) == 0
    shown = capsys.readouterr().out
    for said in (
        "data.json  [not read: .json files are not read, and its content is neither a PDF, an image nor DjVu]",
        ".git  [not read: a hidden folder is not read]",
        ".hidden.pdf  [not read: a hidden file is not read]",
        "2 documents, 1 pages; 1 with errors; 3 files not read",
    ):
        assert said in shown
    assert "a.png" not in shown
    assert retrieve.main(["list", str(store), "--errors", "--json"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["document"], row["error"]) == ("empty.pdf", "the file is empty (0 bytes)")
    (docs / "data.json").unlink()
    assert ingested(store, docs).num_removed == 0  # it was no document


def test_copies_keep_their_names_and_their_roots(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_image(tmp_path / name / "a.png", "red")
    shutil.copy(tmp_path / "one" / "a.png", tmp_path / "one" / "b.png")
    ingested(tmp_path / "store", tmp_path / "one", tmp_path / "two")
    (page,) = PageStore.open(tmp_path / "store").pages()
    assert (page.document, page.root) == ("a.png", str(tmp_path / "one"))
    assert page.copies == ("b.png", f"{tmp_path / 'two'}/a.png")


def test_printed_page_labels_are_kept_where_they_differ(tmp_path):
    write_pdf(tmp_path / "a.pdf", ["one", "two", "three"])
    content = (tmp_path / "a.pdf").read_bytes()
    labels = b"/Type /Catalog /PageLabels << /Nums [0 << /S /r >> 2 << /S /D /St 3 >>] >>"
    (tmp_path / "a.pdf").write_bytes(content.replace(b"/Type /Catalog", labels))
    assert labels_of(tmp_path / "a.pdf", HiddenParts()) == {1: "printed i", 2: "printed ii"}
    ingested(tmp_path / "store", tmp_path / "a.pdf")
    places = [page.place for page in PageStore.open(tmp_path / "store").pages()]
    assert places == ["a.pdf, page 1 (printed i)", "a.pdf, page 2 (printed ii)", "a.pdf, page 3"]


def test_hidden_slides_and_sheets_are_found(tmp_path):
    write_pptx(tmp_path / "talk.pptx", list("abcd"), hidden=[1, 3])
    assert hidden_parts(tmp_path / "talk.pptx") == HiddenParts("2 hidden slides (1, 3)", (2, 4))
    assert labels_of(tmp_path / "none.pdf", HiddenParts("", (2, 4))) == {1: "slide 2", 2: "slide 4"}
    write_pptx(tmp_path / "open.pptx", list("ab"))
    assert hidden_parts(tmp_path / "open.pptx") == HiddenParts()
    write_xlsx(tmp_path / "t.xlsx", [["a"], ["b"], ["c"]], hidden_sheet="Past", hidden_rows=2)
    assert hidden_parts(tmp_path / "t.xlsx").note == "1 hidden sheet (Past), 2 hidden rows"
    (tmp_path / "broken.pptx").write_bytes((tmp_path / "talk.pptx").read_bytes()[:200])
    assert hidden_parts(tmp_path / "broken.pptx") == HiddenParts()


def test_mail_and_books_become_html_without_anything_from_elsewhere(tmp_path):
    write_mail(tmp_path / "mail.eml")
    (tmp_path / "out").mkdir()
    html, note = to_html(tmp_path / "mail.eml", tmp_path / "out")
    assert "<p><b>Subject:</b> sums</p>" in html.read_text()
    assert "seven &amp; more" in html.read_text()
    assert note == "1 attachment not read (sums.csv)"
    write_book(tmp_path / "book.epub", ["<p>one</p>", '<img src="../p.png"/><img src="http://example.org/spy.png"/>'])
    html, _ = to_html(tmp_path / "book.epub", tmp_path / "out")
    text = html.read_text()
    assert text.index("one") < text.index("picture-")
    assert "example.org" not in text
    assert len(list((tmp_path / "out").glob("picture-*.png"))) == 1
    for name, says in (("bad.epub", "damaged"), ("bad.eml", "none of the headers")):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(UnreadableError, match=says):
            to_html(tmp_path / name, tmp_path / "out")


def test_an_office_file_with_a_password_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.retrieval.pages.libreoffice.shutil.which", lambda name: "/bin/false")
    (tmp_path / "a.docx").write_bytes(OLE + bytes(500) + "EncryptedPackage".encode("utf-16-le"))
    with pytest.raises(DocumentError, match="protected by a password; save it without one"):
        office_to_pdf(tmp_path / "a.docx", tmp_path, RenderSettings())


def test_a_warning_of_a_library_becomes_a_note_of_its_file(tmp_path, monkeypatch, recwarn):
    def warning(*arguments):
        import warnings

        warnings.warn("Truncated File Read", stacklevel=1)
        return render(*arguments)

    monkeypatch.setattr("recipes.retrieval.pages.tasks.render", warning)
    from recipes.retrieval.pages.tasks import RenderTask, render_document

    write_image(tmp_path / "a.png")
    PageStore.create(tmp_path / "store", RenderSettings().pixels())
    task = RenderTask(bytes(tmp_path / "a.png"), str(tmp_path / "store"), RenderSettings())
    render_document(task, lambda: None)
    assert PageStore(tmp_path / "store").record(hash_file(tmp_path / "a.png"))["note"] == "Truncated File Read"
    assert not recwarn.list


def test_a_document_without_progress_is_not_read_again_within_the_same_limit(tmp_path):
    write_pdf(tmp_path / "slow.pdf", [str(number) for number in range(40)], width=2_000, height=2_000)

    def run(seconds: float):
        return ingest(
            [tmp_path / "slow.pdf"], tmp_path / "store", RenderSettings(), num_workers=1, page_timeout_s=seconds,
            console=QUIET,
        )  # fmt: skip

    none = 1e-9  # over as soon as anyone looks, after the first page's report
    (row,) = run(none).errors
    assert row.error == no_progress(none)  # a PDF does not wait for LibreOffice
    again = run(none)
    assert (again.num_rendered, again.num_unchanged, [row.error for row in again.errors]) == (0, 0, [row.error])
    assert run(60).num_pages == 40
