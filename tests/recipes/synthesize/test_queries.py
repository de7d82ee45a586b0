"""Questions about pages, written by a teacher: what is usable, what is asked again, who reads the rows."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recipes.answers.questions import read_questions
from recipes.retrieval.evaluation.scores import read_qrels, read_queries
from recipes.retrieval.pages.store import PageStore
from recipes.synthesize import commands as synthesize
from recipes.synthesize import page_questions
from recipes.synthesize.page_questions import QueryConfig, QueryPair, SourcePage, judge, read_pairs
from recipes.synthesize.retries import CUT_OFF, FAILED, KEPT
from rsgrpo.errors import InputError
from tests.material.answering import lines_of
from tests.material.http_stub import Say, Teacher
from tests.material.retrieval import ingested

CONFIG = QueryConfig()


def pairs(*rows: tuple[str, str]) -> str:
    return json.dumps([{"question": question, "answer": answer} for question, answer in rows])


# What is usable


def test_a_list_is_read_whatever_stands_around_it():
    written = pairs(("Who  won\nthe cup?", "Ada"), ("When was it?", "1999"))
    text = f"Here they are:\n```json\n{written}\n```"
    found = [QueryPair("Who won the cup?", "Ada"), QueryPair("When was it?", "1999")]
    assert read_pairs(text, CONFIG) == (found, Counter())
    assert read_pairs('[{"question": "How many?", "answer": 7}]', CONFIG)[0] == [QueryPair("How many?", "7")]


def test_unusable_pairs_are_dropped_and_counted():
    text = pairs(
        ("Who won the cup?", "Ada"),
        ("who won, the Cup", "Ada"),
        ("", "x"),
        ("When?", " "),
        ("What does this page show?", "cups"),
        ("What is in the figure above?", "cups"),
        ("What does the slide say?", "cups"),
        ("Q" * 301, "x"),
        ("Where was it?", "A" * 201),
        ("Which cup?", "the silver one"),
        ("One more?", "yes"),
    )
    found, faults = read_pairs(text, QueryConfig(max_pairs=2))
    assert found == [QueryPair("Who won the cup?", "Ada"), QueryPair("Which cup?", "the silver one")]
    assert faults == {
        page_questions.REPEATED: 1,
        page_questions.EMPTY: 2,
        page_questions.POINTS_AT_PAGE: 3,
        page_questions.LONG: 2,
        page_questions.SURPLUS: 1,
    }


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (pairs(("Who won?", "Ada")), KEPT),
        ("[]", KEPT),
        ("I see nothing.", page_questions.NO_LIST),
        ('{"question": "a", "answer": "b"}', page_questions.NO_LIST),
        ('["Who won?"]', page_questions.NO_LIST),
        ('[{"question": "Who won?"}]', page_questions.NO_LIST),
        ('[{"question": "Who won?", "answer": null}]', page_questions.NO_LIST),
        ('[{"question": "Who won?", "answer": "A"', page_questions.NO_LIST),
        (pairs(("What is this image?", "a cup")), page_questions.NOTHING_USABLE),
    ],
)
def test_what_is_kept(text, verdict):
    assert judge({"raw": text, "finish_reason": "stop"}, CONFIG) == verdict
    assert judge({"raw": text, "finish_reason": "length"}, CONFIG) == CUT_OFF
    assert judge({"raw": "", "finish_reason": "error"}, CONFIG) == FAILED


# The command


def width_of(content: list[dict[str, Any]]) -> int:
    """Return the width of the page that is asked about, in units of 28 pixels."""
    page = base64.b64decode(content[0]["image_url"]["url"].partition(",")[2])
    return Image.open(io.BytesIO(page)).width // 28


@pytest.fixture
def teach() -> Iterator[Callable[[Say], Teacher]]:
    with ExitStack() as stack:
        yield partial(Teacher, stack, width_of)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four pages, 1 to 4 units wide."""
    folder = tmp_path / "pages"
    (folder / "more").mkdir(parents=True)
    for page, name in enumerate(("a.png", "b.png", "more/c.png", "more/d.png"), start=1):
        Image.new("RGB", (28 * page, 56), "white").save(folder / name)
    (folder / "notes.txt").write_text("no page")
    return folder


def run(teacher: Teacher, source: Path, out: Path, *more: str) -> int:
    options = ["--endpoint", teacher.url, "--max-tries", "1", "--min-pixels", "784", "--max-pixels", "12544", *more]
    return synthesize.main(["queries", "--in", str(source), "--out", str(out), *options])


