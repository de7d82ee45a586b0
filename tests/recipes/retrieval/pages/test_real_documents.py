"""Real documents and a real text model: `python tools/fetch_test_documents.py` fetches them; skipped until then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.retrieval.outline import outline, write_judgments
from recipes import retrieve
from recipes.retrieval.pages.store import PageStore, hash_file
from tests.material.retrieval import stop_python, write_pdf
from tools.fetch_test_documents import ARCHIVES, MANUAL, MODEL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(path.exists() for path in (MANUAL, MODEL, *ARCHIVES.values())),
        reason="run tools/fetch_test_documents.py",
    ),
]


PAGES_PER_PART = 16
FAULTY = {  # of the archives; the manual has no fault
    "ocrmypdf-17.13.0/invalid.pdf": "the PDF is broken or has no pages",
    "ocrmypdf-17.13.0/tagged.odt": "LibreOffice",  # cannot convert it: the archive's copy lacks a byte
    "pikepdf-10.17.0/fuzz/378014596.pdf": "page 1: Failed to load page",
    "pikepdf-10.17.0/graph-encrypted.pdf": "the PDF is encrypted",
    "pikepdf-10.17.0/newline-buffer-test.pdf": "the PDF is broken or has no pages",
}
FORM = "pikepdf-10.17.0/form_210966.pdf"
FORM_TITLE = "intent to file a claim for compensation and/or pension, department of veterans affairs"


def split(file: Path, folder: Path) -> int:
    """Write the file's pages as part00.pdf, part01.pdf, ...; return how many pages there are."""
    import pypdfium2

    folder.mkdir()
    with pypdfium2.PdfDocument(file) as document:
        num_pages = len(document)
        for number, first in enumerate(range(0, num_pages, PAGES_PER_PART)):
            with pypdfium2.PdfDocument.new() as part:
                part.import_pages(document, list(range(first, min(first + PAGES_PER_PART, num_pages))))
                part.save(folder / f"part{number:02d}.pdf")
    return num_pages


def copy_archives(folder: Path) -> int:
    """Copy scans, forms and faulty files; return how many pages the good ones have, equal files counted once."""
    import pypdfium2

    num_pages = {}
    for name, source in ARCHIVES.items():
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.txt"))
        for file in (folder / name).rglob("*"):
            if file.relative_to(folder).as_posix() in FAULTY or file.suffix not in (".pdf", ".png", ".jpg"):
                continue
            if file.suffix == ".pdf":
                with pypdfium2.PdfDocument(file) as document:
                    num_pages[hash_file(file)] = len(document)
            else:
                num_pages[hash_file(file)] = 1
    return sum(num_pages.values())


def part_of(page: int) -> tuple[str, int]:
    """Return where a page of the whole file is now."""
    return f"part{(page - 1) // PAGES_PER_PART:02d}.pdf", (page - 1) % PAGES_PER_PART + 1


def shown_number(capsys: pytest.CaptureFixture[str], what: str) -> int:
    """Return a number of the table that a command has shown last."""
    lines = capsys.readouterr().out.splitlines()
    return int(next(line.split()[-1] for line in lines if line.strip().startswith(what)))


