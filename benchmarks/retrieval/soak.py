"""Ask a store for hours in minutes: several users ask while documents come and go; every answer is checked.

    python -m benchmarks.retrieval.soak                 # the page (recipes.app), by its queue: 1,000 questions, 4 users
    python -m benchmarks.retrieval.soak --over serve    # the same over HTTP (recipes.retrieve serve)

The server is a process of its own, whose resident set counts, with MiniLM loaded (tools/fetch_test_documents.py) and a
hybrid search. The answerer is scripted: it answers with the digest of the first page that it was given, so that what
grows is ours, the encoder's or the server's.

A question names one animal, whose document must come first and be the one that the answer was read from. One more user
adds and removes documents all the time: a question about one of them must find it if it was there from the question's
beginning to its end, and no question may show one that was not there at any moment of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import psutil

from recipes.answers.reader import Reader
from recipes.answers.types import Answer
from recipes.retrieval.answers.library import Library, LibrarySettings
from recipes.retrieval.encoders.base import EncoderSettings
from recipes.retrieval.encoders.choice import load_encoder
from recipes.retrieval.pages.ingest import ingest
from recipes.retrieval.pages.settings import RenderSettings
from recipes.retrieval.pages.store import hash_file
from recipes.retrieval.search.retriever import SearchSettings
from rollout.types import Prompt
from tests.material.retrieval import QUIET, write_pdf
from tools.fetch_test_documents import MODEL

WARM_UP = 100  # questions, after which the memory counts
PAGES = 3  # of a question
DIGITS = 16  # of a digest
STAY_S = 2.0  # of a document that comes and goes
ANIMALS = "ant bear cat dog eel fox goat hare ibex jackal kiwi lion mole newt otter pig quail rat seal toad"


class Scripted:
    """Answers with the digest of the first page's document, in pieces."""

    name, is_concurrent = "scripted", True

    def start(self) -> None:
        """Do nothing."""

    def stream(self, prompt: Prompt) -> Generator[str | Answer]:
        """Yield the answer in pieces of 20 characters."""
        digest = Path(str(prompt.images[0])).parent.name[:DIGITS]
        text = f"<observe>o</observe>\n<evidence>\n[1]: eats\n</evidence>\n<think>t</think>\n<answer>{digest}</answer>"
        yield from (text[start : start + 20] for start in range(0, len(text), 20))
        yield Answer(prompt, text, "stop")

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        """Yield it for every prompt."""
        for prompt in prompts:
            *_, last = self.stream(prompt)
            assert isinstance(last, Answer)
            yield last

    def close(self) -> None:
        """Do nothing."""


# The server, a process of its own


def serve(over: str, folder: Path, model: str, connection: Connection) -> None:
    """Serve the store of a folder until the other side of the connection is closed; send the address first."""
    reader = Reader(Scripted(), "{images}\n{question}", "", "")
    encoder = load_encoder(EncoderSettings(model, kind="text", device="cpu")) if model else None
    search = SearchSettings(by="hybrid" if model else "words")
    store, settings = folder / "store", LibrarySettings(workers=1)
    library = Library(store, store / "index", encoder, reader, settings, QUIET, search)
    (serve_page if over == "app" else serve_http)(library, folder, connection)


def serve_page(library: Library, folder: Path, connection: Connection) -> None:
    """Serve the page of recipes.app."""
    from recipes import app

    options = app.parser().parse_args([str(folder / "store"), "--by", "words"])
    page = app.build_page(library, options, folder)
    _, url, _ = page.launch(server_name="127.0.0.1", ssr_mode=False, quiet=True, prevent_thread_lock=True)
    connection.send(url)
    wait_for_end(connection)
    page.close(verbose=False)


