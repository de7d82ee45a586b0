"""A page to look at a store: `python -m recipes.app STORE --answer-model MODEL`.

Add documents, ask, watch the answer being written, and see the pages that support it; without --answer-model or
--endpoint, only the pages. The retriever is --model, by default the one that made the index. This is the command line
and the layout, and the home of gradio; the work is done in `recipes.retrieval.answers.library`.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from html import escape
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

from recipes.answers.options import add_options, chosen
from recipes.retrieval.answers.generation import Setting
from recipes.retrieval.answers.library import MAX_QUESTION_CHARACTERS, AnswerProgress, Library, LibrarySettings
from recipes.retrieval.answers.page_view import CSS, NO_ANSWERER, added_html, answer_html, faults_html, pages_html
from recipes.retrieval.command_line import (
    EXTRAS,
    add_answerer,
    add_encoder,
    add_search_options,
    encoder_settings,
    index_folder,
    open_encoder,
    open_reader,
    search_settings,
)
from rsgrpo.errors import InputError, RsgrpoError, run_program
from rsgrpo.records.console import Console

MAX_K = 20
MAX_WAITING = 16  # questions and uploads

log = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(
        prog="python -m recipes.app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_encoder(top)
    add_search_options(top)
    add_answerer(top)
    top.set_defaults(max_tries=3)  # someone is waiting
    page = top.add_argument_group("the page")
    page.add_argument("--host", default="127.0.0.1", help="address to listen on; default: only this machine")
    page.add_argument("--port", type=int, default=7860, help="0: any free port")
    page.add_argument("--open", action="store_true", help="open it in a browser")
    add_options(page, LibrarySettings)
    return top


def open_library(options: argparse.Namespace, console: Console) -> Library:
    """Return what the page shows; RsgrpoError if the store, the encoder or the answerer cannot be opened."""
    if not 1 <= options.k <= MAX_K:
        raise InputError(f"-k must be in [1, {MAX_K}], got {options.k}")
    settings = chosen(LibrarySettings, options)
    encoder_settings(options)  # refuses a wrong command line before the answerer starts
    with ExitStack() as on_failure:
        reader = None
        if options.answer_model or options.endpoint or options.script or options.engine != "hf":
            reader = open_reader(options, MAX_K)
            on_failure.callback(reader.answerer.close)
            reader.answerer.start()  # so that the first question does not wait for it
        search, encoder = search_settings(options), open_encoder(options)
        library = Library(options.store, index_folder(options), encoder, reader, settings, console, search)
        on_failure.pop_all()
    return library


def build_page(library: Library, options: argparse.Namespace, scratch: Path) -> Any:
    """Return the page, as gradio's Blocks; traces are written into `scratch`."""
    import gradio as gr

    answers = library.reader is not None

    def ask(question: str, k: float, setting: Any) -> Iterator[tuple[Any, ...]]:
        yield "", "", "", gr.DownloadButton(interactive=False)
        last: AnswerProgress | None = None
        try:
            for asking in library.ask(question, int(k), setting):
                yield asking.text, gr.skip(), pages_html(asking, address) if last is None else gr.skip(), gr.skip()
                last = asking
        except RsgrpoError as error:
            yield gr.skip(), faults_html([str(error)]), gr.skip(), gr.skip()
            return
        assert last is not None, "a question always has pages"
        file = Path(tempfile.mkdtemp(dir=scratch)) / "trace.json"  # one file per answer, so that tabs do not share it
        file.write_text(json.dumps(library.trace(last), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        trace = gr.DownloadButton(value=str(file), interactive=True)
        yield last.text, answer_html(last), pages_html(last, address), trace

    def add(files: list[str] | None) -> tuple[Any, ...]:
        try:
            report = library.add([Path(file) for file in files or ()])
        except RsgrpoError as error:
            return faults_html([str(error)]), heading_html(), gr.skip()
        return added_html(report, library.num_pages), heading_html(), None

    def heading_html() -> str:
        return f"<h2>{escape(options.store.resolve().name)}: {library.num_pages:,} pages</h2>"

    with gr.Blocks(title="Ask your documents", analytics_enabled=False, fill_width=True) as page:
        heading = gr.HTML(heading_html, elem_id="heading")
        with gr.Row():
            with gr.Column(scale=2):
                question = gr.Textbox(
                    label="Question", max_length=MAX_QUESTION_CHARACTERS, elem_id="question", autofocus=True
                )
                with gr.Row():
                    k = gr.Slider(1, MAX_K, value=options.k, step=1, label="Pages")
                    setting = gr.Dropdown(
                        list(get_args(Setting)),
                        value=options.setting,
                        label="How pages are shown to the model",
                        visible=answers,
                    )
                ask_button = gr.Button("Ask" if answers else "Search", variant="primary", elem_id="ask")
                gr.HTML(NO_ANSWERER, visible=not answers, elem_id="nobody")
                answer = gr.HTML(elem_id="answer")
                text = gr.Textbox(
                    label="Response", lines=6, max_lines=16, interactive=False, elem_id="response", visible=answers
                )
                trace = gr.DownloadButton("Download trace (JSON)", interactive=False, elem_id="trace")
            with gr.Column(scale=3):
                pages = gr.HTML(elem_id="found")
        with gr.Accordion("Add documents", open=not library.num_pages):
            files = gr.File(label="PDF, images, office, text, HTML", file_count="multiple", elem_id="files")
            add_button = gr.Button("Add", elem_id="add")
            added = gr.HTML(elem_id="added")
        one_at_a_time: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1}
        for trigger in (ask_button.click, question.submit):
            trigger(ask, [question, k, setting], [text, answer, pages, trace], **one_at_a_time)
        add_button.click(add, files, [added, heading, files], **one_at_a_time)
    return page.queue(max_size=MAX_WAITING)


def address(path: str) -> str:
    """Return where gradio serves a file of an allowed folder."""
    return f"/gradio_api/file={quote(path)}"


def serve(library: Library, options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    import gradio as gr

    if not _is_loopback(options.host):
        log.warning(
            "anyone who reaches %s can read the store, add documents and ask: there is no password", options.host
        )
    with tempfile.TemporaryDirectory(prefix="rsgrpo-app-") as scratch:
        os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(scratch) / "gradio"))  # removed with the process
        page = build_page(library, options, Path(scratch))
        fonts = ("system-ui", "sans-serif")  # nothing is loaded from other servers
        try:
            _, url, _ = page.launch(
                server_name=options.host,
                server_port=options.port or None,
                allowed_paths=[str(library.pages_folder)],
                max_file_size=options.max_file_mb << 20,
                theme=gr.themes.Default(font=fonts, font_mono=("ui-monospace", "monospace")),
                css=CSS,
                footer_links=[],
                inbrowser=options.open,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:  # gradio does not name the option
            place = f"cannot listen on {options.host}, --port {options.port}"
            raise InputError(f"{place}: {error}") from error
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(f"open {url} (Ctrl-C to stop)", flush=True)
        stop.wait()
        page.close(verbose=False)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 2 for wrong input, 1 for a failure, 0 when it was ended."""
    options = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname).1s %(name)s: %(message)s")

    def work() -> None:
        import gradio  # noqa: F401

        with Console(sys.stderr) as console:
            library = open_library(options, console)
        with closing(library):
            serve(library, options)

    return run_program(work, extras=EXTRAS | {"gradio": "app"})


if __name__ == "__main__":
    sys.exit(main())