def found_by(store: Path, options: list[str], query: str, capsys: pytest.CaptureFixture[str]) -> list[tuple[str, int]]:
    """Return (document, page) of the five best pages."""
    assert retrieve.main(["search", str(store), query, *options, "--json"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    return [(page["document"], page["number"]) for page in json.loads(line)["pages"]]


def test_real_documents_survive_kills_and_changes_and_are_found_by_their_titles(tmp_path, capsys):
    for package in ("pypdfium2", "sentence_transformers", "pytrec_eval"):
        pytest.importorskip(package, reason="needs the retrieval extra")
    docs, store = tmp_path / "docs", tmp_path / "store"
    num_pages = split(MANUAL, docs) + copy_archives(docs)
    assert num_pages > 400
    text = ["--kind", "text", "--model", str(MODEL), "--device", "cpu"]
    ingest = ["ingest", str(docs), "--out", str(store), "--dpi", "40", "--workers", "1"]
    index = ["index", str(store), *text, "--shard-pages", "16", "--batch-size", "2"]

    # kill -9 in the middle of ingest and of encoding: nothing lost, nothing twice
    stop_python(["-m", "recipes.retrieve", *ingest], lambda: len(list(store.glob("pages/*/*/pages.json"))) >= 3)
    rendered = set(store.glob("pages/*/*/pages.json"))
    times = {file: file.stat().st_mtime_ns for file in rendered}
    assert retrieve.main(ingest) == 0
    assert shown_number(capsys, "pages in the store") == num_pages
    errors = {row.document: row.error for row in PageStore.open(store).documents() if row.error}
    assert set(errors) == set(FAULTY)
    assert all(fault in errors[name] for name, fault in FAULTY.items()), errors
    assert {file: file.stat().st_mtime_ns for file in rendered} == times  # what was whole was not made again
    ids = PageStore.open(store).page_ids()
    assert len(set(ids)) == len(ids) == num_pages
    shards = store / "index" / "shards"
    stop_python(["-m", "recipes.retrieve", *index], lambda: shards.exists() and len(list(shards.glob("*.npy"))) >= 3)
    assert retrieve.main(index) == 0
    assert 0 < shown_number(capsys, "added") < num_pages
    indexed = [page for file in shards.glob("*.ids") for page in file.read_text().splitlines()]
    assert sorted(indexed) == sorted(PageStore.open(store).page_ids(with_text=True))
    capsys.readouterr()
    assert retrieve.main([*index, "--faiss", "flat"]) == 0
    num_scans = sum(not page.text for page in PageStore.open(store).pages())
    assert num_scans > 30
    assert f"{num_scans} pages have no text and are left out" in capsys.readouterr().out
    places_of_form = found_by(store, text, FORM_TITLE, capsys)
    assert places_of_form[0] == (FORM, 1)
    assert found_by(store, [*text, "--backend", "flat"], FORM_TITLE, capsys) == places_of_form

    # the text baseline on outline titles
    titles = outline(MANUAL)
    places = [part_of(page) for _, page in titles]
    names = [f"{document}#{page}" for document, page in places]
    write_judgments([(title, name) for (title, _), name in zip(titles, names, strict=True)], tmp_path)
    run = str(tmp_path / "minilm.run")
    search = ["run", str(store), *text, "--queries", str(tmp_path / "queries.jsonl"), "--out", run, "-k", "10"]
    assert retrieve.main(search) == 0
    assert retrieve.main(["evaluate", run, "--qrels", str(tmp_path / "qrels.tsv"), "--store", str(store)]) == 0
    scores = json.loads((tmp_path / "minilm.scores.json").read_text())
    print(scores["num_queries"], scores["mean"])
    assert scores["num_queries"] > 100
    assert scores["mean"]["recall@10"] > 0.5  # chance: 10 of over 400 pages = 0.02
    capsys.readouterr()

    # files are deleted, changed and added: search reflects it
    ranked = [line.split() for line in Path(run).read_text().splitlines()]
    best = {row[0]: row[2] for row in ranked if row[3] == "1"}
    by_id = {page.page_id: (page.document, page.number) for page in PageStore.open(store).pages()}
    found = [(title, place) for row, ((title, _), place) in enumerate(zip(titles, places, strict=True))
             if by_id[best[f"q{row}"]] == place]  # fmt: skip
    gone = found[0]
    changed = next(entry for entry in found if entry[1][0] != gone[1][0])
    (docs / gone[1][0]).unlink()
    (docs / FORM).rename(docs / "claim.pdf")
    (docs / "ocrmypdf-17.13.0" / "invalid.pdf").unlink()
    shutil.copy(docs / changed[1][0], docs / "added.pdf")
    write_pdf(docs / changed[1][0], ["nothing but sea shells"])
    assert retrieve.main(ingest) == 0
    assert retrieve.main(index) == 0
    capsys.readouterr()
    assert set(FAULTY) - {row.document for row in PageStore.open(store).documents() if row.error} == {
        "ocrmypdf-17.13.0/invalid.pdf"
    }
    assert found_by(store, text, FORM_TITLE, capsys)[0] == ("claim.pdf", 1)
    assert gone[1] not in found_by(store, text, gone[0], capsys)
    assert found_by(store, text, changed[0], capsys)[0] == ("added.pdf", changed[1][1])
    assert found_by(store, text, "sea shells", capsys)[0] == (changed[1][0], 1)
