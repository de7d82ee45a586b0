"""A store of pages on disk: page images by content hash, and the catalogue of documents and pages.

    STORE/store.json           format and the settings that decide a page's pixels
    STORE/pages/ab/abcd.../    one document's content: 00001.png, ..., pages.json; complete or absent
    STORE/documents.parquet    one row per file, with its error if it has one
    STORE/pages.parquet        one row per page; what readers read

A content folder is renamed into place when it is complete, and each table is replaced in one step, so a process that
dies at any point leaves a store that the next command continues with.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.files import replaced, write_text
from rsgrpo.errors import RUN_ERROR, InputError

log = logging.getLogger(__name__)

FORMAT = 1
ID_CHARACTERS = 16  # of the content's sha256, in a page id
_ROW_GROUP = 4096
_OURS = re.compile(r"\.?[0-9a-f]{64}.*|\.rsgrpo-office-.*")  # a content's folder, whole or not, and LibreOffice's
_IMAGE = re.compile(r"pages/[0-9a-f]{2}/[0-9a-f]{64}/\d+\.\w+")
_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Make room") | dict.fromkeys(
    (errno.EROFS, errno.EACCES, errno.EPERM), "Make it writable"
)


class StoreError(InputError):
    """The store cannot be opened or written; everything finished before is intact."""


class StoreBusyError(StoreError):
    """Another process writes to it."""


class StoreWriteError(StoreError):
    """The disk refused a write in the middle of the work."""

    exit_code = RUN_ERROR


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """One file of the catalogue.

    root, document: the ingested folder and the file's path in it, as text (bytes that are not UTF-8 escaped).
    path: the file's own path, as bytes. content: sha256 of its bytes, "" while unknown.
    num_bytes, modified_ns: show that a file is unchanged without reading it.
    error: why it has no pages, or which pages it lacks; "" if there is no error.
    note: what of the file is on no page, such as hidden slides; "" for nothing.
    skipped: why the file is not read at all, such as its kind; "" for a document.
    """

    root: str
    document: str
    path: bytes
    content: str
    num_bytes: int
    modified_ns: int
    num_pages: int
    error: str
    note: str = ""
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """One page of the catalogue.

    page_id: from the content's hash and the page's number, so that it survives renames. document: the first of the
    files with this content. number: from 1. image: absolute path. text: the text layer of a PDF, "" elsewhere.
    root: the folder that was ingested. copies: names of the other files with this content, with their root where it is
    another one. label: what the document itself calls the page, such as "printed iv" or "slide 3"; "" if that is its
    number.
    """

    page_id: str
    document: str
    number: int
    image: str
    width: int
    height: int
    text: str
    root: str = ""
    copies: tuple[str, ...] = ()
    label: str = ""

    @property
    def place(self) -> str:
        """Return where the page is, in words."""
        return place_of(self.document, self.number, self.label)


_DOCUMENT_SCHEMA = pa.schema(
    [("root", pa.string()), ("document", pa.string()), ("path", pa.binary()), ("content", pa.string()),
     ("num_bytes", pa.int64()), ("modified_ns", pa.int64()), ("num_pages", pa.int32()), ("error", pa.string()),
     ("note", pa.string()), ("skipped", pa.string())]
)  # fmt: skip
_PAGE_SCHEMA = pa.schema(
    [("page_id", pa.string()), ("document", pa.string()), ("number", pa.int32()), ("image", pa.string()),
     ("width", pa.int32()), ("height", pa.int32()), ("text", pa.string()), ("root", pa.string()),
     ("copies", pa.list_(pa.string())), ("content", pa.string()), ("label", pa.string())]
)  # fmt: skip
_PAGE_COLUMNS = [field.name for field in fields(Page)]


def place_of(document: str, number: int, label: str = "") -> str:
    """Return where a page is, in words.

    >>> place_of("R-exts.pdf", 42, "printed 35")
    'R-exts.pdf, page 42 (printed 35)'
    """
    return f"{document}, page {number}" + (f" ({label})" if label else "")


def _named_from(row: DocumentRow, root: str) -> str:
    """Return a document's name, with its root in front if that is another one."""
    return row.document if row.root == root else f"{row.root}/{row.document}"


