"""A page to look at a store: `python -m recipes.app STORE --answer-model MODEL`.

Add documents, ask, watch the answer come, and see the pages that it rests on; without --answer-model or --endpoint,
the pages only. The retriever is --model, by default the one that made the index. Owns the command line and the layout,
and is the home of gradio; what happens is `recipes.retrieval.answers.library`.
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
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from recipes.retrieval.options import (
    SETTINGS,
    add_answerer,
    add_encoder,
    add_search_options,
    encoder_settings,
    index_folder,
    open_answerer,
    open_encoder,
    search_settings,
)
from rsgrpo.errors import InputError, RsgrpoError
from rsgrpo.records.console import Console

if TYPE_CHECKING:
    from recipes.answers.reader import Reader
    from recipes.retrieval.answers.library import Asking, Library

MAX_K = 20
MAX_WAITING = 16  # questions and uploads
RETRIEVAL_EXTRA = ("pypdfium2", "faiss", "sentence_transformers")

log = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(
        prog="python -m recipes.app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_encoder(top)
    add_search_options(top)
    add_answerer(top)
    top.set_defaults(max_tries=3)  # somebody waits
    page = top.add_argument_group("the page")
    page.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    page.add_argument("--port", type=int, default=7860, help="0: any that is free")
    page.add_argument("--open", action="store_true", help="open it in a browser")
    page.add_argument("--max-files", type=int, default=100, help="that can be added in one go")
    page.add_argument("--max-file-mb", type=int, default=100, help="larger ones cannot be added")
    page.add_argument("--max-pages", type=int, default=2_000, help="documents with more cannot be added")
    page.add_argument("--workers", dest="num_workers", type=int, default=os.cpu_count() or 1, help="that render pages")
    return top


def open_library(options: argparse.Namespace, console: Console) -> Library:
    """Return what the page shows.

    Raises:
        RsgrpoError: the store, the encoder or the answerer cannot be opened.
    """
    from recipes.retrieval.answers.library import Library, LibrarySettings

    if not 1 <= options.k <= MAX_K:
        raise InputError(f"-k must be in [1, {MAX_K}], got {options.k}")
    limits = {name: getattr(options, name) for name in ("max_files", "max_file_mb", "max_pages", "num_workers")}
    settings = LibrarySettings(**limits)
    encoder_settings(options)  # refuse a wrong command line before the answerer starts
    reader = open_reader(options)
    try:
        search, encoder = search_settings(options), open_encoder(options)
        return Library(options.store, index_folder(options), encoder, reader, settings, console, search)
    except BaseException:
        if reader is not None:
            reader.answerer.close()
        raise


def open_reader(options: argparse.Namespace) -> Reader | None:
    """Return who answers; None when the command line names nobody.

    Raises:
        RsgrpoError: the answerer cannot be opened.
    """
    from recipes.answers.reader import Reader

    if not (options.answer_model or options.endpoint or options.script or options.engine != "hf"):
        return None
    answerer, template, system = open_answerer(argparse.Namespace(**vars(options) | {"k": MAX_K}))
    try:
        answerer.start()  # so that the first question does not wait for it
    except BaseException:
        answerer.close()
        raise
    return Reader(answerer, template, system)


def build_page(library: Library, options: argparse.Namespace, scratch: Path) -> Any:
    """Return the page, as gradio's Blocks; traces are written into `scratch`."""
    import gradio as gr

    from recipes.retrieval.answers.library import MAX_QUESTION_CHARACTERS
    from recipes.retrieval.answers.page_view import NOBODY_ANSWERS, added_html, answer_html, faults_html, pages_html

    answers = library.reader is not None

    def ask(question: str, k: float, setting: Any) -> Iterator[tuple[Any, ...]]:
        yield "", "", "", gr.DownloadButton(interactive=False)
        last: Asking | None = None
        try:
            for asking in library.ask(question, int(k), setting):
                yield asking.text, gr.skip(), pages_html(asking, address) if last is None else gr.skip(), gr.skip()
                last = asking
        except RsgrpoError as error:
            yield gr.skip(), faults_html([str(error)]), gr.skip(), gr.skip()
            return
        assert last is not None, "a question without pages is an error"
        file = Path(tempfile.mkdtemp(dir=scratch)) / "trace.json"  # another tab's is another file
        file.write_text(json.dumps(library.trace(last), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        trace = gr.DownloadButton(value=str(file), interactive=True)
        yield last.text, answer_html(last), pages_html(last, address), trace

    def add(files: list[str] | None) -> tuple[Any, ...]:
        try:
            report, _ = library.add([Path(file) for file in files or ()])
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
                        list(SETTINGS), value=options.setting, label="How pages are shown to the model", visible=answers
                    )
                ask_button = gr.Button("Ask" if answers else "Search", variant="primary", elem_id="ask")
                gr.HTML(NOBODY_ANSWERS, visible=not answers, elem_id="nobody")
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

    from recipes.retrieval.answers.page_view import CSS

    if not _is_loopback(options.host):
        log.warning("everybody who reaches %s may read the store, add documents and ask: no password", options.host)
    with tempfile.TemporaryDirectory(prefix="rsgrpo-app-") as scratch:
        os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(scratch) / "gradio"))  # uploads go with the process
        page = build_page(library, options, Path(scratch))
        fonts = ("system-ui", "sans-serif")  # nothing is fetched from elsewhere
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
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(f"open {url} (Ctrl-C ends it)", flush=True)
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
    try:
        import gradio  # noqa: F401

        with Console(sys.stderr) as console:
            library = open_library(options, console)
    except RsgrpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        extra = {"gradio": "app"}.get(error.name or "", "retrieval" if error.name in RETRIEVAL_EXTRA else None)
        if extra is None:
            raise
        print(f'error: {error.name} is not installed; pip install "rsgrpo[{extra}]"', file=sys.stderr)
        return 1
    try:
        serve(library, options)
    except OSError as error:  # gradio's own words for a port that is taken
        print(f"error: cannot listen on {options.host}, --port {options.port}: {error}", file=sys.stderr)
        return InputError.exit_code
    finally:
        library.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
