from __future__ import annotations

import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from recipes import retrieve
from recipes.retrieval.desk import shelf
from recipes.retrieval.desk.environment import Desk
from recipes.retrieval.encoders.base import EncoderSettings
from recipes.retrieval.encoders.choice import load_encoder
from recipes.retrieval.encoders.sentence import SentenceEncoder
from recipes.retrieval.search.origin import recall
from recipes.retrieval.search.retriever import Retriever, SearchSettings
from rollout.inputs.images import decode
from rollout.turns.environment import Reply
from rollout.types import Prompt
from rsgrpo.errors import InputError
from tests.material.retrieval import coloured_store, ingested, write_pdf

PROMPT = Prompt("q", "what is the rate?")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("desk")
    (folder / "docs").mkdir()
    pages = ["the tax rate is 16 percent", "a list of harbours", "tax offices and their harbours", "rivers"]
    write_pdf(folder / "docs" / "report.pdf", pages)
    ingested(folder / "store", folder / "docs")
    return str(folder / "store")


def told(desk: Desk, turn: str) -> Reply:
    reply = desk.step(turn)
    assert reply is not None
    return reply


def sizes(reply):
    return [decode(image).size for image in reply.images]


def test_search_open_zoom_and_answer(store):
    desk = Desk(PROMPT, store=store, k=2, thumbnail_side=50)
    found = told(desk, "<think>taxes</think><search>tax rate</search>")
    assert found.text.startswith("[1] report.pdf, page 1 (")
    assert found.text.count("<image>") == len(found.images) == 2
    assert "[2] report.pdf, page 3<image>" in found.text
    assert max(sizes(found)[0]) == 50
    assert (found.facts["query"], found.facts["numbers"]) == ("tax rate", [1, 2])
    first, second = found.facts["pages"]
    opened = told(desk, "<open>2</open>")
    assert opened.facts == {"call": "open", "number": 2, "page": second}
    (full,) = sizes(opened)
    assert max(full) > 50
    part = told(desk, "<zoom>1 0 0 500 1000</zoom>")
    assert part.facts == {"call": "zoom", "number": 1, "page": first, "box": [0.0, 0.0, 0.5, 1.0]}
    assert sizes(part) == [((full[0] + 1) // 2, full[1])]
    assert desk.step("<answer>16 percent</answer>") is None


def test_a_score_that_says_nothing_is_not_shown(store):
    text = told(Desk(PROMPT, store=store, k=3), "<search>tax rate</search>").text
    assert "page 3<image>" in text  # only "tax" is there, as on half of the pages
    (rare,) = re.findall(r"page 1 \((.*)\)", text)
    assert float(rare) > 0


def test_a_page_keeps_its_number_over_searches(store):
    desk = Desk(PROMPT, store=store, k=1)
    assert [told(desk, f"<search>{query}</search>").facts["numbers"] for query in ("rivers", "rate", "rivers")] == [
        [1], [2], [1],
    ]  # fmt: skip


def test_what_cannot_be_done_is_told_and_counted(store):
    desk = Desk(PROMPT, store=store)
    early = told(desk, "<open>1</open>")
    assert (early.fault, early.facts) == ("bad_call", {"call": "open"})
    assert early.text == "There is no page [1]. The desk has no page yet. Search first: <search>words</search>"
    assert told(desk, "<open>first</open>").fault == "bad_call"
    assert told(desk, "<search>\ud800</search>").fault == "bad_call"
    nothing = told(desk, "<search>zebra</search>")
    assert (nothing.text, nothing.images, nothing.fault) == ("No page was found. Search with other words.", (), "")
    told(desk, "<search>tax</search>")
    assert "pages [1] to [2]" in told(desk, "<zoom>3 0 0 9 9</zoom>").text


def test_equal_episodes_get_equal_answers_from_one_index(store, monkeypatch):
    searched = []
    real = shelf.Retriever.search

    def counted(*args, **rest):
        searched.append(1)
        return real(*args, **rest)

    monkeypatch.setattr(shelf.Retriever, "search", counted)

    def episode(_):
        desk = Desk(PROMPT, store=store, k=3)
        return [
            told(desk, turn)
            for turn in ("<search>harbours list</search>", "<open>1</open>", "<zoom>1 0 0 99 99</zoom>")
        ]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(episode, range(8)))
    assert all(answer == answers[0] for answer in answers)
    assert len(searched) == 1


def test_an_episode_survives_pickling(store):
    desk = Desk(PROMPT, store=store)
    told(desk, "<search>rivers</search>")
    again = pickle.loads(pickle.dumps(desk))
    assert told(again, "<open>1</open>") == told(desk, "<open>1</open>")


def test_rows_bring_their_own_pages(tmp_path):
    for name, size in (("a.png", (112, 56)), ("b.png", (56, 28))):
        Image.new("RGB", size).save(tmp_path / name)
    prompt = Prompt("q", "?", truth={"pages": ["a.png", "b.png"]})
    desk = Desk(prompt, folder=str(tmp_path), box_scale=100)
    opened = told(desk, "<open>2</open>")
    assert (opened.text, opened.images) == ("[2]<image>", (str(tmp_path / "b.png"),))
    assert opened.facts["page"] == "b.png"
    assert sizes(told(desk, "<zoom>1 90 0 100 20</zoom>")) == [(12, 12)]
    assert sizes(told(desk, "<zoom>1 0 0 0.1 0.1</zoom>")) == [(1, 1)]
    assert told(desk, "<search>x</search>").text == "There is nothing to search. The desk has pages [1] to [2]."
    assert told(desk, "<open>3</open>").fault == "bad_call"


def test_rows_without_pages_and_folders_without_a_store_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"column 'pages' must be a list of page images, got None"):
        Desk(PROMPT)
    with pytest.raises(InputError, match="is not a page store"):
        Desk(PROMPT, store=str(tmp_path))


