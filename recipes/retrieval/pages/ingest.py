"""Bring a store in line with a folder of documents: new and changed files are rendered, missing ones removed."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from recipes.retrieval.pages.documents import is_office, why_skipped
from recipes.retrieval.pages.settings import DocumentError, RenderSettings
from recipes.retrieval.pages.store import (
    DocumentRow,
    PageStore,
    StoreBusyError,
    StoreError,
    StoreWriteError,
    hash_file,
    shown,
    single_writer,
)
from recipes.retrieval.pages.tasks import RenderTask, split_of, work_on
from recipes.retrieval.pages.workers import TaskResult, no_progress, run_tasks, too_long
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console

log = logging.getLogger(__name__)

COMMIT_EVERY_S = 60.0
MOST_OF_MANY = 20  # losing more than half of a root's documents, and more than these, needs --prune
_OF_THE_STORE = {kind.__name__: kind for kind in (StoreError, StoreBusyError, StoreWriteError)}
"""Errors of a worker that end the ingest."""


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What one ingest did, in documents; num_pages counts all pages of the store.

    num_skipped: files that are not read, such as those of other kinds. num_noted: documents with hidden parts.
    errors: documents without pages, or without some of them.
    """

    num_rendered: int
    num_unchanged: int
    num_removed: int
    num_skipped: int
    num_pages: int
    errors: tuple[DocumentRow, ...]
    num_noted: int = 0


def ingest(
    roots: Sequence[Path],
    out: Path,
    settings: RenderSettings,
    *,
    num_workers: int,
    page_timeout_s: float,
    console: Console,
    prune: bool = False,
    document_timeout_s: float = math.inf,
    checksum: bool = False,
) -> IngestReport:
    """Ingest files and folders (recursively) into the store at `out`.

    A file below these roots that an earlier ingest found and that is missing now is removed. Other roots are kept. A
    file that an earlier ingest found below an outer root keeps its name there. A file that made no progress within the
    same time limit is not read again until it changes.

    prune: remove even all documents of a root, or most of many.

    Raises:
        InputError: a root does not exist, there is no document in the roots, a root has lost all or most of its
            documents, or the disk is full.
    """
    _check_arguments(roots, out, num_workers, page_timeout_s)
    found = {row.path: row for root in roots for row in _walk(root.resolve(), out)}
    store = PageStore.create(out, settings.pixels())
    with single_writer(store.folder):
        PageStore.create(out, settings.pixels())  # another first ingest may have made it meanwhile, with other settings
        before = {row.path: row for row in store.documents()}
        rows = {key: row for key, row in before.items() if not _is_below(key, roots, out)}
        known = {row.root for row in before.values()} | {shown(root.resolve()) for root in roots}
        named = [_named_from_outside(row, known, out) for row in found.values()]
        wanted, skipped = ([row for row in named if bool(row.skipped) is is_skipped] for is_skipped in (False, True))
        if not wanted and len(rows) == len(before):
            raise _no_documents(roots, skipped)
        if not prune:
            _refuse_to_empty([row for key, row in before.items() if key not in rows], wanted)
        documents_before = {key for key, row in before.items() if not row.skipped}
        num_removed = len(documents_before - rows.keys() - {row.path for row in wanted})
        rows |= {row.path: row for row in skipped}
        late = too_long(document_timeout_s), lambda row: no_progress(_timeout_s(row.path, settings, page_timeout_s))
        kept, waiting = _compared(wanted, before, store, late, checksum=checksum)
        rows |= {row.path: row for row in kept}
        errors = [row for row in kept if row.error]  # they still lack some pages, or all
        for row in errors:
            if not row.num_pages:
                console.warning(f"{row.document}: {row.error}; not tried again: the file and the limit are the same")
        num_known = len(errors)
        num_stuck = sum(not row.num_pages for row in errors)
        rendered = _rendered(waiting, store, settings, num_workers, page_timeout_s, document_timeout_s, console)
        for row in _committed(rendered, rows, store):
            if row.error:
                errors.append(row)
                console.warning(f"{row.document}: {row.error}")
        if rows != before or waiting or not store.is_complete():  # else readers need not look again
            store.commit(rows.values())
        store.collect_garbage()
    return IngestReport(
        num_rendered=len(waiting) - sum(not row.num_pages for row in errors[num_known:]),
        num_unchanged=len(wanted) - len(waiting) - num_stuck,
        num_removed=num_removed,
        num_skipped=len(skipped),
        num_noted=sum(bool(rows[row.path].note) for row in wanted),
        num_pages=len(store.page_ids()),
        errors=tuple(errors),
    )


