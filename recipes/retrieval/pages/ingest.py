"""Bring a store in line with a folder of documents: new and changed files are rendered, missing ones removed."""

from __future__ import annotations

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL import Image

from recipes.retrieval.pages.documents import DocumentError, RenderSettings, is_candidate, limit_memory, render
from recipes.retrieval.pages.store import (
    DocumentRow,
    PageStore,
    StoreError,
    content_writer,
    hash_file,
    shown,
    single_writer,
    writing,
)
from recipes.retrieval.pages.workers import TaskResult, run_tasks
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console

log = logging.getLogger(__name__)

COMMIT_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What one ingest did, in documents; num_pages counts all pages of the store."""

    num_rendered: int
    num_unchanged: int
    num_removed: int
    num_skipped: int
    num_pages: int
    errors: tuple[DocumentRow, ...]


@dataclass(frozen=True, slots=True)
class RenderTask:
    """One file for a worker, and the store that receives its pages."""

    path: bytes
    store: str
    settings: RenderSettings


def ingest(
    roots: Sequence[Path],
    out: Path,
    settings: RenderSettings,
    *,
    num_workers: int,
    page_timeout_s: float,
    console: Console,
) -> IngestReport:
    """Ingest files and folders (recursively) into the store at `out`.

    A file that an earlier ingest of the same root found and that is missing now is removed. Other roots are kept.

    Raises:
        InputError: a root does not exist, there is no document in the roots, or the disk is full.
    """
    if num_workers < 1:
        raise InputError(f"--workers must be >= 1, got {num_workers}")
    if not 0 < page_timeout_s < math.inf:
        raise InputError(f"--page-timeout-s must be > 0, got {page_timeout_s:g}")
    for root in roots:
        _check_root(root, out)
    found = [(shown(root.resolve()), path, name) for root in roots for path, name in _walk(root, out)]
    candidates = [entry for entry in found if is_candidate(entry[1])]
    store = PageStore.create(out, settings.pixels())
    with single_writer(store.folder):
        named = {shown(root.resolve()) for root in roots}
        before = {row.path: row for row in store.documents()}
        rows = {key: row for key, row in before.items() if row.root not in named}
        if not candidates and len(rows) == len(before):
            raise InputError(
                f"no documents in {', '.join(shown(root) for root in roots)} ({len(found)} files of other kinds); "
                "name a folder with PDF, image, office, text or HTML files"
            )
        wanted = [row for entry in candidates if (row := _file_row(*entry)) is not None]
        num_removed = len(before.keys() - rows.keys() - {row.path for row in wanted})
        waiting = []
        for row in wanted:
            old = before.get(row.path)  # read again if it has changed or had an error
            same = old is not None and (old.num_bytes, old.modified_ns) == (row.num_bytes, row.modified_ns)
            if old is not None and same and not old.error and store.has_content(old.content):
                rows[row.path] = replace(old, root=row.root, document=row.document)
            else:
                waiting.append(row)
        tasks = [RenderTask(row.path, os.fspath(store.folder.absolute()), settings) for row in waiting]
        committed = time.monotonic()
        errors = []
        with console.phase("documents", total=len(waiting)) as documents, console.phase("pages") as pages:
            results = run_tasks(
                render_document, tasks, num_workers=min(num_workers, len(tasks)),
                timeout_s=page_timeout_s + settings.office_timeout_s, on_alive=pages.advance,
            )  # fmt: skip
            by_path = {row.path: row for row in waiting}
            for result in results:
                row = _row(by_path[result.task.path], result)
                rows[row.path] = row
                if row.error:
                    errors.append(row)
                    console.warning(f"{row.document}: {row.error}")
                documents.advance()
                if time.monotonic() - committed > COMMIT_EVERY_S:
                    store.commit(rows.values())
                    committed = time.monotonic()
        store.commit(rows.values())
        store.collect_garbage()
    return IngestReport(
        num_rendered=len(waiting) - sum(not row.num_pages for row in errors),
        num_unchanged=len(wanted) - len(waiting),
        num_removed=num_removed,
        num_skipped=len(found) - len(candidates),
        num_pages=len(store.page_ids()),
        errors=tuple(errors),
    )


def _check_root(root: Path, out: Path) -> None:
    if not root.exists():
        raise InputError(f"{shown(root)} does not exist; name a folder or a file")
    if not root.is_dir() and not root.is_file():
        raise InputError(f"{shown(root)} is neither a folder nor a regular file (a pipe, a device)")
    if (out / "pages").resolve() in (root.resolve() / "pages", *root.resolve().parents, root.resolve()):
        raise InputError(f"{shown(root)} is the store itself; name the folder of the documents")


def _file_row(root: str, path: Path, name: str) -> DocumentRow | None:
    """Return what is known of a file without reading it; None if it has disappeared since it was found."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return DocumentRow(root, name, os.fsencode(path), "", status.st_size, status.st_mtime_ns, 0, "")


def _walk(root: Path, out: Path) -> Iterator[tuple[Path, str]]:
    """Yield every regular file below a root with its name there, sorted, except hidden files and the store.

    Links to files are followed, links to folders are not, because they may form a cycle.

    Raises:
        InputError: a folder cannot be read; continuing would remove its documents.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"the folder {shown(error.filename)} cannot be read: {os.strerror(error.errno or 0)}")

    root = root.resolve()
    if root.is_file():
        yield root, shown(root.name)
        return
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and Path(folder, name).resolve() != out.resolve()
        )
        for name in folders:
            if Path(folder, name).is_symlink():
                log.warning("%s is a link to a folder and is not followed; name its target", shown(Path(folder, name)))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path, shown(path.relative_to(root))


def _row(row: DocumentRow, result: TaskResult) -> DocumentRow:
    if isinstance(result.error, StoreError):
        raise result.error
    if result.error is not None or result.died:
        kind = "" if isinstance(result.error, DocumentError) else f"{type(result.error).__name__}: "
        reason = result.died or f"{kind}{result.error}"
        return replace(row, error=reason.encode("utf-8", "backslashreplace").decode())
    content, num_pages, fault = result.value
    return replace(row, content=content, num_pages=num_pages, error=fault)


def render_document(task: RenderTask, alive: Callable[[], None]) -> tuple[str, int, str]:
    """Hash and render one document, in a worker; pages that exist already are not rendered again.

    Returns:
        The content's hash, its number of pages, and which pages could not be rendered.
    """
    limit_memory()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # beyond it an error becomes a row of the catalogue
    store, path = PageStore(Path(task.store)), Path(os.fsdecode(task.path))
    try:
        content = hash_file(path)
    except OSError as error:
        raise DocumentError(f"the file cannot be read: {os.strerror(error.errno or 0)}") from error
    if store.has_content(content):
        record = store.record(content)
        return content, len(record["pages"]), record["error"]
    with writing(store.folder), content_writer(store.content_folder(content)) as folder:
        try:
            pages, fault = render(path, folder, task.settings, alive)
        except MemoryError as error:
            raise DocumentError("it needs more memory than a document may take") from error
        if hash_file(path) != content:
            raise DocumentError("the file changed while it was read; run the same command again")
        record = {"pages": [asdict(page) for page in pages], "error": fault}
        (folder / "pages.json").write_text(json.dumps(record))
    return content, len(pages), fault
