"""The page over a store: what it shows as HTML, and what may be added and asked."""

from __future__ import annotations

import asyncio
import gc
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers", reason="needs the retrieval extra")

from recipes import app
from recipes.answers.batch import result_line
from recipes.answers.reader import Reader
from recipes.answers.types import Answer
from recipes.retrieval.answers.generation import Answered, AskedQuestion
from recipes.retrieval.answers.library import Library, LibrarySettings
from recipes.retrieval.answers.page_view import answer_html, pages_html
from recipes.retrieval.answers.progress import AnswerProgress
from recipes.retrieval.answers.uploads import VisitSettings
from recipes.retrieval.search.found import FoundPage
from recipes.retrieval.search.retriever import SearchSettings
from rollout.types import Prompt
from rsgrpo.errors import InputError
from tests.material.answering import Scripted
from tests.material.retrieval import QUIET, coloured_store, ingested, write_image, write_pdf

ANSWER = (
    "<observe>o</observe><evidence>\n[1]: no relevant information\n[2]: seven <b>apples</b>\n</evidence>"
    "<think>t</think><answer>7 & more</answer>"
)
PAGES = tuple(
    FoundPage(rank, 1 - rank / 4, f"p{rank}", f"<i>{rank}.pdf", rank, f"/store/{rank} a.png", "") for rank in (1, 2)
)


def finished(text: str, finish_reason: str = "stop", error: str = "") -> AnswerProgress:
    line = result_line(Answer(Prompt("question", "?", ("a", "b")), text, finish_reason, error), "m")
    return AnswerProgress(
        "?", "multi_image", PAGES, text, Answered(AskedQuestion("question", "?", PAGES), line, PAGES), {}
    )


# What is shown


def test_cited_pages_are_framed_with_rank_and_score_and_nothing_of_a_document_is_markup():
    html = pages_html(finished(ANSWER), app.address)
    first, second = re.findall(r"<figure.*?</figure>", html)
    assert 'class="found" data-rank="1"' in first
    assert 'class="cited" data-rank="2"' in second
    assert "[2]</span> 0.5000" in second
    assert 'src="/gradio_api/file=/store/2%20a.png"' in second
    assert "<i>" not in html


def test_while_an_answer_is_written_no_page_is_framed():
    asking = AnswerProgress("?", "multi_image", PAGES, "<obs", None, {})
    assert "cited" not in pages_html(asking, str)
    assert answer_html(asking) == ""


def test_an_evidence_card_opens_its_page():
    html = answer_html(finished(ANSWER))
    assert '<div class="answer">7 &amp; more</div>' in html
    (card,) = re.findall(r"<button.*?</button>", html)
    assert 'popovertarget="page-2"' in card
    assert "seven &lt;b&gt;apples&lt;/b&gt;" in card
    assert 'id="page-2"' in pages_html(finished(ANSWER), str)


def test_faults_are_shown_under_the_answer():
    assert "no &lt;evidence&gt; block" in answer_html(finished("<answer>7</answer>"))
    assert "raise --max-tokens" in answer_html(finished(ANSWER, "length"))
    html = answer_html(finished("", "error", "the endpoint <fell>"))
    assert "the endpoint &lt;fell&gt;" in html
    assert 'class="answer"' not in html


# What may be added and asked


def library(store: Path, **limits: Any) -> Library:
    nobody: Any = None  # encodes: nothing comes that far
    return Library(store, store / "index", nobody, None, LibrarySettings(**limits), QUIET)


