"""The page over a store: what it shows as HTML, what may be added, and all of it in a real browser."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers", reason="needs the retrieval extra")

from recipes import app
from recipes.answerer import Output
from recipes.batch import result_line
from recipes.retrieval.generation import Answered, Asked
from recipes.retrieval.library import Asking, Library, LibrarySettings
from recipes.retrieval.page_view import answer_html, pages_html
from recipes.retrieval.retriever import FoundPage
from rollout.types import Prompt
from rsgrpo.console import Console
from rsgrpo.errors import InputError
from tests.retrieval_material import write_image, write_pdf

ROOT = Path(__file__).parent.parent
ANSWER = (
    "<observe>o</observe><evidence>\n[1]: no relevant information\n[2]: seven <b>apples</b>\n</evidence>"
    "<think>t</think><answer>7 & more</answer>"
)
PAGES = tuple(
    FoundPage(rank, 1 - rank / 4, f"p{rank}", f"<i>{rank}.pdf", rank, f"/store/{rank} a.png", "") for rank in (1, 2)
)


def finished(text: str, finish_reason: str = "stop", error: str = "") -> Asking:
    line = result_line(Output(Prompt("question", "?", ("a", "b")), text, finish_reason, error), "m")
    return Asking("?", "multi_image", PAGES, text, Answered(Asked("question", "?", PAGES), line, PAGES), {})


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
    asking = Asking("?", "multi_image", PAGES, "<obs", None, {})
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
    return Library(store, store / "index", nobody, None, LibrarySettings(**limits), Console(io.StringIO()))


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
        (["a.png", "b.xyz"], "b.xyz is no document"),
        (["a.png", "other/a.png"], "two of the files are called a.png"),
    ):
        with pytest.raises(InputError, match=says):
            empty.add([tmp_path / file for file in files])
    (tmp_path / "large.pdf").write_bytes(b"%PDF-" + bytes(2 << 20))
    with pytest.raises(InputError, match=r"large.pdf has 2 MiB, more than --max-file-mb 1"):
        empty.add([tmp_path / "large.pdf"])
    assert not (tmp_path / "store").exists()


def test_a_question_needs_words_and_pages(tmp_path):
    with pytest.raises(InputError, match="the question is empty"):
        next(library(tmp_path / "store").ask("  ", 3, "multi_image"))
    with pytest.raises(InputError, match="the question has 4,001 characters, more than 4,000"):
        next(library(tmp_path / "store").ask("é" * 4_001, 3, "multi_image"))
    with pytest.raises(InputError, match="add documents first"):
        next(library(tmp_path / "store").ask("how much?", 3, "multi_image"))


def test_a_folder_that_is_something_else_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(InputError, match="neither a page store nor an empty folder"):
        library(tmp_path)
    with pytest.raises(InputError, match="--max-pages must be >= 1, got 0"):
        LibrarySettings(max_pages=0)


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
        ([], "index does not say which model made it; name the retriever with --model"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, says, tmp_path, capsys):
    pytest.importorskip("gradio", reason="needs the app extra")
    assert app.main([str(tmp_path / "store"), *arguments]) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert shown.count("\n") == 1


# In a browser


def browser_path() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture
def chromium() -> Iterator[Any]:
    """A page of a headless browser."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (the dev extra)")
    pytest.importorskip("gradio", reason="needs the app extra")
    program = browser_path()
    if program is None:
        pytest.skip("no Chromium on PATH")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 900}, accept_downloads=True)
        page.set_default_timeout(60_000)
        yield page
        browser.close()


@pytest.fixture
def running(tmp_path: Path, tiny_model_path: str) -> Iterator[Any]:
    """Start the program over TMP/store; returns its address."""
    processes: list[subprocess.Popen[str]] = []

    def start(*more: str) -> str:
        command = [sys.executable, "-m", "recipes.app", str(tmp_path / "store"), "--model", tiny_model_path]
        command += ["--answer-model", tiny_model_path, "--max-pixels", "3136", "--answer-max-pixels", "3136"]
        command += ["--port", "0", "--device", "cpu", "--workers", "1", *more]
        with (tmp_path / "errors.txt").open("w") as errors:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        processes.append(process)
        stop = threading.Timer(180, process.kill)
        stop.start()
        line = process.stdout.readline() if process.stdout else ""
        stop.cancel()
        assert line.startswith("open http://127.0.0.1:"), (tmp_path / "errors.txt").read_text()
        return line.split()[1]

    yield start
    for process in processes:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.communicate()