def shown(path: str | bytes | os.PathLike[str]) -> str:
    r"""Return a path as valid text of one line; bytes that are not UTF-8, and control characters, become \xNN."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PageStore:
    """One store. Reading needs no lock; write within `single_writer`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: Path) -> PageStore:
        """Open an existing store; StoreError if there is none."""
        store = cls(folder)
        if not store._pages_file.exists():
            create = f"create it with: python -m recipes.retrieve ingest DOCS --out {folder}"
            raise StoreError(f"{folder} is not a page store; {create}")
        store.settings()
        return store

    @classmethod
    def create(cls, folder: Path, settings: Mapping[str, Any]) -> PageStore:
        """Open a store for writing, or create it.

        Args:
            settings: what decides a page's pixels; a store keeps the settings that it was created with.

        Raises:
            StoreError: the folder is something else, or was created with other settings.
        """
        store = cls(folder)
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder} is a file; set --out to a folder")
        file = folder / "store.json"
        if file.exists():
            before = store.settings()
            if before != dict(settings):
                names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
                changed = ", ".join(f"{name} {before.get(name)} -> {settings.get(name)}" for name in names)
                raise StoreError(
                    f"{folder} was created with other settings ({changed}), and pages of both would not be comparable; "
                    "use the same settings, or another --out"
                )
            return store
        if folder.exists() and any(folder.iterdir()):
            raise StoreError(f"{folder} is neither empty nor a page store; choose another --out")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps({"format": FORMAT, "settings": dict(settings)}, indent=1))
        return store

    def documents(self) -> list[DocumentRow]:
        """Return the catalogue of files, in order of root and document.

        Raises:
            StoreError: it is damaged, or missing although the catalogue of pages exists.
        """
        file = self.folder / "documents.parquet"
        if not file.exists() and not self._pages_file.exists():
            return []
        with _reading(file, f"delete it and {self._pages_file.name}, and ingest all folders in one command") as stream:
            rows = pq.read_table(stream).to_pylist()
            return [DocumentRow(**{name: value for name, value in row.items() if value is not None}) for row in rows]

    def pages(self) -> Iterator[Page]:
        """Yield all pages, in order of document and number; memory stays bounded.

        Like `page_ids` and `find`, it raises StoreError if the catalogue is damaged.
        """
        with self._reading_pages() as stream, pq.ParquetFile(stream) as file:
            for batch in file.iter_batches(batch_size=_ROW_GROUP, columns=_known_columns(stream)):
                yield from map(self._page, batch.to_pylist())

    def page_ids(self, *, with_text: bool = False) -> list[str]:
        """Return the ids of all pages, or of those that have text, in the order of `pages`."""
        chosen = [("text", "!=", "")] if with_text else None
        with self._reading_pages() as stream:
            return pq.read_table(stream, columns=["page_id"], filters=chosen)["page_id"].to_pylist()

    def find(self, page_ids: Iterable[str]) -> dict[str, Page]:
        """Return those of the wanted pages that are there."""
        wanted = sorted(set(page_ids))
        if not wanted:
            return {}
        with self._reading_pages() as stream:
            table = pq.read_table(stream, columns=_known_columns(stream), filters=[("page_id", "in", wanted)])
        return {row["page_id"]: self._page(row) for row in table.to_pylist()}

    def _page(self, row: dict[str, Any]) -> Page:
        if not _IMAGE.fullmatch(row["image"]):  # a store may come from a stranger
            raise StoreError(f"{self._pages_file} names {row['image']!r:.80}, which is not a page of the store")
        image, copies = str((self.folder / row["image"]).absolute()), tuple(row["copies"] or ())
        return Page(**row | {"image": image, "copies": copies, "label": row.get("label") or ""})

    def has_content(self, content: str) -> bool:
        """Say whether the pages of these bytes exist."""
        return (self.content_folder(content) / "pages.json").exists()

    def content_folder(self, content: str) -> Path:
        """Return where the pages of these bytes are, or would be."""
        return self.folder / "pages" / content[:2] / content

    def record(self, content: str) -> dict[str, Any]:
        """Return the `pages` of these bytes (fields of RenderedPage), `error` and `note` as in `DocumentRow`."""
        file = self.content_folder(content) / "pages.json"
        with _reading(file, f"delete {file.parent} and ingest all folders of the store in one command") as stream:
            return json.loads(stream.read())

    def commit(self, rows: Iterable[DocumentRow]) -> None:
        """Replace both tables.

        Raises:
            StoreWriteError: the disk is full; the previous tables are intact.
        """
        ordered = sorted(rows, key=lambda row: (row.root, row.document, row.path))
        with writing(self.folder):
            _replace_table(self.folder / "documents.parquet", (asdict(row) for row in ordered), _DOCUMENT_SCHEMA)
            _replace_table(self._pages_file, self._page_rows(ordered), _PAGE_SCHEMA)

    def is_complete(self) -> bool:
        """Whether both tables exist and are of one commit, which writes that of the pages last."""
        try:
            documents, pages = ((self.folder / name).stat() for name in ("documents.parquet", "pages.parquet"))
        except FileNotFoundError:
            return False
        return pages.st_mtime_ns >= documents.st_mtime_ns

    def collect_garbage(self) -> int:
        """Remove contents that no document has, and leftovers of processes that died; return how many contents."""
        used = {row.content for row in self.documents()}
        num_removed = 0
        for folder in self.folder.glob("pages/*/*"):
            if folder.name not in used and folder.is_dir() and _OURS.fullmatch(folder.name):
                num_removed += not folder.name.startswith(".")
                shutil.rmtree(folder)
        remove_unfinished(self.folder)
        return num_removed

    @property
    def _pages_file(self) -> Path:
        return self.folder / "pages.parquet"

    def settings(self) -> dict[str, Any]:
        """Return what decides the pixels of this store's pages; StoreError if they cannot be read."""
        file = self.folder / "store.json"
        try:
            written = json.loads(file.read_text())
            if written["format"] == FORMAT:
                return written["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{file} cannot be read: {error}; ingest into a new store") from error
        raise StoreError(f"{self.folder} has format {written['format']}, but this program reads {FORMAT}; ingest again")

    def _reading_pages(self) -> AbstractContextManager[pa.NativeFile]:
        return _reading(self._pages_file, "delete it and run the last ingest again; no page is rendered again")

    def _page_rows(self, rows: list[DocumentRow]) -> Iterator[dict[str, Any]]:
        by_content: dict[str, list[DocumentRow]] = {}
        for row in rows:
            if row.num_pages:
                by_content.setdefault(row.content, []).append(row)
        for content, same in by_content.items():
            folder = self.content_folder(content).relative_to(self.folder)
            for page in self.record(content)["pages"]:
                yield page | {
                    "page_id": f"{content[:ID_CHARACTERS]}-{page['number']:05d}",
                    "document": same[0].document,
                    "root": same[0].root,
                    "copies": [_named_from(row, same[0].root) for row in same[1:]],
                    "content": content,
                    "image": str(folder / page["image"]),
                }


