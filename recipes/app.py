"""A page to look at a store: `python -m recipes.app STORE --answer-model MODEL`.

Add documents, ask, watch the answer being written, and see the pages that support it; without --answer-model or
--endpoint, only the pages. The retriever is --model, by default the one that made the index. This is the command line
and the layout, and the home of gradio; the work is done in `recipes.retrieval.answers.library`.
"""

from __future__ import annotations

import argparse
import hmac
import ipaddress
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from html import escape
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

from recipes.answers.options import Parser, add_options, chosen, port
from recipes.retrieval.answers.adding import Report
from recipes.retrieval.answers.desk_view import steps_html
from recipes.retrieval.answers.generation import MAX_QUESTION_CHARACTERS, Setting
from recipes.retrieval.answers.library import Library, LibrarySettings
from recipes.retrieval.answers.page_view import (
    CSS,
    MAX_LISTED,
    NO_ANSWERER,
    added_html,
    answer_html,
    documents_html,
    faults_html,
    history_html,
    pages_html,
    writing_html,
)
from recipes.retrieval.answers.progress import AnswerProgress
from recipes.retrieval.answers.uploads import Quota, Room, VisitSettings, WaitingRoom
from recipes.retrieval.command_line import (
    EXTRAS,
    MAX_K,
    add_answerer,
    add_desk,
    add_encoder,
    add_search_options,
    open_library,
)
from recipes.retrieval.search.found import FoundPage
from recipes.serve.chat_request import RequestError
from recipes.serve.door import Door
from rsgrpo.errors import InputError, RsgrpoError, run_program
from rsgrpo.records.console import Console

MAX_WAITING = 16  # questions and uploads
MAX_AT_ONCE = 8  # questions; searches take turns, and so do answers of an engine in this process
PASSWORD_VARIABLE = "RSGRPO_APP_PASSWORD"
KEPT_UPLOADS_S = (600, 3600)  # every ten minutes, uploads older than an hour that were never added are deleted
TAKEN = "PDF, DjVu, images, office, text, HTML, e-mail, e-books"
MAX_TRACES = 64  # kept for download
MAX_SHOWN_HISTORY = 50  # questions of a visit

History = list[tuple[str, str]]
"""Questions of a visit with their answers."""

log = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = Parser(prog="python -m recipes.app", description=__doc__)
    add_encoder(top)
    add_search_options(top)
    add_answerer(top)
    add_desk(top)
    top.set_defaults(max_tries=3)  # someone is waiting
    page = top.add_argument_group("the page")
    page.add_argument("--host", default="127.0.0.1", help="address to listen on; default: only this machine")
    page.add_argument("--port", type=port, default=7860, help="0: any free port")
    page.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name that the page is called by",
    )
    page.add_argument("--open", action="store_true", help="open it in a browser")
    add_options(page, LibrarySettings)
    add_options(page, VisitSettings)
    return top