def serve_http(library: Library, folder: Path, connection: Connection) -> None:
    """Serve the interface of recipes.retrieve serve."""
    from aiohttp import web

    from recipes.serve.documents import DocumentServer, DocumentServerConfig

    async def scene() -> None:
        runner = web.AppRunner(DocumentServer(library, DocumentServerConfig(k=PAGES)).app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        connection.send(f"http://127.0.0.1:{runner.addresses[0][1]}")
        await asyncio.to_thread(wait_for_end, connection)
        await runner.cleanup()

    asyncio.run(scene())


def wait_for_end(connection: Connection) -> None:
    """Return when the other side has closed the connection."""
    try:
        connection.recv()
    except EOFError:
        return


# The users


class Client(Protocol):
    """One user's connection."""

    def ask(self, question: str) -> tuple[list[str], str]:
        """Return the documents of the pages that are shown, best first, and the answer."""
        ...

    def add(self, file: Path) -> None:
        """Add a document; return when it can be found."""
        ...

    def remove(self, file: Path) -> None:
        """Remove a document; return when it can no longer be found."""
        ...


class PageClient:
    """A visit to the page, through gradio's own client."""

    def __init__(self, url: str, folder: Path) -> None:
        from gradio_client import Client as GradioClient

        self._client, self._uploads = (
            GradioClient(url, verbose=False, download_files=False),
            folder / "store" / "uploads",
        )

    def ask(self, question: str) -> tuple[list[str], str]:
        _, answer, pages, *_ = self._client.predict(question, PAGES, "multi_image", False, api_name="/ask")
        found = re.findall(r"<figcaption>.*?<br>(.*?), page \d+", pages)
        return found, "".join(re.findall(r'class="answer">(\w*)', answer))

    def add(self, file: Path) -> None:
        from gradio_client import handle_file

        said = self._client.predict([handle_file(str(file))], api_name="/add")[0]
        if "1 added or changed" not in said:
            raise RuntimeError(f"{file.name} was not added: {said}")

    def remove(self, file: Path) -> None:
        said = self._client.predict([f"{self._uploads}/{file.name}"], api_name="/remove")[0]
        if "removed 1 documents" not in said:
            raise RuntimeError(f"{file.name} was not removed: {said}")


class HttpClient:
    """A program that uses the HTTP interface."""

    def __init__(self, url: str, _: Path) -> None:
        import httpx

        self._client = httpx.Client(base_url=url, timeout=120)

    def ask(self, question: str) -> tuple[list[str], str]:
        found = self._client.post("/v1/ask", json={"question": question}).raise_for_status().json()
        return [page["document"] for page in found["pages"]], found["answer"]

    def add(self, file: Path) -> None:
        reply = self._client.post("/v1/documents", files={"file": (file.name, file.read_bytes())})
        if reply.raise_for_status().json()["added"] != 1:
            raise RuntimeError(f"{file.name} was not added: {reply.text}")

    def remove(self, file: Path) -> None:
        self._client.request("DELETE", "/v1/documents", json={"documents": [file.name]}).raise_for_status()


@dataclass
class Visitor:
    """A document that comes and goes, with the moments around both."""

    file: Path
    adding: float
    added: float = float("inf")
    removing: float = float("inf")
    removed: float = float("inf")


@dataclass
class Log:
    """What has happened so far."""

    digests: dict[str, str]
    visitors: list[Visitor] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    num_done: int = 0
    num_of_visitors: int = 0

    def check(self, animal: str, found: Sequence[str], answer: str, start: float) -> str:
        """Return what is wrong with an answer that has just come, "" if nothing is."""
        end, visitors = time.monotonic(), {visitor.file.name: visitor for visitor in self.visitors}
        for name in found:
            visitor = visitors.get(name)
            if visitor is not None and (visitor.removed < start or visitor.adding > end):
                return f"{name} is shown, which was not there"
        if not found or answer != self.digests[found[0]][:DIGITS]:
            return f"the answer {answer!r} was not read from the first page of {found}"
        wanted = f"{animal}.pdf"
        visitor = visitors.get(wanted)
        is_there = visitor is None or (visitor.added <= start and end <= visitor.removing)
        return f"{wanted} does not come first in {found}" if is_there and found[0] != wanted else ""


def visit(client: Client, log: Log, folder: Path, stop: threading.Event) -> None:
    """Add and remove documents, one after another, until the questions are over."""
    while not stop.is_set():
        number = len(log.visitors)
        file = folder / f"visitor{number}.pdf"
        write_pdf(file, [f"visitor{number} eats {number} nuts a day"])
        log.digests[file.name] = hash_file(file)
        visitor = Visitor(file, adding=time.monotonic())
        log.visitors.append(visitor)
        try:
            client.add(file)
            visitor.added = time.monotonic()
            stop.wait(STAY_S)
            visitor.removing = time.monotonic()
            client.remove(file)
            visitor.removed = time.monotonic()
        except Exception as error:
            log.errors.append(f"{type(error).__name__}: {error}"[:300])


def run(over: str, model: str, num_questions: int, num_users: int, folder: Path) -> dict[str, Any]:
    """Ask all questions and change documents meanwhile; return counts, seconds and memory in MiB by question."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(over, folder, model, there))
    process.start()
    there.close()
    url = here.recv()
    log = Log({file.name: hash_file(file) for file in (folder / "documents").iterdir()})
    lock, stop, memory, server = threading.Lock(), threading.Event(), dict[int, int](), psutil.Process(process.pid)
    make: Callable[[str, Path], Client] = PageClient if over == "app" else HttpClient

    names = ANIMALS.split()

    def user(numbers: range) -> None:
        client = make(url, folder)
        for number in numbers:
            visitors = [visitor for visitor in log.visitors if visitor.added < visitor.removing == float("inf")]
            animal = visitors[-1].file.stem if visitors and number % 3 == 0 else names[number % len(names)]
            start = time.monotonic()
            try:
                fault = log.check(animal, *client.ask(f"what does {animal} eat?"), start)
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"[:300]
            with lock:
                log.num_done += 1
                log.num_of_visitors += animal.startswith("visitor")
                log.errors += [fault] if fault else []
                if log.num_done % max(1, num_questions // 10) == 0 or log.num_done == WARM_UP:
                    memory[log.num_done] = round(server.memory_info().rss / 2**20)
                    print(log.num_done, memory[log.num_done], len(log.errors), file=sys.stderr, flush=True)

    started = time.monotonic()
    with ThreadPoolExecutor(num_users + 1) as pool:
        changes = pool.submit(visit, make(url, folder), log, folder, stop)
        users = [pool.submit(user, range(first, num_questions, num_users)) for first in range(num_users)]
        for asking in users:
            asking.result()
        stop.set()
        changes.result()
    here.close()
    process.join()
    return {
        "over": over,
        "questions": log.num_done,
        "of documents that come and go": log.num_of_visitors,
        "errors": len(log.errors),
        "first error": log.errors[0] if log.errors else "",
        "documents added and removed": len(log.visitors),
        "seconds": round(time.monotonic() - started, 1),
        "memory after questions, MiB": memory,
    }


def make_store(folder: Path) -> None:
    """Make FOLDER/documents, a page about each animal, and FOLDER/store."""
    documents = folder / "documents"
    documents.mkdir()
    for number, animal in enumerate(ANIMALS.split()):
        write_pdf(documents / f"{animal}.pdf", [f"the {animal} eats {number * 7} leaves a day"])
    ingest([documents], folder / "store", RenderSettings(), num_workers=2, page_timeout_s=120, console=QUIET)


def main() -> None:
    """Run the command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.retrieval.soak", description=__doc__.partition("\n")[0])
    top.add_argument("--over", choices=("app", "serve"), default="app")
    top.add_argument("--questions", type=int, default=1_000)
    top.add_argument("--users", type=int, default=4)
    top.add_argument("--model", default=str(MODEL), help="text encoder; an empty name searches by words alone")
    options = top.parse_args()
    with tempfile.TemporaryDirectory(prefix="rsgrpo-soak-") as scratch:
        make_store(Path(scratch))
        print(json.dumps(run(options.over, options.model, options.questions, options.users, Path(scratch)), indent=1))


if __name__ == "__main__":
    main()
