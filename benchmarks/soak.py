"""Ask a store for hours in minutes: several users ask while documents come and go; memory and errors are counted.

    python -m benchmarks.soak                     # over HTTP (recipes.retrieve serve), 1,000 questions of 4 users
    python -m benchmarks.soak --over app          # the same through the page (recipes.app), by gradio's own client

The store is made of text pages and searched by words; the answerer is scripted, so that what grows is ours or the
server's, not a model's. Memory is the resident set of the serving process, after a warm-up of 100 questions.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from recipes.answers.reader import Reader
from recipes.answers.types import Answer
from recipes.retrieval.answers.library import Library, LibrarySettings
from recipes.retrieval.pages.ingest import ingest
from recipes.retrieval.pages.settings import RenderSettings
from recipes.retrieval.search.retriever import SearchSettings
from rollout.types import Prompt
from tests.material.retrieval import QUIET, write_pdf

ANSWER = (
    "<observe>o</observe>\n<evidence>\n[1]: animal 7\n[2]: no relevant information\n[3]: no relevant information\n"
    "</evidence>\n<think>page 1</think>\n<answer>seven</answer>"
)
WARM_UP = 100


class Scripted:
    """Writes one answer in pieces, whatever it is asked."""

    name, is_concurrent = "scripted", True

    def start(self) -> None:
        """Do nothing."""

    def stream(self, prompt: Prompt) -> Generator[str | Answer]:
        """Yield the answer in pieces of 20 characters."""
        yield from (ANSWER[start : start + 20] for start in range(0, len(ANSWER), 20))
        yield Answer(prompt, ANSWER, "stop")

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        """Yield it for every prompt."""
        yield from (Answer(prompt, ANSWER, "stop") for prompt in prompts)

    def close(self) -> None:
        """Do nothing."""


def make_library(folder: Path, num_documents: int) -> Library:
    """Return a library over text documents about numbered animals."""
    documents = folder / "documents"
    documents.mkdir()
    for number in range(num_documents):
        write_pdf(documents / f"animal-{number:03}.pdf", [f"animal {number} eats {number * 7} leaves a day"])
    store = folder / "store"
    ingest([documents], store, RenderSettings(), num_workers=2, page_timeout_s=120, console=QUIET)
    reader = Reader(Scripted(), "{images}\n{question}", "", "")
    return Library(store, store / "index", None, reader, LibrarySettings(workers=1), QUIET, SearchSettings(by="words"))


def run(library: Library, over: str, num_questions: int, num_users: int, folder: Path) -> dict[str, Any]:
    """Ask all questions and change documents meanwhile; return counts, seconds and memory in MiB by question."""
    me, done, errors, memory = psutil.Process(), 0, [], {}
    lock, stop = threading.Lock(), threading.Event()

    def count(error: str = "") -> None:
        nonlocal done
        with lock:
            done += 1
            if error:
                errors.append(error)
            if done % max(1, num_questions // 10) == 0 or done == WARM_UP:
                gc.collect()
                memory[done] = round(me.memory_info().rss / 2**20)
                print(done, memory[done], len(errors), file=sys.stderr, flush=True)

    def change() -> int:
        """Add and remove a document until the questions are over; return how often."""
        times, file = 0, folder / "visitor.pdf"
        while not stop.wait(0.5):
            write_pdf(file, [f"a visitor number {times} eats nothing"])
            library.add([file])
            library.remove(["visitor.pdf"])
            times += 1
        return times

    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        changes = pool.submit(change)
        try:
            (_ask_over_http if over == "serve" else _ask_the_page)(library, num_questions, num_users, folder, count)
        finally:
            stop.set()
        num_changes = changes.result()
    return {
        "questions": done,
        "errors": len(errors),
        "first error": errors[0] if errors else "",
        "documents added and removed": num_changes,
        "seconds": round(time.monotonic() - started, 1),
        "memory after questions, MiB": memory,
    }


def _ask_over_http(
    library: Library, num_questions: int, num_users: int, folder: Path, count: Callable[[str], None]
) -> None:
    from aiohttp import ClientSession, web

    from recipes.serve.documents import DocumentServer, DocumentServerConfig

    async def scene() -> None:
        runner = web.AppRunner(DocumentServer(library, DocumentServerConfig(k=3)).app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]

        async def user(numbers: range) -> None:
            async with ClientSession(f"http://127.0.0.1:{port}") as session:
                for number in numbers:
                    reply = await session.post("/v1/ask", json={"question": f"what does animal {number % 20} eat?"})
                    found = await reply.json()
                    is_right = reply.status == 200 and found["pages"] and found["answer"] == "seven"
                    count("" if is_right else f"{reply.status}: {found}"[:300])

        await asyncio.gather(*(user(range(first, num_questions, num_users)) for first in range(num_users)))
        await runner.cleanup()

    asyncio.run(scene())


def _ask_the_page(
    library: Library, num_questions: int, num_users: int, folder: Path, count: Callable[[str], None]
) -> None:
    from gradio_client import Client

    from recipes import app

    options = app.parser().parse_args([str(folder / "store"), "--by", "words"])
    page = app.build_page(library, options, folder)
    _, url, _ = page.launch(server_name="127.0.0.1", ssr_mode=False, quiet=True, prevent_thread_lock=True)

    def user(numbers: range) -> None:
        client = Client(url, verbose=False)
        for number in numbers:
            try:
                shown = client.predict(f"what does animal {number % 20} eat?", 3, "multi_image", False, api_name="/ask")
                count("" if "seven" in str(shown) else f"no answer: {shown}"[:300])
            except Exception as error:
                count(f"{type(error).__name__}: {error}"[:300])

    with ThreadPoolExecutor(num_users) as pool:
        list(pool.map(user, (range(first, num_questions, num_users) for first in range(num_users))))
    page.close(verbose=False)


def main() -> None:
    """Run the command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.partition("\n")[0])
    top.add_argument("--over", choices=("serve", "app"), default="serve")
    top.add_argument("--questions", type=int, default=1_000)
    top.add_argument("--users", type=int, default=4)
    top.add_argument("--documents", type=int, default=20)
    options = top.parse_args()
    with tempfile.TemporaryDirectory(prefix="rsgrpo-soak-") as scratch:
        folder = Path(scratch)
        library = make_library(folder, options.documents)
        print(json.dumps(run(library, options.over, options.questions, options.users, folder), indent=1))


if __name__ == "__main__":
    main()