@pytest.fixture(scope="module")
def coloured(tmp_path_factory, tiny_model_path):
    """A store of coloured pages without text but one, with an index of a small model."""
    folder = tmp_path_factory.mktemp("coloured")
    coloured_store(folder)
    write_pdf(folder / "docs" / "words.pdf", ["red harbours"])
    ingested(folder / "store", folder / "docs")
    small = ["--min-pixels", "784", "--max-pixels", "3136", "--device", "cpu"]
    assert retrieve.main(["index", str(folder / "store"), "--model", tiny_model_path, *small]) == 0
    return str(folder / "store")


def ranking(store, query, by, k=4):
    return told(Desk(PROMPT, store=store, by=by, k=k), f"<search>{query}</search>")


def test_the_desk_searches_by_vectors_and_by_both_with_the_encoder_of_the_index(coloured, tiny_model_path):
    encoder = load_encoder(recall(Path(coloured) / "index", EncoderSettings("")))
    by_words = ranking(coloured, "red", "words").facts["pages"]
    assert len(by_words) == 1  # the only page with text
    rankings = {}
    for by in ("vectors", "hybrid"):
        shown = ranking(coloured, "red", by)
        retriever = Retriever(Path(coloured), Path(coloured) / "index", encoder, SearchSettings(by=by))
        (found,) = retriever.search(["red"], 4, distinct=True)
        assert shown.facts["pages"] == [page.page_id for page in found]
        assert shown.facts["scores"] == [page.score for page in found]
        assert len(shown.images) == len(found) == 4
        rankings[by] = shown.facts["pages"]
    # fused with the one that has the word, which moves up
    assert rankings["hybrid"].index(by_words[0]) <= rankings["vectors"].index(by_words[0])
    assert sorted(rankings["hybrid"]) == sorted(rankings["vectors"])


def test_searches_by_vectors_are_the_same_each_time_and_encoded_once(coloured, monkeypatch):
    encoded = []
    real = SentenceEncoder.encode_queries

    def counted(self, queries):
        encoded.extend(queries)
        return real(self, queries)

    monkeypatch.setattr(SentenceEncoder, "encode_queries", counted)
    shelf._opened.cache_clear()
    first = ranking(coloured, "a red page", "vectors")
    assert ranking(coloured, "a  red\npage", "vectors") == first  # another way to write the same query
    assert encoded == ["a red page"]
    shelf._opened.cache_clear()  # as in another process
    shelf._encoder.cache_clear()
    assert ranking(coloured, "a red page", "vectors") == first
    assert encoded == ["a red page"] * 2


def test_what_is_kept_belongs_to_the_files_as_they_are(tmp_path):
    (tmp_path / "docs").mkdir()
    write_pdf(tmp_path / "docs" / "one.pdf", ["rivers"])
    ingested(tmp_path / "store", tmp_path / "docs")
    store = str(tmp_path / "store")
    desk = Desk(PROMPT, store=store)
    assert told(desk, "<search>rivers</search>").facts["numbers"] == [1]
    write_pdf(tmp_path / "docs" / "two.pdf", ["rivers and lakes"])
    ingested(tmp_path / "store", tmp_path / "docs")
    assert sorted(told(desk, "<search>rivers</search>").facts["numbers"]) == [1, 2]
    page = str(tmp_path / "page.png")
    Image.new("RGB", (40, 20), "red").save(page)
    before = shelf.small(page, 10), shelf.part(page, (0, 0, 0.5, 1))
    assert (shelf.small(page, 10), shelf.part(page, (0, 0, 0.5, 1))) == before
    Image.new("RGB", (60, 20), "blue").save(page)
    assert decode(shelf.small(page, 10)).getpixel((0, 0)) == (0, 0, 255)
    assert decode(shelf.part(page, (0, 0, 0.5, 1))).size == (30, 20)