def _committed(
    rendered: Iterable[DocumentRow], rows: dict[bytes, DocumentRow], store: PageStore
) -> Iterator[DocumentRow]:
    """Pass rows on and put them into `rows`, which are committed again and again until all are there."""
    committed = time.monotonic()
    for row in rendered:
        rows[row.path] = row
        yield row
        if time.monotonic() - committed > COMMIT_EVERY_S:
            store.commit(rows.values())
            committed = time.monotonic()


def _rendered(
    waiting: Sequence[DocumentRow],
    store: PageStore,
    settings: RenderSettings,
    num_workers: int,
    page_timeout_s: float,
    document_timeout_s: float,
    console: Console,
) -> Iterator[DocumentRow]:
    """Render documents in worker processes; yield the row of each as it is done."""
    folder = os.fspath(store.folder.absolute())
    tasks = [RenderTask(row.path, folder, settings, num_workers) for row in waiting]
    by_path = {row.path: row for row in waiting}
    with console.phase("documents", total=len(waiting)) as documents, console.phase("pages") as pages:
        results = run_tasks(
            work_on, tasks, num_workers=num_workers,
            timeout_s=lambda task: _timeout_s(task.path, settings, page_timeout_s), on_alive=pages.advance,
            total_s=document_timeout_s, split=split_of,
        )  # fmt: skip
        for result in results:
            yield _row(by_path[result.task.path], result)
            documents.advance()


def _compared(
    wanted: Iterable[DocumentRow],
    before: Mapping[bytes, DocumentRow],
    store: PageStore,
    late: tuple[str, Callable[[DocumentRow], str]],
    *,
    checksum: bool,
) -> tuple[list[DocumentRow], list[DocumentRow]]:
    """Return the rows of files that need not be read again, and of those that must: new, changed, or failed before.

    late: what is said of any document, and of this one, that exceeds the limits of now. checksum: read all files to see
    whether they changed.
    """
    kept, waiting = [], []
    for row in wanted:
        old = before.get(row.path)
        if (
            old is None
            or (old.num_bytes, old.modified_ns) != (row.num_bytes, row.modified_ns)
            or (checksum and old.content and hash_file(Path(os.fsdecode(row.path))) != old.content)
        ):
            waiting.append(row)
        elif (old.num_pages and store.has_content(old.content)) or old.error in (late[0], late[1](row)):
            kept.append(replace(old, root=row.root, document=row.document))
        else:
            waiting.append(row)
    return kept, waiting


def _no_documents(roots: Iterable[Path], skipped: Sequence[DocumentRow]) -> InputError:
    return InputError(
        f"no documents in {', '.join(shown(root) for root in roots)} ({len(skipped)} files of other kinds); "
        "name a folder with PDF, image, office, text or HTML files"
    )


def _refuse_to_empty(before: Iterable[DocumentRow], wanted: Iterable[DocumentRow]) -> None:
    """Refuse to remove all documents of a root, or most of many: the disk may not be mounted.

    Raises:
        InputError: they are gone; names the root and the numbers.
    """
    left, rows = {row.path for row in wanted}, [row for row in before if row.num_pages]
    known, gone = Counter(row.root for row in rows), Counter(row.root for row in rows if row.path not in left)
    for root, count in gone.items():
        if count == known[root] or (count > known[root] / 2 and count > MOST_OF_MANY):
            raise InputError(
                f"{count:,} of the {known[root]:,} documents that the store has from {root} are gone. Mount the disk, "
                "or add --prune to remove them from the store"
            )


def _check_arguments(roots: Sequence[Path], out: Path, num_workers: int, page_timeout_s: float) -> None:
    if num_workers < 1:
        raise InputError(f"--workers must be >= 1, got {num_workers}")
    if not 0 < page_timeout_s < math.inf:
        raise InputError(f"--page-timeout-s must be > 0, got {page_timeout_s:g}")
    for root in roots:
        _check_root(root, out)


