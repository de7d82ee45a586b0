"""Indexes that are behind their store: said, skipped, brought in line on request, and followed by a running library."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pypdfium2", reason="needs the retrieval extra")

from recipes import retrieve
from recipes.retrieval.answers.library import Library, LibrarySettings
from recipes.retrieval.encoders.base import EncoderIdentity
from recipes.retrieval.pages.ingest import ingest
from recipes.retrieval.pages.store import Page, PageStore, single_writer
from recipes.retrieval.search.exact import Hit
from recipes.retrieval.search.index import VectorIndex
from recipes.retrieval.search.retriever import Retriever, SearchSettings, _in_their_places
from recipes.retrieval.search.sync import SHARED_PAGES, update_index
from recipes.retrieval.sync_command import watch
from rsgrpo.errors import InputError
from tests.material.retrieval import QUIET, coloured_store, ingested, write_image, write_pdf, write_vectors

RGB = {"red": (1, 0, 0), "lime": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1), "yellow": (1, 1, 0)}


class Colours:
    """Encodes a page by its colour and a query by the colours that it names."""

    def __init__(self, name: str = "colours", *, multi_vector: bool = False) -> None:
        self.identity = EncoderIdentity(description={"name": name}, multi_vector=multi_vector)
        self.num_encoded = 0

    def _unit(self, *values: float) -> np.ndarray:
        vector = np.asarray(values, np.float32) / np.linalg.norm(values)
        return vector[None] if self.identity.multi_vector else vector

    def encode_pages(self, pages: Any) -> list[np.ndarray]:
        self.num_encoded += len(pages)
        return [self._unit(*RGB[Path(page.document).stem]) for page in pages]

    def encode_queries(self, queries: Any) -> list[np.ndarray]:
        return [self._unit(*np.sum([RGB[name] for name in query.split()], axis=0)) for query in queries]


def names(pages: Any) -> list[str]:
    return [page.document for page in pages]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of red and lime, indexed; afterwards lime is deleted and blue is added."""
    store = coloured_store(tmp_path, "red", "lime")
    update_index(PageStore.open(store), store / "index", Colours(), QUIET)
    (tmp_path / "docs" / "lime.png").unlink()
    write_image(tmp_path / "docs" / "blue.png", "blue", 56, 56)
    ingested(store, tmp_path / "docs")
    return store


def test_a_page_that_is_gone_is_skipped_and_a_page_that_is_missing_is_said(store):
    retriever = Retriever(store, store / "index", Colours())
    (lag,) = retriever.lags
    assert (len(lag.missing), len(lag.surplus)) == (1, 1)
    assert "1 pages of the store are not in it and cannot be found; 1 of its pages are no longer wanted" in str(lag)
    (found,) = retriever.search(["lime"], 2)
    assert names(found) == ["red.png"]
    update_index(PageStore.open(store), store / "index", Colours(), QUIET)
    now = Retriever(store, store / "index", Colours())
    assert now.lags == []
    assert names(now.search(["blue"], 1)[0]) == ["blue.png"]


def test_a_rerank_index_that_is_behind_drops_no_page(store):
    late = Colours("late", multi_vector=True)
    first = coloured_pages(store)
    update_index(PageStore.open(store), store / "index", Colours(), QUIET)
    index = VectorIndex.create(store / "late", late.identity)
    index.add([first["red.png"]], late.encode_pages([page_of(store, "red.png")]))
    retriever = Retriever(store, store / "index", Colours(), SearchSettings(reranker=(late, store / "late")))
    assert [str(lag.index) for lag in retriever.lags] == [str(store / "late")]
    assert names(retriever.search(["blue"], 2)[0]) == ["blue.png", "red.png"]


