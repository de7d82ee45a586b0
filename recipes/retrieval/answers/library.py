"""A store that receives documents and answers questions from its pages: what `recipes.app` shows.

One call at a time: neither encoders nor engines support several.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from recipes.answers.options import check_options
from recipes.answers.reader import Reader
from recipes.retrieval.answers.generation import Answered, AskedQuestion, Setting, answer_stream
from recipes.retrieval.encoders.base import PageEncoder
from recipes.retrieval.pages.documents import RenderSettings, is_candidate
from recipes.retrieval.pages.ingest import IngestReport, ingest
from recipes.retrieval.pages.store import PageStore, writing
from recipes.retrieval.search.index import VectorIndex
from recipes.retrieval.search.retriever import EXACT, FoundPage, Retriever, SearchSettings
from recipes.retrieval.search.update import encode_here, fill_index
from rollout.files import replaced
from rollout.keys import key
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console

UPLOADS = "uploads"  # folder in the store for copies of added documents
PAGE_TIMEOUT_S = 120.0
SHARD_PAGES, BATCH_PAGES = 2_048, 64
MAX_QUESTION_CHARACTERS = 4_000


@dataclass(frozen=True, slots=True)
class LibrarySettings:
    """Limits on what is added."""

    max_files: int = key(100, "files that can be added at once", ge=1)
    max_file_mb: int = key(100, "larger files cannot be added", ge=1)
    max_pages: int = key(2_000, "documents with more pages cannot be added", ge=1)
    workers: int = key(os.cpu_count() or 1, "processes that render pages", ge=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True)
class AnswerProgress:
    """How far the answer to a question is.

    pages: retrieved, best first. text: written so far. answered: None until the answer is complete, or if there is no
        answer model.
    seconds: for retrieval, until the first piece of text, and until the end, as far as known.
    """

    question: str
    setting: Setting
    pages: tuple[FoundPage, ...]
    text: str
    answered: Answered | None
    seconds: dict[str, float]


class Library:
    """A store with its index, its encoder and an answerer. Create it once: models stay loaded."""

    def __init__(
        self,
        store: Path,
        index: Path,
        encoder: PageEncoder,
        reader: Reader | None,
        settings: LibrarySettings,
        console: Console,
        search: SearchSettings = EXACT,
    ) -> None:
        """Open everything and encode what the index lacks; a missing store is created by the first `add`.

        Args:
            reader: None: pages are found but not read.
            search: a reranker's index is updated too, and the FAISS file is rebuilt when pages are added.

        Raises:
            InputError: the folder is not a store, or another encoder made the index.
        """
        self.encoder, self.reader = encoder, reader
        self._store, self._index, self._settings, self._console = store, index, settings, console
        self._search = search
        self._retriever: Retriever | None = None
        if (store / "pages.parquet").exists():
            self._open()
        elif store.exists() and not (store / "store.json").exists() and (not store.is_dir() or any(store.iterdir())):
            raise InputError(f"{store} is neither a page store nor an empty folder; choose another one")

    @property
    def num_pages(self) -> int:
        """How many pages can be found."""
        return len(self._retriever.index) if self._retriever else 0

    @property
    def pages_folder(self) -> Path:
        """Where all page images are."""
        return (self._store / "pages").absolute()

    def add(self, files: Sequence[Path]) -> IngestReport:
        """Copy files into the store, render them and encode their pages; a file of the same name is replaced.

        Raises:
            InputError: there are no files or too many, one is too large, or the disk is full.
        """
        limits = self._settings
        _check_files(files, limits)
        render = self._render_settings()
        PageStore.create(self._store, render.pixels())
        uploads = self._store / UPLOADS
        with writing(uploads):
            uploads.mkdir(exist_ok=True)
            for file in files:
                with replaced(uploads / _kept_name(file)) as unfinished:  # hidden: an ingest skips it
                    shutil.copyfile(file, unfinished)
        ingested = ingest(
            [uploads], self._store, render, num_workers=limits.workers, page_timeout_s=PAGE_TIMEOUT_S,
            console=self._console,
        )  # fmt: skip
        for row in ingested.errors:
            if not row.num_pages:  # else it is read and reported again with every later file
                Path(os.fsdecode(row.path)).unlink()
        self._open()
        return ingested

    def ask(self, question: str, k: int, setting: Setting) -> Iterator[AnswerProgress]:
        """Yield the progress: the pages, then the answer as it is written, then the complete answer.

        Raises:
            InputError: the question is empty or too long, or there is no page.
            RsgrpoError: the answerer fails.
        """
        if not question.strip():
            raise InputError("the question is empty")
        if len(question) > MAX_QUESTION_CHARACTERS:
            raise InputError(f"the question has {len(question):,} characters, more than {MAX_QUESTION_CHARACTERS:,}")
        if question != question.encode(errors="ignore").decode():
            raise InputError("the question contains half a character (a lone surrogate); type it again")
        if self._retriever is None or not self.num_pages:
            raise InputError("there are no pages yet: add documents first")
        start = time.monotonic()
        (found,) = self._retriever.search([question], k)
        seconds = {"retrieval": time.monotonic() - start}
        progress = AnswerProgress(question, setting, tuple(found), "", None, seconds)
        yield progress
        if self.reader is None:
            return
        for piece in answer_stream(AskedQuestion("question", question, progress.pages), setting, self.reader):
            if isinstance(piece, str):
                seconds.setdefault("first_text", time.monotonic() - start)
                progress = replace(progress, text=progress.text + piece, seconds=dict(seconds))
            else:
                seconds["whole"] = time.monotonic() - start
                progress = replace(progress, text=piece.line["raw"], answered=piece, seconds=dict(seconds))
            yield progress

    def trace(self, asking: AnswerProgress) -> dict[str, Any]:
        """Return everything about a question as JSON: the pages, the prompt and the answer, if there is one."""
        answered, search, encoder = asking.answered, self._search, self.encoder.identity
        numbers = {page.page_id: answered.index_of(page) for page in answered.sources} if answered else {}
        cited = {page.page_id for page in answered.cited} if answered else set()
        pages = [
            asdict(page) | {"index": numbers.get(page.page_id), "cited": page.page_id in cited} for page in asking.pages
        ]
        return {
            "question": asking.question,
            "setting": asking.setting,
            "store": str(self._store.absolute()),
            "encoder": dict(encoder.description) | {"fingerprint": encoder.fingerprint},
            "backend": search.backend,
            "reranker": search.reranker[0].identity.fingerprint if search.reranker else None,
            "prompt_template": self.reader.template if self.reader else None,
            "system": self.reader.system if self.reader else None,
            "pages": pages,
            "weights": list(answered.weights) if answered else [],
            "result": answered.line if answered else None,
            "seconds": {name: round(value, 4) for name, value in asking.seconds.items()},
        }

    def close(self) -> None:
        """Free the answerer."""
        if self.reader is not None:
            self.reader.answerer.close()

    def _open(self) -> None:
        """Update the indexes from the store and reopen them."""
        index = self._updated(self._index, self.encoder)
        if self._search.reranker is not None:
            self._updated(self._search.reranker[1], self._search.reranker[0])
        if self._search.backend != "exact" and len(index):
            index.build_faiss(self._search.backend, only_if_older=True)
        self._retriever = Retriever(self._store, self._index, self.encoder, self._search) if len(index) else None

    def _updated(self, folder: Path, encoder: PageEncoder) -> VectorIndex:
        index = VectorIndex.create(folder, encoder.identity)
        stream = partial(encode_here, encoder, batch_pages=BATCH_PAGES)
        fill_index(PageStore.open(self._store), index, stream, shard_pages=SHARD_PAGES, console=self._console)
        return index

    def _render_settings(self) -> RenderSettings:
        kept = PageStore(self._store).settings() if (self._store / "store.json").exists() else {}
        return RenderSettings(**kept, max_pages=self._settings.max_pages, max_file_mb=self._settings.max_file_mb)


def _check_files(files: Sequence[Path], limits: LibrarySettings) -> None:
    """Refuse files that cannot be added, before any is copied."""
    if not 1 <= len(files) <= limits.max_files:
        raise InputError(f"{len(files)} files were given; between 1 and --max-files {limits.max_files} can be added")
    names = [_kept_name(file) for file in files]
    for file, name in zip(files, names, strict=True):
        num_bytes = file.stat().st_size
        if num_bytes > limits.max_file_mb << 20:
            raise InputError(f"{name} has {num_bytes >> 20:,} MiB, more than --max-file-mb {limits.max_file_mb}")
        if names.count(name) > 1:
            raise InputError(f"two of the files are called {name}; add one after the other, or rename one")
        if not is_candidate(file):
            raise InputError(f"{name} is not a document; add PDF, image, office, text or HTML files")


def _kept_name(file: Path) -> str:
    return file.name.lstrip(".") or "document"  # an ingest skips hidden files