def _check_root(root: Path, out: Path) -> None:
    if not root.exists():
        raise InputError(f"{shown(root)} does not exist; name a folder or a file")
    if not root.is_dir() and not root.is_file():
        raise InputError(f"{shown(root)} is neither a folder nor a regular file (a pipe, a device)")
    if (out / "pages").resolve() in (root.resolve() / "pages", *root.resolve().parents, root.resolve()):
        raise InputError(f"{shown(root)} is the store itself; name the folder of the documents")


def _timeout_s(path: bytes, settings: RenderSettings, page_timeout_s: float) -> float:
    """Return how long a document may make no progress; LibreOffice reports none while it converts."""
    return page_timeout_s + (settings.office_timeout_s if is_office(Path(os.fsdecode(path))) else 0)


def _is_below(path: bytes, roots: Iterable[Path], out: Path) -> bool:
    """Whether an ingest of these roots finds a file: it is one of them or below one, and not within the store."""
    file, store = Path(os.fsdecode(path)), out.resolve()
    for root in (root.resolve() for root in roots):
        if root == file or (root in file.parents and (store not in file.parents or root not in store.parents)):
            return True
    return False


def _named_from_outside(row: DocumentRow, roots: Iterable[str], out: Path) -> DocumentRow:
    """Return a row named from the outermost known root, so that a folder within it does not change its names."""
    file, store = Path(os.fsdecode(row.path)), out.resolve()
    outer = [Path(root) for root in roots if f"{row.root}/".startswith(f"{root}/") and root != row.root]
    outer = [root for root in outer if store not in file.parents or root not in store.parents]
    if not outer:
        return row
    root = min(outer, key=lambda path: len(path.parts))
    return replace(row, root=str(root), document=shown(file).removeprefix(f"{root}/"))


def _walk(root: Path, out: Path) -> Iterator[DocumentRow]:
    """Yield a row for everything below a root, sorted, except the store; what is not read has the reason as `skipped`.

    Links to files are followed, links to folders are not, because they may form a cycle. A hidden folder is one row.

    Raises:
        InputError: a folder cannot be read; continuing would remove its documents.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"the folder {shown(error.filename)} cannot be read: {os.strerror(error.errno or 0)}")

    def row_of(path: Path, skipped: str = "") -> DocumentRow:
        name, status = shown(path.relative_to(root)), path.lstat() if skipped else path.stat()
        size = (0, 0) if skipped else (status.st_size, status.st_mtime_ns)
        return DocumentRow(shown(root), name, os.fsencode(path), "", *size, num_pages=0, error="", skipped=skipped)

    if root.is_file():
        row = replace(row_of(root), document=shown(root.name))
        yield replace(row, skipped=why_skipped(root))
        return
    for folder, folders, names in os.walk(root, onerror=refuse):
        inside = [Path(folder, name) for name in sorted(folders) if Path(folder, name).resolve() != out.resolve()]
        for path in inside:
            if path.is_symlink():
                log.warning("%s is a link to a folder and is not followed; name its target", shown(path))
                yield row_of(path, "a link to a folder is not followed; name its target")
            elif path.name.startswith("."):
                yield row_of(path, "a hidden folder is not read")
        folders[:] = [path.name for path in inside if not path.name.startswith(".")]
        for path in (Path(folder, name) for name in sorted(names)):
            try:
                reason = _why_not_a_file(path) or why_skipped(path)
                yield row_of(path, reason)
            except FileNotFoundError:  # it has disappeared since it was found
                continue


def _why_not_a_file(path: Path) -> str:
    """Return why a name in a folder is not a file that is read; "" if it is one."""
    if path.name.startswith("."):
        return "a hidden file is not read"
    if path.is_file():
        return ""
    return (
        "the link leads nowhere" if path.is_symlink() and not path.exists() else "not a regular file (a pipe, a device)"
    )


def _row(row: DocumentRow, result: TaskResult) -> DocumentRow:
    if result.error_type in _OF_THE_STORE:
        raise _OF_THE_STORE[result.error_type](result.error)
    if result.error or result.died:
        kind = "" if result.error_type == DocumentError.__name__ else f"{result.error_type}: "
        reason = result.died or f"{kind}{result.error}"
        return replace(row, error=reason.encode("utf-8", "backslashreplace").decode())
    content, num_pages, fault, note = result.value
    return replace(row, content=content, num_pages=num_pages, error=fault, note=note)