def test_of_searches_that_disagree_late_interaction_weighs_more_unless_weights_are_given(tmp_path):
    class Opposite(Colours):
        def encode_queries(self, queries: Any) -> list[np.ndarray]:
            return [-vector for vector in super().encode_queries(queries)]

    store, late = coloured_store(tmp_path, "red", "lime"), Colours("late", multi_vector=True)
    update_index(PageStore.open(store), store / "index", Opposite(), QUIET)
    update_index(PageStore.open(store), store / "late", late, QUIET)

    def found(query: str, weights: str = "") -> list[str]:
        search = SearchSettings(weights=weights, further=((late, store / "late"),))
        return names(Retriever(store, store / "index", Opposite(), search).search([query], 2)[0])

    for query, other in (("red", "lime"), ("lime", "red")):
        assert found(query) == [f"{query}.png", f"{other}.png"]
        assert found(query, "1,0.5") == [f"{other}.png", f"{query}.png"]


def coloured_pages(store: Path) -> dict[str, str]:
    return {page.document: page.page_id for page in PageStore.open(store).pages()}


def page_of(store: Path, document: str) -> Page:
    return next(page for page in PageStore.open(store).pages() if page.document == document)


def test_pages_unknown_to_the_second_search_keep_their_places():
    first = [Hit(name, 9.0 - place) for place, name in enumerate("axbyc")]
    assert (
        "".join(hit.page_id for hit in _in_their_places(first, [Hit("c", 3.0), Hit("b", 2.0), Hit("a", 1.0)]))
        == "cxbya"
    )
    assert _in_their_places(first[:1], []) == [Hit("a", 0.0)]


def test_search_names_what_is_behind_and_sync_brings_it_in_line(tmp_path, capsys):
    store = coloured_store(tmp_path, "red", "blue")
    (blue, red), queries = PageStore.open(store).page_ids(), {"q": [1.0, 0.2]}
    vectors = ["--kind", "imported", "--model", str(write_vectors(tmp_path / "v", [red, blue], np.eye(2), queries))]
    assert retrieve.main(["index", str(store), *vectors]) == 0
    write_image(tmp_path / "docs" / "white.png", "white", 56, 56)
    ingested(store, tmp_path / "docs")
    capsys.readouterr()
    assert retrieve.main(["search", str(store), *vectors, "q", "--json"]) == 0
    shown = capsys.readouterr()
    assert "1 pages of the store are not in it and cannot be found; add --sync, or run: " in shown.err
    assert len(json.loads(shown.out)["pages"]) == 2
    (tmp_path / "docs" / "white.png").unlink()
    assert retrieve.main(["sync", str(tmp_path / "docs"), str(store), *vectors, "--workers", "1"]) == 0
    assert "1 removed" in capsys.readouterr().out
    write_image(tmp_path / "docs" / "red.png", "lime", 50, 50)  # its content is another now
    ingested(store, tmp_path / "docs")
    new = [page_id for page_id in PageStore.open(store).page_ids() if page_id not in (red, blue)]
    write_vectors(tmp_path / "v", [*new, blue], np.eye(2), queries)
    assert retrieve.main(["search", str(store), *vectors, "q", "--json", "--sync"]) == 0
    shown = capsys.readouterr()
    assert "behind" not in shown.err
    assert json.loads(shown.out)["pages"][0]["page_id"] == new[0]


def test_sync_takes_emptied_and_lost_folders_out_only_when_told_to(tmp_path, capsys):
    store = coloured_store(tmp_path)
    (tmp_path / "other").mkdir()
    write_image(tmp_path / "other" / "white.png", "white", 56, 56)
    ingested(store, tmp_path / "docs", tmp_path / "other")
    for file in (tmp_path / "docs").iterdir():
        file.unlink()
    (tmp_path / "other" / "white.png").unlink()
    (tmp_path / "other").rmdir()
    sync = ["sync", str(store), "--by", "words", "--workers", "1"]
    assert retrieve.main(sync) == 2
    assert "add --prune" in capsys.readouterr().err
    assert len(PageStore.open(store).page_ids()) == 4
    assert retrieve.main([*sync, "--prune"]) == 0
    assert PageStore.open(store).page_ids() == []
    assert PageStore.open(store).documents() == []


