"""A question at the desk of a library: what comes while a model looks up its pages, and what the page shows of it."""

from __future__ import annotations

import re
import shutil
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from recipes.answers.at_desk import desk_turns
from recipes.answers.conversations import Conversations
from recipes.answers.reader import Reader
from recipes.retrieval.answers.desk_view import steps_html
from recipes.retrieval.answers.library import Library, LibrarySettings
from recipes.retrieval.answers.page_view import answer_html, pages_html
from recipes.retrieval.search.retriever import SearchSettings
from rsgrpo.errors import InputError
from tests.material.answering import Scripted
from tests.material.retrieval import QUIET, ingested, write_pdf

WORDS = SearchSettings(by="words")
ANSWER = "<evidence>\n[2]: the rate is <b>16</b> percent\n</evidence>\n<answer>16 percent</answer>"
TURNS = [
    "<think>taxes</think><search>tax</search> and more that nobody reads",
    "<open>2</open>",
    "<zoom>2 0 500 1000 1000</zoom>",
    "<open>9</open>",
    ANSWER,
]


class Turns(Scripted):
    """Writes one turn after the other, in pieces of seven characters; then it begins again."""

    def __init__(self, *turns: str) -> None:
        super().__init__()
        self.requests: list[Any] = []
        self.num_closed = 0
        self._turns = turns

    def stream(self, prompt):
        self.requests.append(prompt)
        text = self._turns[(len(self.requests) - 1) % len(self._turns)]
        self._reply = lambda _: text
        try:
            yield from (text[start : start + 7] for start in range(0, len(text), 7))
            yield from self.answer([prompt])
        finally:
            self.num_closed += 1


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("at_desk")
    (folder / "docs").mkdir()
    pages = ["tax offices and their harbours", "the tax rate is 16 percent", "rivers"]
    write_pdf(folder / "docs" / "report.pdf", pages)
    ingested(folder / "store", folder / "docs")
    return folder / "store"


def opened(store: Path, model: Turns, k: int = 3) -> Library:
    index = store / "index"
    turns = desk_turns(store, index=str(index), by="words", k=k)
    reader = Reader(Conversations(model, turns), "{images}{question}")
    library = Library(store, index, None, reader, LibrarySettings(workers=1), QUIET, WORDS, at_desk=True)
    library.lend_to_desk(k)
    return library


def asked(library: Library, question: str = "what is the rate?", history: Any = ()) -> list[Any]:
    return list(library.ask(question, 1, "multi_image", history))


def test_steps_pages_and_text_come_as_they_happen(store):
    model = Turns(*TURNS)
    with closing(opened(store, model)) as library:
        progress = asked(library)
    first, last = progress[0], progress[-1]
    assert (first.text, first.pages, first.steps, first.answered) == ("", (), (), None)
    numbers = [len(each.steps) for each in progress]
    assert numbers == sorted(numbers)
    assert set(numbers) == {0, 1, 2, 3, 4}
    assert all(later.text.startswith(each.text) for each, later in pairwise(progress))
    assert last.text == "\n".join([TURNS[0].partition(" and more")[0], *TURNS[1:]])
    assert [last.text[: step.at_char].splitlines()[-1] for step in last.steps] == last.text.splitlines()[:4]
    assert model.num_closed == len(model.requests) == 5  # the first one before its end
    assert [page.place for page in last.pages] == ["report.pdf, page 1", "report.pdf, page 2"]
    assert all(page.score > 0 for page in last.pages)
    (box,) = last.zooms[2]
    assert (last.opened, box.top, box.bottom) == ({2}, 0.5, 1.0)
    assert [page.number for page in last.answered.cited] == [2]
    assert last.answered.line["errors"] == ()
    assert [step["call"] for step in last.answered.line["steps"]] == ["search", "open", "zoom", "open"]
    assert last.seconds["whole"] >= last.seconds["first_text"] > 0


def test_the_page_shows_calls_opened_pages_boxes_and_nothing_as_markup(store):
    bold = "<i>now</i> <search><b>tax</b></search>"
    with closing(opened(store, Turns(bold, *TURNS[1:]))) as library:
        progress = asked(library)
        trace = library.trace(progress[-1])
    writing = next(each for each in progress if len(each.steps) == 1 and each.text.endswith("<open>2"))
    html = steps_html(writing)
    assert "searched for \u201c&lt;b&gt;tax&lt;/b&gt;\u201d" in html
    assert "&lt;i&gt;now&lt;/i&gt;" in html
    assert html.count("<li>") == 1
    assert "&lt;open&gt;2" in html
    last = steps_html(progress[-1])
    assert last.count("<li>") == 4
    assert 'opened <button popovertarget="page-2">[2]</button>' in last
    assert "from 0 to 100% across, 50 to 100% down" in last
    assert "There is no page [9]." in last
    pages = pages_html(progress[-1], str)
    one, two = re.findall(r"<figure.*?</figure>", pages)
    assert 'class="found"' in one
    assert 'class="cited"' in two
    assert '<span class="badge">opened</span>' in two
    drawn = 'class="mark zoom" style="left:0.00%;top:50.00%;width:100.00%;height:50.00%"'
    assert two.partition("</button>")[0].count(drawn) == 1  # on the small page, and on the large one
    assert two.count(drawn) == 2
    zoomed = next(each for each in progress if len(each.steps) == 3)
    assert 'class="opened" data-rank="2"' in pages_html(zoomed, str)
    assert "the rate is &lt;b&gt;16&lt;/b&gt; percent" in answer_html(progress[-1])
    assert "faults" not in answer_html(progress[-1])
    assert (trace["setting"], len(trace["result"]["steps"])) == ("desk", 4)


def test_a_question_that_is_left_frees_the_desk_for_the_next_one(store):
    model = Turns(*TURNS)
    with closing(opened(store, model)) as library:
        visit: Any = library.ask("what is the rate?", 1, "multi_image")
        while not next(visit).steps:
            pass
        visit.close()
        model.requests.clear()
        assert asked(library)[-1].answered.line["answer"] == "16 percent"


def test_a_follow_up_knows_what_was_asked_and_starts_with_an_empty_desk(store):
    model = Turns("<open>1</open>", "<answer>none</answer>")
    with closing(opened(store, model)) as library:
        last = asked(library, "and in 2024?", [("what is the rate?", "16 percent")])[-1]
    assert "Earlier question: what is the rate?\nIts answer: 16 percent" in model.requests[0].text
    assert last.question == "and in 2024?"
    assert last.steps[0].text == "There is no page [1]. The desk has no page yet. Search first: <search>words</search>"


def test_documents_that_are_added_are_found_by_the_next_search(store, tmp_path):
    model = Turns("<search>glaciers</search>", "<answer>none</answer>")
    with closing(opened(shutil.copytree(store, tmp_path / "store"), model)) as library:
        assert asked(library)[-1].pages == ()
        write_pdf(tmp_path / "ice.pdf", ["glaciers melt"])
        library.add([tmp_path / "ice.pdf"])
        assert [page.document for page in asked(library)[-1].pages] == ["ice.pdf"]
        library.remove([f"{library.uploads_folder}/ice.pdf"])
        assert asked(library)[-1].pages == ()


def test_an_empty_store_is_refused_before_the_model_is_asked(tmp_path):
    model = Turns("<search>x</search>")
    with closing(opened(tmp_path / "store", model)) as library, pytest.raises(InputError, match="add documents first"):
        asked(library)
    assert model.requests == []
