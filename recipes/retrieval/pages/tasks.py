"""What a worker of an ingest does with one document: all of it, or some pages of a large PDF.

A PDF of many pages is split, so that several workers render it at once. They write into one folder, where each page
that is finished is recorded; the last step finds all pages there and completes the folder. So the images, their order
and the record are those of a single worker, and whoever dies leaves the finished pages to the next ingest.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from recipes.retrieval.pages.documents import (
    RenderedPage,
    limit_memory,
    num_pdf_pages,
    render,
    render_some,
)
from recipes.retrieval.pages.settings import DocumentError, RenderSettings
from recipes.retrieval.pages.store import PageStore, hash_file, writing
from recipes.retrieval.pages.workers import Split

MAX_WARNINGS = 3  # of libraries, kept per document
MIN_PART_PAGES = 16  # opening a PDF once more costs less than rendering these
PARTS_PER_WORKER = 4  # so that no worker is idle for long at the end
CHANGED = "the file changed while it was read; run the same command again"
_FOLDERS = itertools.count()  # of contents that this process has begun

Rendered = tuple[str, int, str, str]
"""The content's hash, its number of pages, which pages could not be rendered, and what is on no page."""


Large = dict[str, Any]
"""The `content` hash and `num_pages` of a PDF that is to be split."""


@dataclass(frozen=True, slots=True)
class RenderTask:
    """One file for a worker, and the store that receives its pages.

    num_workers: that may share the pages of a PDF. begun: folder that has the pages of all parts; "" before.
    content: hash of the file when it was split.
    """

    path: bytes
    store: str
    settings: RenderSettings
    num_workers: int = 1
    begun: str = ""
    content: str = ""


@dataclass(frozen=True, slots=True)
class PartTask:
    """Pages `first` to `last` of a PDF, to be written into `folder`."""

    path: bytes
    folder: str
    settings: RenderSettings
    first: int
    last: int


def work_on(task: RenderTask | PartTask, alive: Callable[[], None]) -> Rendered | Large | None:
    """Do a task, in a worker."""
    limit_memory()
    if isinstance(task, PartTask):
        render_part(task, alive)
        return None
    return render_document(task, alive)


def render_part(task: PartTask, alive: Callable[[], None]) -> None:
    """Render some pages of a PDF into the folder that its other parts write into, too."""
    numbers = range(task.first, task.last + 1)
    with writing(Path(task.folder)), _bounded():
        render_some(Path(os.fsdecode(task.path)), Path(task.folder), task.settings, numbers, alive)


def render_document(task: RenderTask, alive: Callable[[], None]) -> Rendered | Large:
    """Hash and render one document; pages that exist already are not rendered again."""
    store, path = PageStore(Path(task.store)), Path(os.fsdecode(task.path))
    try:
        content = hash_file(path)
    except OSError as error:
        raise DocumentError(f"the file cannot be read: {os.strerror(error.errno or 0)}") from error
    if task.content not in ("", content):
        raise DocumentError(CHANGED)
    if store.has_content(content):
        record = store.record(content)
        return content, len(record["pages"]), record["error"], record.get("note", "")
    final = store.content_folder(content)
    with writing(store.folder):
        if num_pages := _is_large(path, task):
            return {"content": content, "num_pages": num_pages}
        with content_writer(final, Path(task.begun) if task.begun else None) as folder:
            pages, fault, note = _render(path, folder, task.settings, alive)
            if hash_file(path) != content:
                raise DocumentError(CHANGED)
            record = {"pages": [asdict(page) for page in pages], "error": fault, "note": note}
            (folder / "pages.json").write_text(json.dumps(record))
    return content, len(pages), fault, note


def _render(
    path: Path, folder: Path, settings: RenderSettings, alive: Callable[[], None]
) -> tuple[list[RenderedPage], str, str]:
    """Render a document; what libraries warn of becomes a part of its note."""
    with _bounded(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # beyond it there is an error
        pages, fault, note = render(path, folder, settings, alive)
    doubts = list(dict.fromkeys(str(warning.message) for warning in said))
    return pages, fault, "; ".join([*([note] if note else []), *doubts[:MAX_WARNINGS]])


@contextmanager
def _bounded() -> Iterator[None]:
    """Turn the end of a worker's memory into the error of its document."""
    try:
        yield
    except MemoryError as error:
        raise DocumentError("it needs more memory than a document may take") from error


def _is_large(path: Path, task: RenderTask) -> int:
    """Return the number of pages of a PDF that several workers are to share; 0 for what is done at once."""
    num_pages = num_pdf_pages(path, task.settings) if task.num_workers > 1 and not task.begun else 0
    return num_pages if num_pages > MIN_PART_PAGES else 0


def split_of(task: Any, value: Any) -> Split | None:
    """Return the parts of a PDF of which a worker has said that it is large; None if the value is another result.

    It runs in the process of the ingest, which does not trust its workers.

    Raises:
        ValueError: the value is neither.
    """
    if not isinstance(value, dict):
        return None
    content, num_pages = value.get("content"), value.get("num_pages")
    if not isinstance(content, str) or not re.fullmatch("[0-9a-f]{64}", content):
        raise ValueError("a hash")
    if not isinstance(num_pages, int) or not MIN_PART_PAGES < num_pages <= task.settings.max_pages:
        raise ValueError("a number of pages")
    size = max(MIN_PART_PAGES, -(-num_pages // (PARTS_PER_WORKER * task.num_workers)))
    folder = os.fspath(unfinished_folder(PageStore(Path(task.store)).content_folder(content), os.getpid()))
    parts = [
        PartTask(task.path, folder, task.settings, first, min(first + size - 1, num_pages))
        for first in range(1, num_pages + 1, size)
    ]
    return Split(tuple(parts), replace(task, begun=folder, content=content))


def unfinished_folder(final: Path, ingest: int) -> Path:
    """Return a folder for one content's pages: that of an ingest that died, with its finished pages, or a new one.

    Only one ingest works on a store at a time, so that a folder of another one is not in use.

    ingest: id of the process that does it.
    """
    own = f".{final.name}.{ingest}-"
    temporary = final.with_name(f"{own}{os.getpid()}-{next(_FOLDERS)}")
    for left in sorted(final.parent.glob(f".{final.name}.*")):
        if not left.name.startswith(own):
            os.rename(left, temporary)
            break
    temporary.mkdir(parents=True, exist_ok=True)
    return temporary


@contextmanager
def content_writer(final: Path, begun: Path | None = None) -> Iterator[Path]:
    """Yield a folder for one content's pages; it gets its name when the block ends without an error.

    Args:
        begun: what `unfinished_folder` returned; by default it is called here.
    """
    temporary = begun or unfinished_folder(final, os.getppid())
    try:
        yield temporary
        try:
            os.rename(temporary, final)
        except OSError:
            if not final.exists():  # else two files with the same bytes were rendered side by side
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