def test_a_text_index_leaves_pages_without_text_out(tmp_path):
    (tmp_path / "docs").mkdir()
    write_pdf(tmp_path / "docs" / "lime.pdf", ["some words"])
    write_image(tmp_path / "docs" / "red.png", "red")
    ingested(tmp_path / "store", tmp_path / "docs")
    reads_text = Colours()
    reads_text.identity = EncoderIdentity(description={"kind": "text"})
    report = update_index(PageStore.open(tmp_path / "store"), tmp_path / "store" / "index", reads_text, QUIET)
    assert (report.num_added, reads_text.num_encoded) == (1, 1)
    retriever = Retriever(tmp_path / "store", tmp_path / "store" / "index", reads_text)
    assert retriever.lags == []
    assert names(retriever.search(["red"], 5)[0]) == ["lime.pdf"]


def first_pages(library: Library, question: str) -> list[str]:
    return names(next(library.ask(question, 5, "multi_image")).pages)


def test_a_running_library_follows_what_others_do_to_the_store(store, tmp_path):
    library = Library(store, store / "index", Colours(), None, LibrarySettings(workers=1), QUIET)
    assert first_pages(library, "blue") == ["blue.png", "red.png"]
    write_image(tmp_path / "docs" / "lime.png", "lime", 56, 56)
    ingested(store, tmp_path / "docs")
    assert first_pages(library, "lime")[0] == "lime.png"
    (tmp_path / "docs" / "blue.png").unlink()
    ingested(store, tmp_path / "docs")
    assert "blue.png" not in first_pages(library, "blue")
    assert library.notes == []


def test_a_library_that_may_not_sync_says_what_it_lacks(store):
    library = Library(store, store / "index", Colours(), None, LibrarySettings(no_sync=True), QUIET)
    assert first_pages(library, "blue") == ["red.png"]
    assert "1 pages of the store are not in it" in library.notes[0]


def test_while_another_process_indexes_a_library_answers_with_what_there_is(store):
    with single_writer(store / "index"):
        library = Library(store, store / "index", Colours(), None, LibrarySettings(), QUIET)
        assert first_pages(library, "blue") == ["red.png"]
        assert library.notes
    assert first_pages(library, "blue") == ["blue.png", "red.png"]
    assert library.notes == []


def test_one_bad_file_does_not_refuse_the_others_and_is_reported_once(tmp_path):
    library = Library(tmp_path / "store", tmp_path / "store" / "index", Colours(), None, LibrarySettings(), QUIET)
    write_image(tmp_path / "red.png", "red", 56, 56)
    (tmp_path / "mail.xyz").write_text("?")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 junk")
    added = library.add([tmp_path / "red.png", tmp_path / "mail.xyz", tmp_path / "broken.pdf"])
    assert added.num_added == 1
    assert [name for name, _ in added.faults] == ["mail.xyz", "broken.pdf"]
    assert [row.document for row in library.documents()] == ["red.png"]
    write_image(tmp_path / "blue.png", "blue", 56, 56)
    again = library.add([tmp_path / "blue.png"])
    assert (again.num_added, again.faults, library.num_pages) == (1, (), 2)
    removal = library.remove(["red.png"])
    assert (removal.num_pages, removal.still_there) == (1, ())
    assert first_pages(library, "red") == ["blue.png"]
    assert not (tmp_path / "store" / "uploads" / "red.png").exists()
    with pytest.raises(InputError, match=r"nothing in .* is called red.png"):
        library.remove(["red.png"])