def test_pairs_of_pages_train_a_retriever_and_evaluate_one(teach, images, tmp_path, capsys):
    replies = {
        1: [pairs(("Who won the cup?", "Ada"), ("What is the total?", "7"))],
        2: ["no list", pairs(("When was the cup made?", "1999"), ("What is this page?", "a list"))],
        3: ["no list", "no list"],
        4: [pairs(("What is the total?", "9"))],
    }
    teacher = teach(lambda page, times: replies[page][times])
    out = tmp_path / "out" / "pairs.jsonl"
    assert run(teacher, images, out, "--price-in", "2", "--price-out", "10") == 0
    rows = lines_of(out)
    assert rows[0] == {
        "id": "a.png-q1", "query": "Who won the cup?", "answer": ["Ada"], "image": "../pages/a.png", "page_id": "a.png",
        "document": "a.png", "number": 1,
    }  # fmt: skip
    assert [row["query"] for row in rows] == ["Who won the cup?", "When was the cup made?"]
    assert "At most 6 of them" in teacher.texts[0]
    report = json.loads((tmp_path / "out" / "pairs.report.json").read_text())
    assert report == {
        "pages": 4,
        "pairs": 2,
        "pages_with_pairs": 2,
        "dropped_pairs": {page_questions.POINTS_AT_PAGE: 1, page_questions.SEVERAL_PAGES: 2},
        "kept": 3,
        "kept_by_try": {"1": 2, "2": 1},
        "responses": 6,
        "acceptance": 0.5,
        "rejected": {page_questions.NO_LIST: 3},
        "prompt_tokens": 6000,
        "response_tokens": 600,
        "cost": 0.018,
        "cost_per_pair": 0.009,
        "model": "teacher",
    }
    assert "3 x no JSON list" in capsys.readouterr().err

    # Who reads them
    questions = read_questions(str(out), need_answers=True)
    assert [(question.id, question.answers) for question in questions] == [
        ("a.png-q1", ("Ada",)), ("b.png-q1", ("1999",))
    ]  # fmt: skip
    assert [Path(str(question.images[0])).resolve() for question in questions] == [images / "a.png", images / "b.png"]
    assert [(query.id, query.text) for query in read_queries(out)] == [
        ("a.png-q1", "Who won the cup?"), ("b.png-q1", "When was the cup made?")
    ]  # fmt: skip
    assert read_qrels(out.with_suffix(".qrels.tsv")) == {"a.png-q1": {"a.png": 1}, "b.png-q1": {"b.png": 1}}


def test_the_rows_are_pairs_for_training(teach, images, tmp_path):
    pytest.importorskip("sentence_transformers", reason="needs the retrieval extra")
    from recipes.retrieval.training.pairs import read_pairs as training_pairs

    teacher = teach(lambda page, times: pairs((f"What does number {page} say?", "it")))
    assert run(teacher, images, tmp_path / "pairs.jsonl") == 0
    found = training_pairs(str(tmp_path / "pairs.jsonl"))
    assert [pair.query for pair in found] == [f"What does number {page} say?" for page in (1, 2, 3, 4)]
    assert Path(str(found[2].page)).resolve() == images / "more" / "c.png"


def test_pages_of_a_store_are_judged_by_page_id(teach, images, tmp_path):
    store = tmp_path / "store"
    ingested(store, images / "a.png")
    (page_id,) = PageStore.open(store).page_ids()
    teacher = teach(lambda page, times: pairs(("Who won the cup?", "Ada")))
    own = tmp_path / "request.txt"
    own.write_text("Write {max_pairs} questions.")
    assert run(teacher, store, tmp_path / "pairs.jsonl", "--prompt", str(own), "--max-pairs", "3") == 0
    assert teacher.texts == ["\nWrite 3 questions."]
    assert read_qrels(tmp_path / "pairs.qrels.tsv") == {f"{page_id}-q1": {page_id: 1}}
    (row,) = lines_of(tmp_path / "pairs.jsonl")
    assert (row["document"], row["number"]) == ("a.png", 1)


def test_pages_of_a_folder_are_its_images(images):
    assert page_questions.read_pages(images)[3] == SourcePage("more/d.png", str(images / "more/d.png"), "more/d.png")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--in", "nowhere"], "--in nowhere: neither a page store nor a folder with images"),
        (["--max-pairs", "0"], "error: --max-pairs must be >= 1, got 0"),
        (["--temperature", "0"], "--tries > 1 asks again"),
        (["--prompt", "gone.txt"], "--prompt gone.txt cannot be read"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, says, images, tmp_path, capsys):
    command = ["queries", "--in", str(images), "--out", str(tmp_path / "o.jsonl"), "--model", "m", *arguments]
    assert synthesize.main(command) == 2
    assert says in capsys.readouterr().err


def test_a_request_with_other_placeholders_is_refused():
    with pytest.raises(InputError, match=r"the only placeholder is \{max_pairs\}"):
        QueryConfig(request="Write {count} questions")
