"""A store that receives documents and answers questions, for `recipes.app` and `recipes.retrieve serve`."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from recipes.answers.options import check_options
from recipes.answers.reader import Reader
from recipes.retrieval.answers.at_desk import LibraryShelf, look_up
from recipes.retrieval.answers.evidence import cited_pages
from recipes.retrieval.answers.generation import Answered, AskedQuestion, Setting, answer_stream
from recipes.retrieval.answers.highlight import Box, evidence_boxes
from recipes.retrieval.answers.progress import AnswerProgress
from recipes.retrieval.answers.uploads import Quota, Quotas, Room, room_of
from recipes.retrieval.desk.shelf import lent
from recipes.retrieval.encoders.base import PageEncoder
from recipes.retrieval.pages.catalogue import UPLOADS, Removal, remove_documents
from recipes.retrieval.pages.documents import why_skipped
from recipes.retrieval.pages.ingest import ingest
from recipes.retrieval.pages.settings import RenderSettings
from recipes.retrieval.pages.store import DocumentRow, Page, PageStore, StoreBusyError, shown, writing
from recipes.retrieval.search.found import FoundPage
from recipes.retrieval.search.index import IndexFault, VectorIndex
from recipes.retrieval.search.keep import NO_FILTERS, Filters
from recipes.retrieval.search.retriever import EXACT, Retriever, SearchSettings
from recipes.retrieval.search.sync import bring_in_line
from rollout.files import replaced
from rollout.keys import key
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console

PAGE_TIMEOUT_S = 120.0
MAX_QUESTION_CHARACTERS = 4_000
LINKED = (".pdf", ".png", ".jpg", ".jpeg")  # kinds that are linked to
NO_PAGES = "there are no pages yet: add documents first"
MAX_HISTORY = 3  # earlier questions that a follow-up is asked with


@dataclass(frozen=True, slots=True)
class LibrarySettings:
    """Limits on what is added, and whether indexes follow the store."""

    max_files: int = key(100, "files that can be added at once", ge=1)
    max_file_mb: int = key(100, "larger files cannot be added", ge=1)
    max_pages: int = key(2_000, "documents with more pages cannot be added", ge=1)
    max_added_mb: int = key(50_000, "room for all files that were added and their pages", ge=1)
    max_added_pages: int = key(200_000, "pages of all files that were added", ge=1)
    workers: int = key(os.cpu_count() or 1, "processes that render pages", ge=1)
    no_sync: bool = key(False, "leave indexes that are behind the store as they are, and only say so")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True)
class Added:
    """What became of added files.

    num_added: documents with pages. faults: name and reason of what was refused, or added without some of its pages.
    room: what the added documents take.
    """

    num_added: int
    faults: tuple[tuple[str, str], ...]
    room: Room = field(default_factory=Room)


class Library:
    """A store with its indexes, its encoders and an answerer. Create it once: models stay loaded.

    Several threads may ask at once: searches take turns, because encoders do not support several callers, and so do
    answers unless the answerer is concurrent (an endpoint). What other processes do to the store is noticed at the next
    question.
    """

    def __init__(
        self,
        store: Path,
        index: Path,
        encoder: PageEncoder | None,
        reader: Reader | None,
        settings: LibrarySettings,
        console: Console,
        search: SearchSettings = EXACT,
        filters: Filters = NO_FILTERS,
        *,
        at_desk: bool = False,
    ) -> None:
        """Open everything and encode what the indexes lack; a missing store is created by the first `add`.

        Args:
            encoder: None for a search by words.
            reader: None: pages are found but not read.
            search: the indexes of a reranker and of further encoders are updated too, and so are FAISS files.
            at_desk: the reader looks up its pages at the page desk; `lend_to_desk` lets that search this library.

        Raises:
            InputError: the folder is not a store, or another encoder made an index.
        """
        self.encoder, self.reader = encoder, reader
        self._store, self._index, self._settings, self._console = store, index, settings, console
        self._search, self._filters, self.at_desk = search, filters, at_desk
        self._retriever: Retriever | None = None
        self._seen: object = None
        self._searching, self._lent = threading.RLock(), ExitStack()
        self._answering = nullcontext() if reader is None or reader.answerer.is_concurrent else threading.Lock()
        if (store / "pages.parquet").exists():
            self.refresh()
        elif store.exists() and not (store / "store.json").exists() and (not store.is_dir() or any(store.iterdir())):
            raise InputError(f"{store} is neither a page store nor an empty folder; choose another one")

    @property
    def num_pages(self) -> int:
        """How many pages can be found."""
        return self._retriever.num_pages if self._retriever else 0

    @property
    def pages_folder(self) -> Path:
        """Where all page images are."""
        return (self._store / "pages").absolute()

    @property
    def uploads_folder(self) -> Path:
        """Where copies of added documents are."""
        return (self._store / UPLOADS).absolute()

    def source_of(self, page: FoundPage) -> str:
        """Return the URL of an added PDF or image at a found page, relative to the page's server; "" for others.

        Other kinds are not linked, because a browser might run what is in them.
        """
        file = self.uploads_folder / page.document
        if page.root != str(self.uploads_folder.resolve()) or file.suffix.lower() not in LINKED or not file.exists():
            return ""
        return f"/gradio_api/file={quote(str(file))}#page={page.number}"

    def image_of(self, page_id: str) -> Path | None:
        """Return the image of a page of the store; None if there is no such page."""
        if not (self._store / "pages.parquet").exists():
            return None
        page = PageStore.open(self._store).find([page_id]).get(page_id)
        return None if page is None else Path(page.image)

    def refresh(self) -> None:
        """Follow what has happened to the store since the last call: update the indexes and open them again.

        While another process writes to an index, the pages that it has already are searched, and `notes` says so.

        Raises:
            InputError: the store cannot be read, or another encoder made an index.
        """
        with self._searching:
            if self._seen == (seen := self._state()) or not (self._store / "pages.parquet").exists():
                return
            if not self._settings.no_sync:
                try:
                    bring_in_line(self._store, self._index, self.encoder, self._search, self._console)
                except StoreBusyError as error:
                    self._console.warning(f"{error}; the indexes stay behind until then")
                seen = self._state()
            has_index = self._search.by == "words" or len(VectorIndex.open(self._index)) > 0
            self._retriever = self._opened() if has_index else None
            self._seen = seen if self._retriever is None or not self._retriever.lags or self._settings.no_sync else None

    @property
    def notes(self) -> list[str]:
        """What the user should know of the indexes."""
        return [str(lag) for lag in self._retriever.lags] if self._retriever else []

    def documents(self) -> list[DocumentRow]:
        """Return the catalogue without files that are not read; empty without a store."""
        if not (self._store / "pages.parquet").exists():
            return []
        return [row for row in PageStore.open(self._store).documents() if not row.skipped]

    def add(self, files: Sequence[Path], visit: Quota | None = None) -> Added:
        """Copy files into the store, render them and encode their pages; a file of the same name is replaced.

        A file that cannot be added is refused by itself; one that has no page that can be rendered is not kept.

        visit: what whoever adds them may add, beside what the store may hold.

        Raises:
            InputError: there are no files or too many, none can be added, or the disk is full.
        """
        limits = self._settings
        with self._searching:
            quotas = Quotas(self._quota(), *([visit] if visit else []))
            accepted, refused = _sorted_out(files, limits, quotas)
            if not accepted:
                raise InputError("; ".join(f"{name}: {reason}" for name, reason in refused))
            render = self._render_settings()
            bounds = quotas.bounds(render, len(accepted))
            PageStore.create(self._store, render.pixels())
            uploads = self._store / UPLOADS
            with writing(uploads):
                uploads.mkdir(exist_ok=True)
                for file in accepted:
                    with replaced(uploads / _kept_name(file)) as unfinished:  # hidden: an ingest skips it
                        shutil.copyfile(file, unfinished)
            report = ingest(
                [uploads], self._store, replace(render, **bounds), num_workers=limits.workers,
                page_timeout_s=PAGE_TIMEOUT_S, console=self._console, prune=True,  # a file that cannot be read goes
            )  # fmt: skip
            names = {shown(_kept_name(file)) for file in accepted}
            faulty = [row for row in report.errors if row.document in names]
            refused += [(row.document, quotas.explained(row.error, bounds, render)) for row in faulty]
            lost = [f"{row.root}/{row.document}" for row in faulty if not row.num_pages]
            room, beyond = self._fitting(names, quotas)
            refused += beyond.items()
            lost += [f"{shown(uploads.resolve())}/{name}" for name in beyond]
            if lost:
                remove_documents(PageStore.open(self._store), lost)
            self.refresh()
        return Added(len(accepted) - len(lost), tuple(refused), room)

    def _quota(self) -> Quota:
        """Return what added documents may take, and what they take now."""
        taken = Room()
        if (self._store / "pages.parquet").exists():
            store, root = PageStore.open(self._store), shown(self.uploads_folder.resolve())
            taken = sum((room_of(store, row) for row in store.documents() if row.root == root), taken)
        return Quota("--max-added", self._settings.max_added_mb, self._settings.max_added_pages, taken)

    def _fitting(self, names: Container[str], quotas: Quotas) -> tuple[Room, dict[str, str]]:
        """Return what the documents just added take that fit, and the names of the others with the reason."""
        store, root = PageStore.open(self._store), shown(self.uploads_folder.resolve())
        room, beyond = Room(), {}
        for row in store.documents():
            if row.root == root and row.document in names and row.num_pages:
                own = room_of(store, row)
                if reason := quotas.refusal(own, room):
                    beyond[row.document] = reason
                else:
                    room += own
        return room, beyond

    def remove(self, documents: Sequence[str]) -> Removal:
        """Take documents out of the store and of the indexes; InputError if one is not there."""
        with self._searching:
            removal = remove_documents(PageStore.open(self._store), documents)
            self.refresh()
        return removal

    def ask(
        self, question: str, k: int, setting: Setting, history: Sequence[tuple[str, str]] = ()
    ) -> Iterator[AnswerProgress]:
        """Yield the progress: the pages, then the answer as it is written, then the complete answer.

        Args:
            history: earlier questions and answers of this conversation, which the question may refer to.

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
        start = time.monotonic()
        if self.at_desk and self.reader is not None:
            yield from self._look_up(question, history, self.reader, start)
            return
        found = self.found(question, k)
        seconds = {"retrieval": time.monotonic() - start}
        progress = AnswerProgress(question, setting, tuple(found), "", None, seconds, notes=tuple(self.notes))
        yield progress
        if self.reader is None:
            return
        asked = AskedQuestion("question", _with_history(question, history), progress.pages)
        with self._answering:
            for piece in answer_stream(asked, setting, self.reader):
                if isinstance(piece, str):
                    seconds.setdefault("first_text", time.monotonic() - start)
                    progress = replace(progress, text=progress.text + piece, seconds=dict(seconds))
                else:
                    seconds["whole"] = time.monotonic() - start
                    progress = replace(progress, text=piece.line["raw"], answered=piece, seconds=dict(seconds))
                    progress = replace(progress, boxes=self._boxes(piece))
                yield progress

    def _look_up(
        self, question: str, history: Sequence[tuple[str, str]], reader: Reader, start: float
    ) -> Iterator[AnswerProgress]:
        """Yield the progress of a reader that looks up its pages: after each piece of text, and after each step."""
        self.refresh()
        if not self.num_pages:
            raise InputError(NO_PAGES)
        with self._answering, closing(look_up(_with_history(question, history), reader, self._pages)) as visit:
            seconds: dict[str, float] = {}
            for progress in visit:
                if progress.text:
                    seconds.setdefault("first_text", time.monotonic() - start)
                if progress.answered is not None:
                    seconds["whole"] = time.monotonic() - start
                    progress = replace(progress, boxes=self._boxes(progress.answered))
                yield replace(progress, question=question, seconds=dict(seconds), notes=tuple(self.notes))

    def _pages(self, page_ids: Sequence[str]) -> dict[str, Page]:
        return PageStore.open(self._store).find(page_ids)

    def _boxes(self, answered: Answered) -> dict[str, tuple[Box, ...]]:
        documents = self.documents()
        cited = [] if answered.pasted else cited_pages(answered)
        return {source.page.page_id: evidence_boxes(source.page, source.text, documents) for source in cited}

    def found(self, question: str, k: int) -> list[FoundPage]:
        """Return the distinct pages of a question, best first, over the documents of this moment.

        Raises:
            InputError: there are no pages, or the question cannot be searched.
        """
        with self._searching:
            for is_last in (False, True):
                self.refresh()
                if self._retriever is None or not self.num_pages:
                    raise InputError(NO_PAGES)
                try:
                    (found,) = self._retriever.search([question], k, distinct=True)
                    return found
                except IndexFault:  # another process has replaced it between the two lines
                    if is_last:
                        raise
                    self._seen = None
        raise AssertionError("unreachable")

    def trace(self, asking: AnswerProgress) -> dict[str, Any]:
        """Return everything about a question as JSON: the pages, the prompt and the answer, if there is one."""
        answered, search = asking.answered, self._search
        encoder = self.encoder.identity if self.encoder else None
        numbers = {page.page_id: answered.index_of(page) for page in answered.sources} if answered else {}
        cited = {page.page_id for page in answered.cited} if answered else set()
        pages = [
            asdict(page) | {"index": numbers.get(page.page_id), "cited": page.page_id in cited} for page in asking.pages
        ]
        return {
            "question": asking.question,
            "setting": asking.setting if asking.steps is None else "desk",
            "store": str(self._store.absolute()),
            "encoder": dict(encoder.description) | {"fingerprint": encoder.fingerprint} if encoder else None,
            "by": search.by,
            "notes": self.notes,
            "backend": search.backend,
            "reranker": search.reranker[0].identity.fingerprint if search.reranker else None,
            "prompt_template": self.reader.template if self.reader else None,
            "system": self.reader.system if self.reader else None,
            "pages": pages,
            "weights": list(answered.weights) if answered else [],
            "result": answered.line if answered else None,
            "seconds": {name: round(value, 4) for name, value in asking.seconds.items()},
        }

    def lend_to_desk(self, k: int) -> None:
        """Let the page desk in this process search this library, until it is closed; k: pages that a search shows."""
        shelf = LibraryShelf(self.found, k)
        self._lent.enter_context(lent(shelf, str(self._store), str(self._index), self._search.by, k))

    def close(self) -> None:
        """Free the answerer."""
        self._lent.close()
        if self.reader is not None:
            self.reader.answerer.close()

    def _state(self) -> tuple[object, ...]:
        """Return what changes whenever another process changes the store or an index."""
        folders = [self._index, *(folder for _, folder in self._search.further)]
        folders += [self._search.reranker[1]] if self._search.reranker else []
        files = [self._store / "pages.parquet", *(folder / "manifest.json" for folder in folders)]
        return tuple(_stamp(file) for file in files)

    def _opened(self) -> Retriever:
        return Retriever(self._store, self._index, self.encoder, self._search, self._filters)

    def _render_settings(self) -> RenderSettings:
        kept = PageStore(self._store).settings() if (self._store / "store.json").exists() else {}
        return RenderSettings(**kept, max_pages=self._settings.max_pages, max_file_mb=self._settings.max_file_mb)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _with_history(question: str, history: Sequence[tuple[str, str]]) -> str:
    """Return a question preceded by the last ones with their answers."""
    if not history:
        return question
    earlier = [f"Earlier question: {asked}\nIts answer: {answer}" for asked, answer in history[-MAX_HISTORY:]]
    return "\n".join([*earlier, f"Question now: {question}"])