def test_documents_are_added_and_removed_while_questions_are_asked(store, tmp_path):
    library = Library(store, store / "index", Colours(), None, LibrarySettings(workers=1), QUIET)
    faults: list[BaseException] = []
    done = threading.Event()

    def asking() -> None:
        try:
            while not done.is_set():
                for name in first_pages(library, "red lime"):
                    assert name in ("red.png", "blue.png", "lime.png")
        except BaseException as error:
            faults.append(error)

    askers = [threading.Thread(target=asking) for _ in range(3)]
    for asker in askers:
        asker.start()
    for _ in range(2):
        write_image(tmp_path / "docs" / "lime.png", "lime", 56, 56)
        ingested(store, tmp_path / "docs")
        assert first_pages(library, "lime")[0] == "lime.png"
        (tmp_path / "docs" / "lime.png").unlink()
        ingested(store, tmp_path / "docs")
        assert "lime.png" not in first_pages(library, "lime")
    done.set()
    for asker in askers:
        asker.join()
    assert faults == []


def test_whoever_adds_documents_is_told_how_far_that_is(store, tmp_path):
    library = Library(store, store / "index", Colours(), None, LibrarySettings(workers=1), QUIET)
    write_pdf(tmp_path / "red.pdf", ["one", "two"])
    write_image(tmp_path / "white.png", "white", 56, 56)
    said: list[tuple[str, float]] = []
    library.add([tmp_path / "red.pdf", tmp_path / "white.png"], report=lambda *state: said.append(state))
    assert said[0] == ("0 of 2 documents rendered, 1 pages", 0.0)
    assert ("2 of 2 documents rendered, 3 pages", 1.0) in said
    assert said[-1] == ("3 of 3 pages encoded", 1.0)


def test_a_question_waits_for_no_upload(store, tmp_path, monkeypatch):
    """Neither while documents are rendered nor, beyond a few pages, while they are encoded."""
    encoder, asked = Colours(), threading.Event()
    library = Library(store, store / "index", encoder, None, LibrarySettings(workers=1), QUIET)

    def ingesting(*arguments: Any, **settings: Any) -> Any:
        assert asked.wait(60)  # rendering takes as long as the question
        asked.clear()
        return ingest(*arguments, **settings)

    monkeypatch.setattr("recipes.retrieval.answers.library.ingest", ingesting)
    write_pdf(tmp_path / "red.pdf", [str(number) for number in range(3 * SHARED_PAGES)])
    order: list[str] = []
    encode_pages, encode_queries = encoder.encode_pages, encoder.encode_queries

    def slow_pages(pages: Any) -> Any:
        order.append("pages")
        if len(order) == 1:
            question.start()
            while library._searching.num_waiting < 2:  # the question is next
                time.sleep(0.001)
        return encode_pages(pages)

    def noted_queries(queries: Any) -> Any:
        order.append("question")
        return encode_queries(queries)

    monkeypatch.setattr(encoder, "encode_pages", slow_pages)
    monkeypatch.setattr(encoder, "encode_queries", noted_queries)
    question = threading.Thread(target=first_pages, args=(library, "red"))
    adding = threading.Thread(target=library.add, args=([tmp_path / "red.pdf"],))
    adding.start()
    assert first_pages(library, "blue") == ["blue.png", "red.png"]
    order.clear()
    asked.set()
    adding.join()
    question.join()
    assert order == ["pages", "question", "pages", "pages"]
    assert library.num_pages == 2 + 3 * SHARED_PAGES


def test_watching_works_again_after_changes_that_have_settled(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    write_image(docs / "a.png")
    done: list[int] = []
    looks = iter(
        [
            lambda: write_image(docs / "b.png", "blue"),  # seen at the next look, worked on at the one after it
            lambda: None,
            lambda: None,
            lambda: write_image(docs / "b.png", "lime", 9, 9),
            lambda: None,
        ]
    )

    class Enough(Exception):
        pass

    def sleep(_: float) -> None:
        change = next(looks, None)
        if change is None:
            raise Enough
        change()

    def work() -> None:
        done.append(len(list(docs.iterdir())))
        if len(done) == 2:
            raise InputError("busy")

    with pytest.raises(Enough):
        watch([docs], tmp_path / "store", work, 1.0, QUIET, sleep)
    assert done == [1, 2, 2, 2]  # first, after b.png, again because that failed, after it changed