def test_what_cannot_be_added_is_refused_before_anything_is_kept(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "b.xyz").write_text("nothing we read")
    (tmp_path / "large.pdf").write_bytes(b"%PDF-" + bytes(1 << 20) + b"x")
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "a.png", tmp_path / "other" / "a.png")
    empty = library(tmp_path / "store", max_files=2, max_file_mb=1)
    for files, says in (
        ([], "0 files were given; between 1 and --max-files 2"),
        (["a.png", "b.xyz", "large.pdf"], "3 files were given"),
        (["b.xyz"], "b.xyz: .xyz files are not read, and its content is neither"),
    ):
        with pytest.raises(InputError, match=says):
            empty.add([tmp_path / file for file in files])
    (tmp_path / "large.pdf").write_bytes(b"%PDF-" + bytes(2 << 20))
    with pytest.raises(InputError, match=r"large.pdf: it has 2 MiB, more than --max-file-mb 1"):
        empty.add([tmp_path / "large.pdf"])
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ("  ", "the question is empty"),
        ("é" * 4_001, "the question has 4,001 characters, more than 4,000"),
        ("how\ud83d?", "the question contains half a character"),
        ("how much?", "add documents first"),
    ],
)
def test_a_question_needs_words_and_pages(tmp_path, question, says):
    with pytest.raises(InputError, match=says):
        next(library(tmp_path / "store").ask(question, 3, "multi_image"))


def test_a_folder_that_is_something_else_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(InputError, match="neither a page store nor an empty folder"):
        library(tmp_path)
    with pytest.raises(InputError, match="--max-pages must be >= 1, got 0"):
        LibrarySettings(max_pages=0)


def test_a_follow_up_is_asked_together_with_the_questions_before_it(tmp_path):
    pytest.importorskip("gradio", reason="needs the app extra")
    prompts: list[Prompt] = []

    def reply(prompt: Prompt) -> str:
        prompts.append(prompt)
        return "<answer>seven</answer>"

    store = coloured_store(tmp_path, "red")
    write_pdf(tmp_path / "docs" / "apples.pdf", ["apples are red"])
    ingested(store, tmp_path / "docs")
    search, reader = SearchSettings(by="words"), Reader(Scripted(reply), "{images}\n{question}")
    words = Library(store, store / "index", None, reader, LibrarySettings(), QUIET, search)
    do = app.Handlers(words, "title", tmp_path, VisitSettings())
    *_, (*_, history, shown) = do.ask("which apples?", 1, "multi_image", False, [])
    assert history == [("which apples?", "seven")]
    assert "<dt><b>which apples?</b></dt><dd>seven</dd>" in shown
    *_, last = do.ask("apples, how many?", 1, "multi_image", True, history)
    assert "Earlier question: which apples?\nIts answer: seven\nQuestion now: apples, how many?" in prompts[-1].text
    *_, last = do.ask("apples, how many?", 1, "multi_image", False, history)
    assert "which apples?" not in prompts[-1].text
    assert last[-2][-1] == ("apples, how many?", "seven")


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("box", False)]
)
def test_only_addresses_of_this_machine_count_as_local(host, local):
    assert app._is_loopback(host) is local


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "none", "-k", "21"], "-k must be in [1, 20], got 21"),
        (["--model", "none", "--engine", "vllm"], "name a model folder or hub id, or an endpoint"),
        (["--model", "none", "--rerank", "none"], "--rerank needs --rerank-index"),
        ([], "there is no page store"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, says, tmp_path, capsys):
    pytest.importorskip("gradio", reason="needs the app extra")
    assert app.main([str(tmp_path / "store"), *arguments]) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert shown.count("\n") == 1


@pytest.fixture
def open_loops() -> Iterator[None]:
    """Drop the event loops that gradio leaves open, here, so that no later test is charged with them."""
    yield
    asyncio.set_event_loop(None)
    gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # of gradio's
