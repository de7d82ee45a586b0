"""A store that receives documents and answers questions, for `recipes.app` and `recipes.retrieve serve`."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from recipes.answers.options import check_options
from recipes.answers.reader import Reader
from recipes.retrieval.answers.adding import Report, ReportingConsole
from recipes.retrieval.answers.at_desk import LibraryShelf, look_up
from recipes.retrieval.answers.evidence import cited_pages
from recipes.retrieval.answers.generation import (
    Answered,
    AskedQuestion,
    Setting,
    answer_stream,
    check_question,
    with_history,
)
from recipes.retrieval.answers.highlight import Box
from recipes.retrieval.answers.progress import AnswerProgress, trace_of
from recipes.retrieval.answers.told_boxes import marks_of
from recipes.retrieval.answers.turns import Turns
from recipes.retrieval.answers.uploads import Quota, Quotas, Room, fitting, kept_name, sorted_out, taken_below
from recipes.retrieval.desk.shelf import lent
from recipes.retrieval.encoders.base import PageEncoder
from recipes.retrieval.pages.catalogue import UPLOADS, Removal, remove_documents
from recipes.retrieval.pages.ingest import ingest
from recipes.retrieval.pages.settings import RenderSettings
from recipes.retrieval.pages.store import DocumentRow, Page, PageStore, StoreBusyError, shown, writing
from recipes.retrieval.search.found import NO_PAGES, FoundPage, why_nothing
from recipes.retrieval.search.index import IndexFault, VectorIndex
from recipes.retrieval.search.keep import NO_FILTERS, Filters
from recipes.retrieval.search.retriever import EXACT, Retriever, SearchSettings
from recipes.retrieval.search.sync import bring_in_line
from rollout.files import replaced, stamp
from rollout.keys import key
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console

T = TypeVar("T")
PAGE_TIMEOUT_S = 120.0
WAIT_S = 5.0  # of a question for pages that another one is encoding
LINKED = (".pdf", ".png", ".jpg", ".jpeg")  # kinds that are linked to


@dataclass(frozen=True, slots=True)
class LibrarySettings:
    """Limits on what is added, and whether indexes follow the store."""

    max_files: int = key(100, "files that can be added at once", ge=1)
    max_file_mb: int = key(100, "larger files cannot be added", ge=1)
    max_pages: int = key(2_000, "documents with more pages cannot be added", ge=1)
    max_added_mb: int = key(50_000, "room for all files that were added and their pages", ge=1)
    max_added_pages: int = key(200_000, "pages of all files that were added", ge=1)
    workers: int = key(os.cpu_count() or 1, "processes that render pages", ge=1)
    link_originals: bool = key(
        False, "link found pages to their PDF or image in the folders that were ingested, too, and serve those files"
    )
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
    answers unless the answerer is concurrent (an endpoint). While documents are added, rendered and encoded, questions
    are answered from those that were there before. What other processes do to the store is noticed at the next
    question, which encodes new pages; others wait for it, but not for long.
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
        self._lent = ExitStack()
        self._changing = threading.RLock()  # documents and indexes
        self._is_adding = False
        self._searching = Turns()  # or encoding a few pages
        self._answering = nullcontext() if reader is None or reader.answerer.is_concurrent else threading.Lock()
        if self._has_pages:
            self.refresh()
        elif store.exists() and not (store / "store.json").exists() and (not store.is_dir() or any(store.iterdir())):
            raise InputError(f"{store} is neither a page store nor an empty folder; choose another one")

    @property
    def num_pages(self) -> int:
        """How many pages can be found."""
        return self._retriever.num_pages if self._retriever else 0

    @property
    def _has_pages(self) -> bool:
        """Whether the store has ever been committed, so that it can be opened."""
        return (self._store / "pages.parquet").exists()

    @property
    def pages_folder(self) -> Path:
        """Where all page images are."""
        return (self._store / "pages").absolute()

    @property
    def uploads_folder(self) -> Path:
        """Where copies of added documents are."""
        return (self._store / UPLOADS).absolute()

    def source_of(self, page: FoundPage) -> Path | None:
        """Return the PDF or image of a found page, if it was added here or --link-originals allows others; else None.

        Other kinds are not linked, because a browser might run what is in them.
        """
        root = Path(page.root)
        if not (self._settings.link_originals or root == self.uploads_folder.resolve()):
            return None
        file = (root if root.is_file() else root / page.document).resolve()
        is_inside = file.is_relative_to(root.resolve())  # a link may lead elsewhere
        return file if is_inside and file.suffix.lower() in LINKED and file.is_file() else None

    def image_of(self, page_id: str) -> Path | None:
        """Return the image of a page of the store; None if there is no such page."""
        if not self._has_pages:
            return None
        page = PageStore.open(self._store).find([page_id]).get(page_id)
        return None if page is None else Path(page.image)

    def refresh(self) -> None:
        """Follow what has happened to the store since the last call: update the indexes and open them again.

        While another thread adds documents, or does this for over WAIT_S, what was there before is searched. While
        another process writes to an index, the pages that it has already are searched, and `notes` says so.

        Raises:
            InputError: the store cannot be read, or another encoder made an index.
        """
        wait_s = -1 if self._retriever is None else 0 if self._is_adding else WAIT_S
        if not self._changing.acquire(blocking=wait_s != 0, timeout=wait_s or -1):
            return
        try:
            self._follow(self._console)
        finally:
            self._changing.release()

    def _follow(self, console: Console) -> None:
        if self._seen == (seen := self._state()) or not self._has_pages:
            return
        if not self._settings.no_sync:
            try:
                bring_in_line(self._store, self._index, self.encoder, self._search, console, turn=self._searching)
            except StoreBusyError as error:
                console.warning(f"{error}; the indexes stay behind until then")
            seen = self._state()
        has_index = self._search.by == "words" or len(VectorIndex.open(self._index)) > 0
        opened = self._opened() if has_index else None
        with self._searching:
            self._retriever = opened
        self._seen = seen if opened is None or not opened.lags or self._settings.no_sync else None

    @property
    def notes(self) -> list[str]:
        """What the user should know of the indexes."""
        return [str(lag) for lag in self._retriever.lags] if self._retriever else []

    @property
    def _why_nothing(self) -> str:
        return why_nothing(PageStore.open(self._store)) if self._has_pages else NO_PAGES

    def documents(self) -> list[DocumentRow]:
        """Return the catalogue without files that are not read; empty without a store."""
        if not self._has_pages:
            return []
        return [row for row in PageStore.open(self._store).documents() if not row.skipped]

    def add(
        self, files: Sequence[Path], visit: Quota | None = None, report: Report = lambda said, share: None
    ) -> Added:
        """Copy files into the store, render them and encode their pages; a file of the same name is replaced.

        A file that cannot be added is refused by itself; one that has no page that can be rendered is not kept.

        visit: what whoever adds them may add, beside what the store may hold. report: is told how far the work is.

        Raises:
            InputError: there are no files or too many, none can be added, or the disk is full.
        """
        limits, console = self._settings, ReportingConsole(self._console, report)
        with self._changing, self._added():
            quotas = Quotas(self._quota(), *([visit] if visit else []))
            accepted, refused = sorted_out(files, limits.max_files, limits.max_file_mb, quotas)
            if not accepted:
                raise InputError("; ".join(f"{name}: {reason}" for name, reason in refused))
            render = self._render_settings()
            bounds = quotas.bounds(render, len(accepted))
            PageStore.create(self._store, render.pixels())
            uploads = self._store / UPLOADS
            with writing(uploads):
                uploads.mkdir(exist_ok=True)
                for file in accepted:
                    with replaced(uploads / kept_name(file)) as unfinished:  # hidden: an ingest skips it
                        shutil.copyfile(file, unfinished)
            ingested = ingest(
                [uploads], self._store, replace(render, **bounds), num_workers=limits.workers,
                page_timeout_s=PAGE_TIMEOUT_S, console=console, prune=True,  # a file that cannot be read goes
            )  # fmt: skip
            names = {shown(kept_name(file)) for file in accepted}
            faulty = [row for row in ingested.errors if row.document in names]
            refused += [(row.document, quotas.explained(row.error, bounds, render)) for row in faulty]
            lost = [f"{row.root}/{row.document}" for row in faulty if not row.num_pages]
            room, beyond = fitting(self._store, self.uploads_folder, names, quotas)
            refused += beyond.items()
            lost += [f"{shown(uploads.resolve())}/{name}" for name in beyond]
            if lost:
                remove_documents(PageStore.open(self._store), lost)
            self._follow(console)
        return Added(len(accepted) - len(lost), tuple(refused), room)

    def _quota(self) -> Quota:
        """Return what added documents may take, and what they take now."""
        taken = taken_below(self._store, self.uploads_folder)
        return Quota("--max-added", self._settings.max_added_mb, self._settings.max_added_pages, taken)

    @contextmanager
    def _added(self) -> Iterator[None]:
        """Let questions pass while documents are added."""
        self._is_adding = True
        try:
            yield
        finally:
            self._is_adding = False

    def remove(self, documents: Sequence[str]) -> Removal:
        """Take documents out of the store and of the indexes; InputError if one is not there."""
        with self._changing:
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
            InputError: the question is empty or too long, or there is no page; says why.
            RsgrpoError: the answerer fails.
        """
        check_question(question)
        start = time.monotonic()
        if self.at_desk and self.reader is not None:
            yield from self._look_up(question, history, self.reader, start)
            return
        found, maps, why_none = self._searched(lambda retriever: retriever.search_with_maps(question, k))
        seconds = {"retrieval": time.monotonic() - start}
        notes = (*self.notes, *filter(None, [why_none]))
        progress = AnswerProgress(question, setting, tuple(found), "", None, seconds, notes=notes, maps=maps)
        yield progress
        if self.reader is None:
            return
        if why_none:
            raise InputError(why_none)
        asked = AskedQuestion("question", with_history(question, history), progress.pages)
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
            raise InputError(self._why_nothing)
        with self._answering, closing(look_up(with_history(question, history), reader, self._pages)) as visit:
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
        assert self.reader is not None
        return {source.page.page_id: marks_of(source.page, source.text, documents, self.reader) for source in cited}

    def found(self, question: str, k: int) -> list[FoundPage]:
        """Return the distinct pages of a question, best first, over the documents of this moment.

        Raises:
            InputError: there are no pages, or the question cannot be searched.
        """
        return self._searched(lambda retriever: retriever.search([question], k, distinct=True)[0])

    def _searched(self, search: Callable[[Retriever], T]) -> T:
        """Search the documents of this moment."""
        for is_last in (False, True):
            self.refresh()
            with self._searching:
                retriever = self._retriever
                if retriever is None or not self.num_pages:
                    raise InputError(self._why_nothing)
                try:
                    return search(retriever)
                except IndexFault:  # another process has replaced it since it was opened
                    if is_last:
                        raise
                    self._seen = None
        raise AssertionError("unreachable")

    def trace(self, asking: AnswerProgress) -> dict[str, Any]:
        """Return everything about a question as JSON: the pages, the prompt and the answer, if there is one."""
        return trace_of(asking, self._store, self.encoder, self._search, self.reader, self.notes)

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
        return tuple(map(stamp, files))

    def _opened(self) -> Retriever:
        return Retriever(self._store, self._index, self.encoder, self._search, self._filters)

    def _render_settings(self) -> RenderSettings:
        kept = PageStore(self._store).settings() if (self._store / "store.json").exists() else {}
        return RenderSettings(**kept, max_pages=self._settings.max_pages, max_file_mb=self._settings.max_file_mb)
