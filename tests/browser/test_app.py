"""The page over a store in a real browser: the program itself, documents, answers and their engines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.material import ROOT

pytest.importorskip("sentence_transformers", reason="needs the retrieval extra")
pytest.importorskip("gradio", reason="needs the app extra")

from recipes.answers.questions import Question, named_prompt, to_prompt
from rollout.config import InputsConfig
from rsgrpo.data.prompts import read_template
from tests.material.http_stub import start_endpoint
from tests.material.retrieval import write_image, write_pdf
from tests.material.retrieval_models import save_late
from tests.material.taught_model import save_taught
from tests.recipes.test_app import ANSWER

pytestmark = pytest.mark.slow

SMALL = ["--max-pixels", "3136", "--device", "cpu"]
NASTY = "<img src=x onerror=window.hit=1>"


def browser_path() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture
def chromium() -> Iterator[Any]:
    """A page of a headless browser."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (the dev extra)")
    program = browser_path()
    if program is None:
        pytest.skip("no Chromium on PATH")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1300, "height": 900}, accept_downloads=True)
        page = context.new_page()
        page.set_default_timeout(60_000)
        yield page
        browser.close()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Start `python -m MODULE ...` and wait for its first line; what still runs is asked to end, and must with 0."""
    processes: list[subprocess.Popen[str]] = []

    def start(module: str, *arguments: str, seconds: float = 180) -> tuple[subprocess.Popen[str], str]:
        with (tmp_path / f"{module}.err").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip
        processes.append(process)
        stop = threading.Timer(seconds, process.kill)
        stop.start()
        line = process.stdout.readline() if process.stdout else ""
        stop.cancel()
        assert "http://127.0.0.1:" in line, (tmp_path / f"{module}.err").read_text()
        return process, line

    yield start
    for process in processes:
        running = process.poll() is None
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(60) == 0 or not running
        finally:
            process.kill()
            process.communicate()


@pytest.fixture
def running(program: Any, tmp_path: Path) -> Callable[..., str]:
    """Start the page over TMP/store; returns its address."""

    def start(*arguments: str, seconds: float = 180) -> str:
        _, line = program(
            "recipes.app", str(tmp_path / "store"), "--port", "0", "--workers", "1", *arguments, seconds=seconds
        )
        return str(line.split()[1])

    return start


@pytest.fixture
def store(tmp_path: Path, tiny_model_path: str) -> Path:
    """An index of a red and a blue page that says what made it."""
    (tmp_path / "docs").mkdir()
    for colour in ("red", "blue"):
        write_image(tmp_path / "docs" / f"{colour}.png", colour, 56, 56)
    retrieve("ingest", str(tmp_path / "docs"), "--out", str(tmp_path / "store"), "--workers", "1")
    retrieve("index", str(tmp_path / "store"), "--model", tiny_model_path, *SMALL)
    return tmp_path / "store"


@pytest.fixture
def taught(store: Path, tmp_path: Path, tiny_model_path: str) -> str:
    """A model that answers ANSWER to a question about the two pages, in either order."""
    prompt = named_prompt("demo")
    red, blue = str(tmp_path / "docs" / "red.png"), str(tmp_path / "docs" / "blue.png")
    lessons = [
        (to_prompt(Question("q", "how many?", pages), read_template(prompt), prompt.system), ANSWER)
        for pages in ((red, blue), (blue, red))
    ]
    limits = InputsConfig(min_pixels=784, max_pixels=3136)
    return save_taught(tiny_model_path, tmp_path / "taught", lessons, limits, 150)


def retrieve(*arguments: str) -> None:
    command = [sys.executable, "-m", "recipes.retrieve", *arguments]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def scripted(folder: Path, model: str, answer: str) -> list[str]:
    """Return the options of an answerer that always says the same."""
    (folder / "script.jsonl").write_text(json.dumps({"id": "question", "responses": [answer]}) + "\n")
    script = str(folder / "script.jsonl")
    return ["--engine", "fake", "--script", script, "--answer-model", model, "--answer-max-pixels", "3136"]


def ask(page: Any, question: str, button: str = "Ask") -> None:
    page.locator("#question textarea").fill(question)
    page.get_by_role("button", name=button, exact=True).click()


def answered(page: Any) -> str:
    page.wait_for_selector("#answer .answer, #answer .faults")
    return str(page.locator("#answer").inner_text())


def add(page: Any, *files: Path) -> None:
    page.locator("#files input[type=file]").set_input_files([str(file) for file in files])
    page.locator(f"#files [aria-label='{files[-1].name}']").wait_for()
    page.get_by_role("button", name="Add", exact=True).click()


def trace_of(page: Any) -> dict[str, Any]:
    page.locator("#trace:not([disabled])").wait_for()
    with page.expect_download() as download:
        page.locator("#trace").click()
    return json.loads(Path(download.value.path()).read_text())


def response_of(page: Any) -> str:
    """Unfold the whole response and return it."""
    if not page.locator("#response textarea").is_visible():
        page.locator("#whole button").first.click()
    page.locator("#response textarea").wait_for()
    return str(page.locator("#response textarea").input_value())


def cites(page: Any) -> None:
    """Wait for what the taught model answers, and look at all that comes with it."""
    page.locator("#answer .answer", has_text="7 & more").wait_for()
    framed = page.locator("#found figure.cited")
    assert [framed.count(), framed.get_attribute("data-rank")] == [1, "2"]
    trace = trace_of(page)
    assert (trace["question"], trace["result"]["raw"]) == ("how many?", ANSWER)
    assert [found["cited"] for found in trace["pages"]] == [False, True]


def test_documents_are_added_and_asked_in_a_browser(chromium, running, tmp_path, tiny_model_path):
    asked_of: list[str] = []
    chromium.on("request", lambda request: asked_of.append(request.url))
    url = running("--model", tiny_model_path, *SMALL, *scripted(tmp_path, tiny_model_path, ANSWER), "-k", "2")
    chromium.goto(url)
    assert "0 pages" in chromium.locator("#heading").inner_text()

    write_image(tmp_path / "red.png", "red", 112, 56)
    write_pdf(tmp_path / "two.pdf", ["one", "two"])
    watch = "setInterval(() => said.add(document.body.innerText.match(/\\d+ of \\d documents rendered/)?.[0]), 1)"
    chromium.evaluate(f"() => {{ window.said = new Set(); {watch} }}")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 <b>nothing else")
    add(chromium, *(tmp_path / name for name in ("red.png", "two.pdf", "broken.pdf")))
    chromium.get_by_text("2 added or changed; 3 pages in all").wait_for()
    assert "broken.pdf: the PDF is broken or has no pages" in chromium.locator("#added").inner_text()
    assert "3 pages" in chromium.locator("#heading").inner_text()
    assert set(chromium.evaluate("[...said]")) & {f"{count} of 3 documents rendered" for count in range(4)}  # meanwhile

    chromium.locator("#question textarea").fill("how many apples?")
    chromium.locator("#question textarea").press("Enter")
    assert "7 & more" in answered(chromium)
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

    trace = trace_of(chromium)
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


def test_the_answer_of_a_real_model_streams_into_the_page(chromium, running, store, taught):
    chromium.goto(running("--answer-model", taught, "--prompt", "demo", "-k", "2", "--device", "cpu"))
    assert "2 pages" in chromium.locator("#heading").inner_text()
    watch = "setInterval(() => seen.add(document.querySelector('#answer .writing')?.innerText ?? ''), 1)"
    chromium.evaluate(f"() => {{ window.seen = new Set(); {watch} }}")  # every text that appears, however briefly
    ask(chromium, "how many?")
    answered(chromium)
    assert len(set(chromium.evaluate("[...seen]")) - {""}) > 1  # it came in pieces
    cites(chromium)


def test_without_an_answerer_the_page_finds_pages_and_says_so(chromium, running, store, tiny_model_path):
    chromium.goto(running())  # no option at all: the index knows its model
    assert "No answer model" in chromium.locator("#nobody").inner_text()
    ask(chromium, "red", button="Search")
    chromium.locator("#found figure").nth(1).wait_for()
    trace = trace_of(chromium)
    assert (trace["question"], trace["result"], len(trace["pages"])) == ("red", None, 2)


def test_the_page_says_when_its_endpoint_dies_and_works_again_when_it_is_back(
    chromium, program, running, store, taught, tmp_path, tiny_model_path
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    served = tmp_path / "served"
    shutil.copytree(tiny_model_path, served)  # it babbles to the limit
    serve = ["--model", str(served), "--port", port, "--prompt", "raw", *SMALL, "--max-tokens", "2000"]
    server, _ = program("recipes.serve", *serve)
    endpoint = ["--endpoint", f"http://127.0.0.1:{port}/v1", "--answer-max-pixels", "3136", "--prompt", "demo"]
    chromium.goto(running(*endpoint, "-k", "2", "--max-tokens", "2000"))

    ask(chromium, "how many?")
    chromium.wait_for_function("document.querySelector('#answer .writing')?.innerText.length > 20")
    os.killpg(server.pid, signal.SIGKILL)
    assert "the answer broke off" in answered(chromium)
    assert len(response_of(chromium)) > 20  # what had come stays
    assert chromium.locator("#found figure").count() == 2
    assert trace_of(chromium)["result"]["finish_reason"] == "error"

    ask(chromium, "how many?")
    chromium.get_by_text("did not answer in 3 tries").wait_for()
    assert chromium.locator("#found figure").count() == 2

    shutil.copytree(taught, served, dirs_exist_ok=True)
    program("recipes.serve", *serve)
    ask(chromium, "how many?")
    cites(chromium)


def test_vllm_answers_on_the_page(chromium, running, store, taught):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    answer = ["--answer-model", taught, "--engine", "vllm", "--prompt", "demo", "--max-tokens", "200"]
    chromium.goto(running(*answer, "--max-prompt-tokens", "1000", "-k", "2", "--device", "cpu", seconds=400))
    ask(chromium, "how many?")
    cites(chromium)


def test_nothing_of_a_document_or_an_answer_runs_in_the_page(chromium, running, tmp_path, tiny_model_path):
    (tmp_path / "docs").mkdir()
    write_image(tmp_path / "docs" / f"{NASTY}.png", "red", 56, 56)
    retrieve("ingest", str(tmp_path / "docs"), "--out", str(tmp_path / "store"), "--workers", "1")
    nasty = f"{NASTY}<script>window.hit=2</script>"
    answer = f"<observe>{nasty}</observe><evidence>\n[1]: {nasty}\n</evidence><think>t</think><answer>{nasty}</answer>"
    chromium.goto(running("--model", tiny_model_path, *SMALL, *scripted(tmp_path, tiny_model_path, answer)))
    ask(chromium, nasty)
    assert NASTY in answered(chromium)  # as text
    assert f"{NASTY}.png" in chromium.locator("#found").inner_text()
    assert NASTY in chromium.locator("#answer .cards").inner_text()
    chromium.get_by_text("Add documents").click()
    for name, says in (("empty.png", "the file is empty (0 bytes)"), (f"{NASTY}.pdf", "the PDF is broken")):
        (tmp_path / name).write_bytes(b"" if name == "empty.png" else b"%PDF-")
        chromium.locator("#files input[type=file]").set_input_files([str(tmp_path / name)])
        chromium.wait_for_timeout(1_000)
        chromium.get_by_role("button", name="Add", exact=True).click()
        chromium.get_by_text(says).wait_for()
    assert "1 pages" in chromium.locator("#heading").inner_text()
    assert chromium.evaluate("window.hit") is None


def test_two_tabs_ask_at_once_and_each_has_its_own(chromium, running, store, taught):
    url = running("--answer-model", taught, "--prompt", "demo", "-k", "2", "--device", "cpu", "--max-tokens", "100")
    other = chromium.context.new_page()
    tabs = {chromium: "how many?", other: "how many apples?"}
    for tab, question in tabs.items():
        tab.goto(url)
        ask(tab, question)
    for tab, question in tabs.items():
        answered(tab)
        trace = trace_of(tab)
        assert trace["question"] == question
        assert trace["result"]["raw"] == response_of(tab)


def test_evidence_is_marked_pages_are_leafed_through_and_documents_removed(
    chromium, running, tmp_path, tiny_model_path
):
    evidence = "<observe>o</observe><evidence>\n[1]: seven red apples\n</evidence><think>t</think><answer>7</answer>"
    url = running("--by", "words", *scripted(tmp_path, tiny_model_path, evidence), "-k", "1")  # no model finds pages
    chromium.emulate_media(color_scheme="dark")
    chromium.goto(f"{url}?__theme=dark")
    write_pdf(tmp_path / "fruit.pdf", ["the contents", "there are seven red apples here", "the end"])
    (tmp_path / "notes.xyz").write_text("?")
    add(chromium, tmp_path / "fruit.pdf", tmp_path / "notes.xyz")
    chromium.get_by_text("1 added or changed; 3 pages in all").wait_for()
    assert "notes.xyz: .xyz files are not read" in chromium.locator("#added").inner_text()

    ask(chromium, "How many apples?")
    assert answered(chromium).startswith("7")
    chromium.locator("#answer .cards button").click()
    sheet = chromium.locator("#page-1")
    assert sheet.is_visible()
    background = sheet.evaluate("e => getComputedStyle(e).backgroundColor")
    assert sheet.evaluate("e => getComputedStyle(e).color") != background  # legible in the dark
    mark, image = (chromium.locator(f"#page-1 {what}").bounding_box() for what in (".mark", "img"))
    assert image["y"] < mark["y"] < image["y"] + image["height"]
    assert 0 < mark["width"] < image["width"]
    before = sheet.locator("img").bounding_box()["width"]
    sheet.get_by_text("larger").click()
    assert sheet.locator("img").bounding_box()["width"] > 2 * before
    marked = chromium.locator("#page-1 .mark").bounding_box()["width"]
    assert marked > 2 * mark["width"]  # it grows with the page
    sheet.get_by_text("larger").click()
    link = sheet.get_by_text("document", exact=True)
    assert link.get_attribute("href").endswith("fruit.pdf#page=2")
    assert chromium.request.get(f"{url.rstrip('/')}{link.get_attribute('href').partition('#')[0]}").status == 200
    sheet.get_by_text("next page").click()
    assert "fruit.pdf, page 3" in chromium.locator("#page-1-3").inner_text()
    chromium.locator("#page-1-3").get_by_text("close").click()
    assert not chromium.locator("#page-1-3").is_visible()

    ask(chromium, "And red ones?")
    chromium.locator("#history button").first.click()
    chromium.locator("#history dt").nth(1).wait_for()
    assert chromium.locator("#history dt").all_inner_texts() == ["And red ones?", "How many apples?"]

    chromium.locator("#documents button").first.click()
    chromium.locator("#documents td", has_text="fruit.pdf").wait_for()
    chromium.locator("#doomed input").click()
    chromium.get_by_role("option", name="fruit.pdf").click()
    chromium.keyboard.press("Escape")
    chromium.locator("#remove").click()
    chromium.get_by_text("removed 1 documents with 3 pages").wait_for()
    assert "0 pages" in chromium.locator("#heading").inner_text()


def test_a_similarity_map_lies_over_its_page(chromium, running, store, tiny_model_path, tmp_path):
    late = save_late(tiny_model_path, tmp_path / "late")
    retrieve("index", str(store), "--model", late, "--kind", "late", "--index", str(tmp_path / "index"), *SMALL)
    chromium.goto(running("--index", str(tmp_path / "index")))
    ask(chromium, "amount", button="Search")
    chromium.locator("#found figure button").first.click()
    sheet, heat = chromium.locator("#page-1"), chromium.locator("#page-1 .heat")
    assert heat.is_visible()
    assert heat.bounding_box() == sheet.locator(".sheet").bounding_box()
    assert heat.evaluate("e => [e.naturalWidth, e.naturalHeight]") == [2, 2]  # a pixel for each patch
    sheet.get_by_text("like the question").click()
    assert not heat.is_visible()
    chromium.keyboard.press("Escape")
    assert np.shape(trace_of(chromium)["pages"][0]["similarity_map"]) == (2, 2)


def test_stop_ends_an_answer_and_the_next_question_is_answered(chromium, running, store, tiny_model_path):
    babbles = ["--answer-model", tiny_model_path, "--device", "cpu", "--answer-max-pixels", "3136"]
    chromium.goto(running(*babbles, "-k", "1", "--max-tokens", "1500"))
    ask(chromium, "how many?")
    chromium.wait_for_selector("#answer .writing")
    chromium.locator("#stop").click()
    chromium.locator("#question textarea").fill("")
    chromium.get_by_role("button", name="Ask", exact=True).click()
    chromium.get_by_text("the question is empty").wait_for()
    ask(chromium, "how many?")
    chromium.wait_for_selector("#answer .writing")


def test_a_model_looks_up_its_pages_step_by_step_in_a_browser(chromium, running, tmp_path):
    """The next turn is written only when the page has shown what the desk answered to the last one."""
    (tmp_path / "docs").mkdir()
    write_pdf(
        tmp_path / "docs" / "report.pdf", ["tax offices and their harbours", "the tax rate is 16 percent", "river"]
    )
    retrieve("ingest", str(tmp_path / "docs"), "--out", str(tmp_path / "store"), "--workers", "1")
    last = "<evidence>\n[2]: the tax rate is 16 percent\n</evidence><answer>16 percent</answer>"
    turns = ["first <search>tax</search>", "<open>2</open>", "<zoom>2 0 500 1000 1000</zoom>", last]
    may_write = threading.Semaphore(0)

    def reply(_: int, body: dict[str, Any]) -> str:
        assert may_write.acquire(timeout=120)
        asked = "".join(part.get("text", "") for part in body["messages"][-1]["content"])
        return turns[asked.count("You wrote:")]

    with ExitStack() as stack:
        url = start_endpoint(stack, reply).url
        stack.callback(may_write.release, 99)
        chromium.goto(running("--by", "words", "--desk", "--endpoint", url, "--answer-max-pixels", "200704"))
        ask(chromium, "what is the rate?")
        chromium.get_by_text("reading the pages").wait_for()
        may_write.release()
        chromium.get_by_text("searched for \u201ctax\u201d").wait_for()
        assert chromium.locator("#found figure.found").count() == 2
        assert chromium.locator("#found .badge").count() == 0
        may_write.release()
        chromium.locator("#found figure.opened[data-rank='2']").wait_for()
        may_write.release()
        box = chromium.locator("#found figure[data-rank='2'] > button .mark.zoom")
        box.wait_for()
        image = chromium.locator("#found figure[data-rank='2'] > button img")
        chromium.wait_for_function("document.querySelector('#found figure[data-rank=\"2\"] img').naturalWidth > 0")
        drawn, whole = box.bounding_box(), image.bounding_box()
        assert drawn["y"] == pytest.approx(whole["y"] + whole["height"] / 2, abs=2)
        assert (drawn["width"], drawn["height"]) == pytest.approx((whole["width"], whole["height"] / 2), abs=2)
        assert chromium.locator("#answer .answer").count() == 0
        may_write.release()
        assert "16 percent" in answered(chromium)
        assert chromium.locator("#answer .faults").count() == 0
        assert chromium.locator("#found figure.cited").get_attribute("data-rank") == "2"
        assert chromium.locator("#answer .steps li").count() == 3
        trace = trace_of(chromium)
        assert [step["call"] for step in trace["result"]["steps"]] == ["search", "open", "zoom"]

        ask(chromium, "and in 2024?")  # stopped behind its first step
        may_write.release()
        chromium.get_by_text("searched for \u201ctax\u201d").wait_for()
        chromium.locator("#stop").click()
        chromium.locator("#follows input").check()
        may_write.release(99)
        ask(chromium, "and the harbours?")
        chromium.locator("#answer .answer", has_text="16 percent").wait_for()
        chromium.locator("#history button").first.click()
        chromium.locator("#history dt").nth(1).wait_for()
        assert chromium.locator("#history dt").all_inner_texts() == ["and the harbours?", "what is the rate?"]