def test_originals_are_linked_and_served_only_where_that_is_asked_for(open_loops, tmp_path):
    gradio = pytest.importorskip("gradio", reason="needs the app extra")
    from fastapi.testclient import TestClient

    docs, store = tmp_path / "docs", tmp_path / "store"
    docs.mkdir()
    write_pdf(docs / "apples.pdf", ["apples are red"])
    write_pdf(docs / "apples.docx", ["apples in a letter"])  # its bytes are a PDF's, but a browser goes by the name
    write_pdf(tmp_path / "secret.pdf", ["apples are secret"])
    (docs / "link.pdf").symlink_to(tmp_path / "secret.pdf")
    ingested(store, docs)
    write_pdf(tmp_path / "pears.pdf", ["pears are green apples"])

    def page_of(*asked: str) -> tuple[str, dict[str, int]]:
        """Return the pages of a question as HTML, and what the server says to requests for four files."""
        options = app.parser().parse_args([str(store), "--by", "words", "--workers", "1", *asked])
        library = app.open_library(options, QUIET)
        library.add([tmp_path / "pears.pdf"])
        page = app.build_page(library, options, tmp_path)
        do = next(fn.fn.__self__ for fn in page.fns.values() if fn.name == "ask")
        with TestClient(gradio.routes.App.create_app(page)) as client:
            *_, (_, _, html, *_) = do.ask("apples", 5, "multi_image", False, [])
            files = [
                docs / "apples.pdf",
                docs / "apples.docx",
                tmp_path / "secret.pdf",
                store / "uploads" / "pears.pdf",
            ]
            return html, {file.name: client.get(app.address(str(file))).status_code for file in files}

    html, served = page_of()
    assert re.findall(r"file=[^\"]*?([\w.]+)#page=1", html) == ["pears.pdf"]
    assert served == {"apples.pdf": 403, "apples.docx": 403, "secret.pdf": 403, "pears.pdf": 200}
    html, served = page_of("--link-originals")
    assert sorted(re.findall(r"file=[^\"]*?([\w.]+)#page=1", html)) == ["apples.pdf", "pears.pdf"]
    assert served == {"apples.pdf": 200, "apples.docx": 403, "secret.pdf": 403, "pears.pdf": 200}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # of gradio's
def test_a_visit_keeps_nothing_of_the_questions_that_it_has_asked(open_loops, tmp_path):
    pytest.importorskip("gradio", reason="needs the app extra")
    from gradio.state_holder import SessionState

    write_pdf(tmp_path / "apples.pdf", ["apples are red"])
    ingested(tmp_path / "store", tmp_path / "apples.pdf")
    options = app.parser().parse_args([str(tmp_path / "store"), "--by", "words"])
    reader = Reader(Scripted(lambda prompt: "<answer>red</answer>"), "{images}\n{question}")
    found_by = SearchSettings(by="words")
    answers = Library(tmp_path / "store", tmp_path / "index", None, reader, LibrarySettings(), QUIET, found_by)
    page = app.build_page(answers, options, tmp_path)
    ask = next(fn for fn in page.fns.values() if fn.name == "ask")
    visit = SessionState(page)

    async def asked(question: str) -> tuple[int, int]:
        """Ask as the page does; return how many components and values the visit has."""
        step: dict[str, Any] = {"is_generating": True, "iterator": None}
        while step["is_generating"]:
            inputs = [question, 3, "multi_image", False, None]
            step = await page.process_api(ask, inputs, visit, iterator=step["iterator"], session_hash="visit")
        return len(visit.blocks_config.blocks), len(visit.config_values)

    once, *more = [asyncio.run(asked(question)) for question in ("apples?", "pears?", "apples?", "apples?")]
    assert more == [once] * 3


@pytest.mark.parametrize(
    ("arguments", "host", "status"),
    [
        ([], "127.0.0.1:7860", 200),
        ([], "localhost:7860", 200),
        ([], "evil.example", 403),
        (["--allow-host", "pages.example"], "pages.example", 200),
    ],
)
def test_the_page_answers_only_to_its_names(arguments, host, status):
    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guards = app.guarded(app.parser().parse_args(["STORE", *arguments]), Path("nowhere"))["app_kwargs"]["middleware"]
    page, sent = guards[0].cls(inner, *guards[0].args, **guards[0].kwargs), []

    async def send(message):
        sent.append(message)

    asyncio.run(page({"type": "http", "headers": [(b"host", host.encode())]}, None, send))
    assert sent[0]["status"] == status


def test_a_password_lets_in_whoever_knows_it(monkeypatch):
    monkeypatch.setenv("RSGRPO_APP_PASSWORD", "höchst geheim")
    admits = app.guarded(app.parser().parse_args(["STORE", "--host", "0.0.0.0"]), Path("nowhere"))["auth"]
    assert admits("anyone", "höchst geheim")
    assert not admits("anyone", "geheim")
