"""`recipes.retrieve sync`: ingest what has changed and bring the indexes in line, once or with every change."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from recipes.answers.options import add_options, chosen
from recipes.retrieval.command_line import add_encoder, add_search_options, index_folder, open_encoder, search_settings
from recipes.retrieval.encoders.base import PageEncoder
from recipes.retrieval.pages.catalogue import UPLOADS, remove_documents
from recipes.retrieval.pages.ingest import IngestReport, ingest
from recipes.retrieval.pages.settings import RenderSettings
from recipes.retrieval.pages.store import PageStore
from recipes.retrieval.search.retriever import SearchSettings
from recipes.retrieval.search.sync import bring_in_line
from rsgrpo.errors import InputError, RsgrpoError
from rsgrpo.records.console import Console


def add_sync_command(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.description = (
        "Ingest what has changed below DOCS and bring the store's indexes in line. Without DOCS, the folders that the "
        "store knows. With --watch, again whenever something changes, until Ctrl-C. A running app follows by itself."
    )
    command.add_argument("documents", nargs="*", type=Path, metavar="DOCS", help="folders (recursively) or files")
    add_encoder(command)
    add_search_options(command)
    add_options(command, RenderSettings)
    command.add_argument("--page-timeout-s", type=float, default=120.0, help="a document without progress is abandoned")
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that render pages")
    command.add_argument(
        "--prune", action="store_true",
        help="remove even all or most documents of a folder, and folders that the store knows and that are gone",
    )  # fmt: skip
    command.add_argument("--watch", action="store_true", help="look for changes until Ctrl-C")
    command.add_argument("--every-s", type=float, default=5.0, help="seconds between looks")
    command.set_defaults(run=_sync)


def _sync(options: argparse.Namespace) -> None:
    store, search = Path(options.store), search_settings(options)
    if options.prune and not options.documents:
        remove_gone_roots(store)
    roots = options.documents or known_roots(store)
    if not roots:
        raise InputError(f"{store} knows no folders yet; name those of the documents in front of it")
    if options.every_s <= 0:
        raise InputError(f"--every-s must be > 0, got {options.every_s:g}")
    encoder: PageEncoder | None = None
    if search.by == "words":
        with_index = False
    elif options.model or index_folder(options).exists():
        encoder, with_index = open_encoder(options), True
    else:
        with_index = False
    settings = chosen(RenderSettings, options, **_kept_settings(store))
    with Console() as console:
        if not with_index and search.by != "words":
            console.warning(f"there is no index {index_folder(options)} yet; name an encoder with --model to make one")

        def work() -> None:
            report = ingest(
                roots, store, settings, num_workers=options.workers, page_timeout_s=options.page_timeout_s,
                console=console, prune=options.prune,
            )  # fmt: skip
            changed = report.num_rendered or report.num_removed
            told = sync_indexes(store, index_folder(options), encoder, search, console)
            if changed or told or not options.watch:
                console.info("; ".join([_said(report), *told]))

        if options.watch:
            watch(roots, store, work, options.every_s, console)
        else:
            work()


def sync_indexes(
    store: Path, index: Path, encoder: PageEncoder | None, search: SearchSettings, console: Console
) -> list[str]:
    """Bring the indexes in line; return what changed, in words."""
    reports = bring_in_line(store, index, encoder, search, console)
    return [
        f"{name}: {report.num_added} pages added, {report.num_deleted} deleted, {report.num_pages} in all"
        for name, report in reports.items()
        if report.num_added or report.num_deleted
    ]


def known_roots(store: Path) -> list[Path]:
    """Return the folders that a store knows and that still exist, without that of its uploads."""
    if not (store / "store.json").exists():
        return []
    roots = sorted({Path(row.root) for row in PageStore.open(store).documents()})
    return [root for root in roots if root.exists() and root != (store / UPLOADS).resolve()]


def remove_gone_roots(store: Path) -> None:
    """Take the documents of folders that no longer exist out of a store."""
    rows = PageStore.open(store).documents() if (store / "store.json").exists() else []
    uploads = str((store / UPLOADS).resolve())
    gone = sorted({row.root for row in rows if row.root != uploads and not Path(row.root).exists()})
    if gone:
        remove_documents(PageStore.open(store), gone)


def _kept_settings(store: Path) -> dict[str, object]:
    return dict(PageStore(store).settings()) if (store / "store.json").exists() else {}


def _said(report: IngestReport) -> str:
    errors = f", {len(report.errors)} with errors (list --errors)" if report.errors else ""
    return (
        f"{report.num_rendered} documents rendered, {report.num_unchanged} unchanged, {report.num_removed} removed"
        f"{errors}, {report.num_pages} pages"
    )


def watch(
    roots: Sequence[Path], store: Path, work: Callable[[], None], every_s: float, console: Console,
    sleep: Callable[[float], None] = time.sleep,
) -> None:  # fmt: skip
    """Do the work now, and again whenever the files below the roots have changed and then stayed the same for one look.

    Work that fails is reported and tried again at the next look.
    """
    console.info(f"watching {', '.join(map(str, roots))} (Ctrl-C to stop)")
    done: frozenset[tuple[str, int, int]] | None = None
    before = None
    while True:
        now = frozenset(_states(roots, store))
        if now != done and (done is None or now == before):
            try:
                work()
                done = now
            except RsgrpoError as error:
                console.warning(f"{error}; tried again in {every_s:g} s")
        before = now
        sleep(every_s)


def _states(roots: Sequence[Path], store: Path) -> Iterator[tuple[str, int, int]]:
    """Yield path, size and time of change of every file below the roots, except the store."""
    pending = [os.fspath(root) for root in roots]
    inside = store.resolve()
    while pending:
        path = pending.pop()
        try:
            status = os.stat(path)
            if os.path.isdir(path):
                with os.scandir(path) as entries:
                    pending += [
                        entry.path
                        for entry in entries
                        if not entry.name.startswith(".")
                        and not (entry.is_dir() and (entry.is_symlink() or Path(entry.path).resolve() == inside))
                    ]
            else:
                yield path, status.st_size, status.st_mtime_ns
        except OSError:  # it has just disappeared, or cannot be read: the work says so
            yield path, -1, -1