def ask(page: Any, question: str) -> None:
    page.locator("#question textarea").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_selector("#answer .answer, #answer .faults")


@pytest.mark.slow
def test_documents_are_added_and_asked_in_a_browser(chromium, running, tmp_path):
    script = tmp_path / "script.jsonl"
    script.write_text(json.dumps({"id": "question", "responses": [ANSWER]}) + "\n")
    asked_of: list[str] = []
    chromium.on("request", lambda request: asked_of.append(request.url))
    url = running("--engine", "fake", "--script", str(script), "-k", "2")
    chromium.goto(url)
    assert "0 pages" in chromium.locator("#heading").inner_text()

    write_image(tmp_path / "red.png", "red", 112, 56)
    write_pdf(tmp_path / "two.pdf", ["one", "two"])
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 <b>nothing else")
    files = [str(tmp_path / name) for name in ("red.png", "two.pdf", "broken.pdf")]
    chromium.locator("#files input[type=file]").set_input_files(files)
    chromium.locator("#files [aria-label='broken.pdf']").wait_for()
    chromium.get_by_role("button", name="Add", exact=True).click()
    chromium.get_by_text("2 added or changed, 0 unchanged; 3 pages in all").wait_for()
    assert "broken.pdf: the PDF is broken or has no pages" in chromium.locator("#added").inner_text()
    assert "3 pages" in chromium.locator("#heading").inner_text()

    ask(chromium, "how many apples?")
    assert "7 & more" in chromium.locator("#answer .answer").inner_text()
    assert chromium.locator("#found figure").count() == 2
    framed = chromium.locator("#found figure.cited")
    assert framed.count() == 1
    assert framed.get_attribute("data-rank") == "2"
    assert framed.evaluate("e => getComputedStyle(e).borderTopColor") == "rgb(46, 125, 50)"
    shown = chromium.locator("#found figure img").first
    chromium.wait_for_function("document.querySelector('#found figure img').naturalWidth > 0")  # it was served
    assert shown.is_visible()

    whole = chromium.locator("#page-2")
    assert not whole.is_visible()
    chromium.locator("#answer .cards button").click()
    assert whole.is_visible()
    chromium.keyboard.press("Escape")
    assert not whole.is_visible()

    with chromium.expect_download() as download:
        chromium.locator("#trace").click()
    trace = json.loads(Path(download.value.path()).read_text())
    assert trace["question"] == "how many apples?"
    assert [(page["rank"], page["cited"]) for page in trace["pages"]] == [(1, False), (2, True)]
    assert trace["pages"][0]["score"] >= trace["pages"][1]["score"]
    assert trace["result"]["raw"] == ANSWER
    assert trace["seconds"]["whole"] >= trace["seconds"]["retrieval"] > 0

    refused = chromium.request.get(f"{url}gradio_api/file={tmp_path / 'script.jsonl'}")
    assert refused.status in (403, 404)  # only the store's pages are served
    chromium.locator("#question textarea").fill("")
    chromium.get_by_role("button", name="Ask", exact=True).click()
    chromium.get_by_text("the question is empty").wait_for()
    assert {url.split("/")[2] for url in asked_of if url.startswith("http")} == {url.split("/")[2]}


@pytest.mark.slow
def test_the_answer_of_a_real_model_streams_into_the_page(chromium, running, tmp_path):
    (tmp_path / "docs").mkdir()
    for colour in ("red", "blue"):
        write_image(tmp_path / "docs" / f"{colour}.png", colour, 56, 56)
    ingest = ["ingest", str(tmp_path / "docs"), "--out", str(tmp_path / "store"), "--workers", "1"]
    subprocess.run([sys.executable, "-m", "recipes.retrieve", *ingest], cwd=ROOT, check=True, capture_output=True)
    chromium.goto(running("-k", "2", "--max-tokens", "64"))  # pages that the index lacks are encoded at the start
    assert "2 pages" in chromium.locator("#heading").inner_text()
    chromium.locator("#question textarea").fill("what amount is on page 1?")
    chromium.get_by_role("button", name="Ask", exact=True).click()
    seen, deadline = set(), time.monotonic() + 60
    while not chromium.locator("#answer .answer, #answer .faults").count() and time.monotonic() < deadline:
        seen.add(chromium.locator("#response textarea").input_value())
        time.sleep(0.02)
    assert len(seen - {""}) > 1  # it came in pieces
    assert "raise --max-tokens" in chromium.locator("#answer").inner_text() or chromium.locator(".answer").count()