def _known_columns(pages: pa.NativeFile) -> list[str]:
    """Return the fields of a Page that a catalogue has: one of an earlier release lacks some."""
    present = set(pq.read_schema(pages).names)
    return [name for name in _PAGE_COLUMNS if name in present]


@contextmanager
def single_writer(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; it is released with the process, however that ends.

    Raises:
        StoreError: another process holds it, or it cannot be written.
    """
    with writing(folder):
        lock = (folder / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreBusyError(f"another process is writing to {folder}; wait until it has finished") from error
        yield


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of processes that died; call it as the only writer."""
    for pattern in (".*.tmp", ".*.writing"):  # the second one is of earlier releases
        for leftover in folder.glob(pattern):
            leftover.unlink()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that names the fix."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        raise StoreWriteError(
            f"cannot write to {folder}: {os.strerror(error.errno)}; finished work is intact. {_REMEDIES[error.errno]}, "
            "then run the same command again to resume"
        ) from error


@contextmanager
def _reading(file: Path, remedy: str) -> Iterator[pa.NativeFile]:
    """Open a file; a StoreError names it and the fix if it is missing or damaged."""
    try:
        with pa.OSFile(os.fsencode(file)) as stream:  # bytes, for paths that are not UTF-8
            yield stream
    except FileNotFoundError as error:
        raise StoreError(f"{file} is missing; {remedy}") from error
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise StoreError(f"{file} is damaged ({' '.join(str(error).split())}); {remedy}") from error


def _replace_table(file: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    """Replace a parquet file in one step, writing a few thousand rows at a time."""
    remaining = iter(rows)
    with (
        replaced(file) as unfinished,
        pa.OSFile(os.fsencode(unfinished), "wb") as sink,
        pq.ParquetWriter(sink, schema) as writer,
    ):
        while batch := list(itertools.islice(remaining, _ROW_GROUP)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