def _sorted_out(
    files: Sequence[Path], limits: LibrarySettings, quotas: Quotas
) -> tuple[list[Path], list[tuple[str, str]]]:
    """Return the files that can be added, and the names of the others with the reason, before any is copied."""
    if not 1 <= len(files) <= limits.max_files:
        raise InputError(f"{len(files)} files were given; between 1 and --max-files {limits.max_files} can be added")
    accepted: list[Path] = []
    refused = []
    room = Room()
    for file in files:
        num_bytes, name = file.stat().st_size, _kept_name(file)
        if num_bytes > limits.max_file_mb << 20:
            refused.append((name, f"it has {num_bytes >> 20:,} MiB, more than --max-file-mb {limits.max_file_mb}"))
        elif name in map(_kept_name, accepted):
            refused.append((name, "two of the files have this name; add one after the other, or rename one"))
        elif reason := why_skipped(file):
            refused.append((name, f"{reason}; add PDF, image, office, text, HTML, e-mail or e-book files"))
        elif reason := quotas.refusal(Room(num_bytes), room):
            refused.append((name, reason))
        else:
            accepted.append(file)
            room += Room(num_bytes)
    return accepted, refused


def _kept_name(file: Path) -> str:
    return file.name.lstrip(".") or "document"  # an ingest skips hidden files