class Handlers:
    """What the page's buttons do. All return values for gradio's components; faults become text on the page."""

    def __init__(self, library: Library, title: str, scratch: Path, visits: VisitSettings) -> None:
        self._library, self._title, self._scratch, self._visits = library, title, scratch, visits
        self._traces: deque[Path] = deque()
        self.served = [str(library.pages_folder), str(library.uploads_folder)]

    def ask(self, question: str, k: float, setting: Any, follows: bool, history: History) -> Iterator[tuple[Any, ...]]:
        """Yield response, answer, pages, trace, the visit's history and its list, as they become known."""
        import gradio as gr

        # gradio (6.31) keeps what it shows, for the whole visit, each time that an output is skipped and then set: only
        # the button and the history, which are never set to a value, may be skipped. It sends what has changed.
        same, text, pages, asked = gr.skip(), "", "", history_html(history)
        yield text, "", pages, gr.DownloadButton(interactive=False), same, asked
        last: AnswerProgress | None = None
        try:
            for asking in self._library.ask(question, int(k), setting, history if follows else ()):
                if last is None or last.steps != asking.steps:
                    pages = self._pages(asking)
                said = writing_html(asking.text) if asking.steps is None else steps_html(asking)
                text, last = asking.text, asking
                yield text, said, pages, same, same, asked
        except RsgrpoError as error:
            yield text, faults_html([str(error)]), pages, same, same, asked
            return
        assert last is not None, "a question always has pages"
        if last.answered is not None:
            line = last.answered.line
            history = [*history, (question, line["answer"] or line["raw"])][-MAX_SHOWN_HISTORY:]
        trace = gr.DownloadButton(value=str(self._trace(last)), interactive=True)
        answer = answer_html(last) + steps_html(last)
        yield last.text, answer, self._pages(last), trace, history, history_html(history)

    def add(self, files: list[str] | None, taken: Room, report: Report = lambda said, share: None) -> tuple[Any, ...]:
        """Add files to a visit that has added `taken`; tell `report` how far that is.

        Returns:
            What became of the files, the heading, the list of documents, the choice of them, no files, and what the
            visit has added now.
        """
        import gradio as gr

        visit = Quota("--max-visit", self._visits.max_visit_mb, self._visits.max_visit_pages, taken)
        try:
            added = self._library.add([Path(file) for file in files or ()], visit, report)
        except RsgrpoError as error:
            return faults_html([str(error)]), *self.overview(), gr.skip(), gr.skip()
        return added_html(added, self._library.num_pages), *self.overview(), None, taken + added.room

    def remove(self, places: list[str] | None) -> tuple[Any, ...]:
        """Return what was removed, the heading, the list of documents and the choice of them."""
        if not places:
            return faults_html(["choose the documents to remove"]), *self.overview()
        try:
            removal = self._library.remove(places)
        except RsgrpoError as error:
            return faults_html([str(error)]), *self.overview()
        said = f"removed {len(removal.rows)} documents with {removal.num_pages} pages"
        if removal.still_there:
            said += (
                f"; {len(removal.still_there)} of the files still exist, and the next ingest of their folder adds them"
            )
        return f"<div>{escape(said)}</div>", *self.overview()

    def overview(self) -> tuple[Any, ...]:
        """Return the heading, the list of documents, and the choice of those that can be removed."""
        import gradio as gr

        self._library.refresh()
        rows = self._library.documents()
        places = [(row.document, f"{row.root}/{row.document}") for row in rows[:MAX_LISTED]]
        return self.heading(), documents_html(rows), gr.Dropdown(choices=places, value=[], multiselect=True)

    def heading(self) -> str:
        """Return the store's name and size."""
        return f"<h2>{escape(self._title)}: {self._library.num_pages:,} pages</h2>"

    def _pages(self, progress: AnswerProgress) -> str:
        return pages_html(progress, address, self._source)

    def _source(self, page: FoundPage) -> str:
        """Return the URL of a page's document, which is served from now on; "" if it is not linked."""
        file = self._library.source_of(page)
        if file is None:
            return ""
        if not any(file.is_relative_to(folder) for folder in self.served):
            self.served.append(str(file))
        return f"{address(str(file))}#page={page.number}"

    def _trace(self, asking: AnswerProgress) -> Path:
        """Write the trace of an answer to a file of its own, so that tabs do not share it; old ones are deleted."""
        file = Path(tempfile.mkdtemp(dir=self._scratch)) / "trace.json"
        file.write_text(json.dumps(self._library.trace(asking), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self._traces.append(file)
        while len(self._traces) > MAX_TRACES:
            shutil.rmtree(self._traces.popleft().parent, ignore_errors=True)
        return file


def build_page(library: Library, options: argparse.Namespace, scratch: Path) -> Any:
    """Return the page, as gradio's Blocks; traces are written into `scratch`."""
    import gradio as gr

    def add(files: list[str] | None, taken: Room, progress: Any = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        return do.add(files, taken, lambda said, share: progress(share, desc=said))

    answers = library.reader is not None
    do = Handlers(library, options.store.resolve().name, scratch, chosen(VisitSettings, options))
    with gr.Blocks(
        title="Ask your documents", analytics_enabled=False, fill_width=True, delete_cache=KEPT_UPLOADS_S
    ) as page:
        heading = gr.HTML(do.heading, elem_id="heading")
        history, taken = gr.State([]), gr.State(Room())
        with gr.Row():
            with gr.Column(scale=2):
                question = gr.Textbox(
                    label="Question", max_length=MAX_QUESTION_CHARACTERS, elem_id="question", autofocus=True
                )
                with gr.Row(visible=not library.at_desk):
                    k = gr.Slider(1, MAX_K, value=options.k, step=1, label="Pages")
                    settings, label = list(get_args(Setting)), "How pages are shown to the model"
                    setting = gr.Dropdown(settings, value=options.setting, label=label, visible=answers)
                follows = gr.Checkbox(label="Follow-up of the last questions", visible=answers, elem_id="follows")
                with gr.Row():
                    ask_button = gr.Button("Ask" if answers else "Search", variant="primary", elem_id="ask")
                    stop_button = gr.Button("Stop", variant="stop", elem_id="stop")
                gr.HTML(NO_ANSWERER, visible=not answers, elem_id="nobody")
                answer = gr.HTML(elem_id="answer")
                with gr.Accordion("Whole response", open=False, visible=answers, elem_id="whole"):
                    text = gr.Textbox(show_label=False, lines=6, max_lines=16, interactive=False, elem_id="response")
                trace = gr.DownloadButton("Download trace (JSON)", interactive=False, elem_id="trace")
                with gr.Accordion("Questions of this visit", open=False, visible=answers, elem_id="history"):
                    asked = gr.HTML(history_html([]))
            with gr.Column(scale=3):
                pages = gr.HTML(elem_id="found")
        with gr.Accordion("Add documents", open=not library.num_pages):
            files = gr.File(label=TAKEN, file_count="multiple", elem_id="files")
            add_button = gr.Button("Add", elem_id="add")
            added = gr.HTML(elem_id="added")
        with gr.Accordion("Documents", open=False, elem_id="documents"):
            listed = gr.HTML()
            chosen_documents = gr.Dropdown([], multiselect=True, label="Documents to remove", elem_id="doomed")
            remove_button = gr.Button("Remove", elem_id="remove")
            removed = gr.HTML(elem_id="removed")
        overview = [heading, listed, chosen_documents]
        page.load(do.overview, None, overview)
        answering: dict[str, Any] = {"concurrency_id": "answers", "concurrency_limit": MAX_AT_ONCE}
        shown = [text, answer, pages, trace, history, asked]
        asking: list[Any] = [
            trigger(do.ask, [question, k, setting, follows, history], shown, **answering)
            for trigger in (ask_button.click, question.submit)
        ]
        stop_button.click(None, None, None, cancels=asking)
        one_at_a_time: dict[str, Any] = {"concurrency_id": "documents", "concurrency_limit": 1}
        add_button.click(add, [files, taken], [added, *overview, files, taken], **one_at_a_time)
        remove_button.click(do.remove, chosen_documents, [removed, *overview], **one_at_a_time)
    page.allowed_paths = do.served  # a list that grows with the documents that are linked to
    return page.queue(max_size=MAX_WAITING)


def address(path: str) -> str:
    """Return where gradio serves a file of an allowed folder."""
    return f"/gradio_api/file={quote(path)}"


class KnownHosts:
    """Refuses requests under a name that is not the page's: a stranger's page can make a browser call this machine."""

    def __init__(self, app: Any, door: Door) -> None:
        self._app, self._door = app, door

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request of ASGI."""
        hosts = [value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"host"]
        try:
            if scope["type"] in ("http", "websocket"):
                self._door.check(hosts[0] if hosts else "", "")
        except RequestError as error:
            text = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": error.status, "headers": text})
            await send({"type": "http.response.body", "body": str(error).encode()})
            return
        await self._app(scope, receive, send)


def guarded(options: argparse.Namespace, waiting: Path) -> dict[str, Any]:
    """Return gradio's settings of who may see the page: those with the password, or who call it by its names.

    waiting: the folder of uploads that were not added yet.
    """
    from starlette.middleware import Middleware

    inside = [Middleware(WaitingRoom, folder=waiting, max_mb=options.max_waiting_mb)]
    if password := os.environ.get(PASSWORD_VARIABLE, ""):
        auth = {"auth": lambda name, given: hmac.compare_digest(given.encode(), password.encode())}
        return auth | {"app_kwargs": {"middleware": inside}}
    if not _is_loopback(options.host):
        log.warning(
            "anyone who reaches %s can read the store, add documents and ask; set a password in %s",
            options.host,
            PASSWORD_VARIABLE,
        )
    names = Middleware(KnownHosts, door=Door(hosts=tuple(options.allow_host)))
    return {"app_kwargs": {"middleware": [names, *inside]}}


def serve(library: Library, options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    import gradio as gr

    with tempfile.TemporaryDirectory(prefix="rsgrpo-app-") as scratch:
        os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(scratch) / "gradio"))  # removed with the process
        page = build_page(library, options, Path(scratch))
        fonts = ("system-ui", "sans-serif")  # nothing is loaded from other servers
        try:
            _, url, _ = page.launch(
                server_name=options.host,
                server_port=options.port or None,
                allowed_paths=page.allowed_paths,
                max_file_size=options.max_file_mb << 20,
                theme=gr.themes.Default(font=fonts, font_mono=("ui-monospace", "monospace")),
                css=CSS,
                footer_links=[],
                inbrowser=options.open,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
                **guarded(options, Path(os.environ["GRADIO_TEMP_DIR"])),
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
