"""A store of pages on disk: page images by content hash, and the catalogue of documents and pages.

    STORE/store.json           format and the settings that decide a page's pixels
    STORE/pages/ab/abcd.../    one document's content: 00001.png, ..., pages.json; whole or absent
    STORE/documents.parquet    one row per file, with its error if it has one
    STORE/pages.parquet        one row per page; what readers read

A content folder is renamed into place when it is complete, and both tables are replaced in one step, so a process that
dies at any point leaves a store that the next command goes on from. Knows nothing of how a document becomes pages.
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

from recipes.retrieval.pages.documents import RenderedPage
from rsgrpo.errors import RUN_ERROR, InputError

log = logging.getLogger(__name__)

FORMAT = 1
ID_CHARACTERS = 16  # of the content's sha256, in a page id
_HASH_BLOCK = 1 << 20
_ROW_GROUP = 4096
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


class StoreError(InputError):
    """The store cannot be opened or written; what was finished before is intact."""


class StoreWriteError(StoreError):
    """The disk refused in the middle of the work."""

    exit_code = RUN_ERROR


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """One file of the catalogue.

    root, document: the ingested folder and the file's path in it, as text (bytes that are not UTF-8 escaped).
    path: the file's own path, as bytes. content: sha256 of its bytes, "" while unknown.
    num_bytes, modified_ns: what tells that a file is unchanged without reading it.
    error: why it has no pages, or which pages it lacks; "" when all is well.
    """

    root: str
    document: str
    path: bytes
    content: str
    num_bytes: int
    modified_ns: int
    num_pages: int
    error: str


@dataclass(frozen=True, slots=True)
class Page:
    """One page of the catalogue.

    page_id: from the content's hash and the page's number, so that it survives renames. document: the first of the
    files with this content. number: from 1. image: absolute path. text: the text layer of a PDF, "" elsewhere.
    """

    page_id: str
    document: str
    number: int
    image: str
    width: int
    height: int
    text: str


_DOCUMENT_SCHEMA = pa.schema(
    [("root", pa.string()), ("document", pa.string()), ("path", pa.binary()), ("content", pa.string()),
     ("num_bytes", pa.int64()), ("modified_ns", pa.int64()), ("num_pages", pa.int32()), ("error", pa.string())]
)  # fmt: skip
_PAGE_SCHEMA = pa.schema(
    [("page_id", pa.string()), ("document", pa.string()), ("number", pa.int32()), ("image", pa.string()),
     ("width", pa.int32()), ("height", pa.int32()), ("text", pa.string()), ("root", pa.string()),
     ("copies", pa.list_(pa.string())), ("content", pa.string())]
)  # fmt: skip


def page_id(content: str, number: int) -> str:
    """Return the id of a page: stable as long as the document's bytes are."""
    return f"{content[:ID_CHARACTERS]}-{number:05d}"


def shown(path: str | os.PathLike[str]) -> str:
    r"""Return a path as valid text of one line; bytes that are not UTF-8, and control characters, become \xNN."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class PageStore:
    """One store. Reading needs nothing; writing goes through `locked`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: Path) -> PageStore:
        """Open a store that is there.

        Raises:
            StoreError: there is none.
        """
        store = cls(folder)
        if not store._pages_file.exists():
            raise StoreError(
                f"{folder} is not a page store; make it with: python -m recipes.retrieve ingest DOCS --out {folder}"
            )
        store.settings()
        return store

    @classmethod
    def create(cls, folder: Path, settings: Mapping[str, Any]) -> PageStore:
        """Open a store for writing, or make it.

        Args:
            settings: what decides a page's pixels; a store keeps to those it was made with.

        Raises:
            StoreError: the folder is something else, or was made with other settings.
        """
        store = cls(folder)
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder} is a file; --out names a folder")
        file = folder / "store.json"
        if file.exists():
            before = store.settings()
            if before != dict(settings):
                names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
                changed = [f"{name} {before.get(name)} -> {settings.get(name)}" for name in names]
                raise StoreError(
                    f"{folder} was made with other settings ({', '.join(changed)}); pages of both kinds in one store "
                    "would not compare. Use the old settings, or another --out"
                )
            return store
        if folder.exists() and any(folder.iterdir()):
            raise StoreError(f"{folder} is not empty and not a page store; choose another --out")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(file, json.dumps({"format": FORMAT, "settings": dict(settings)}, indent=1).encode())
        return store

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only writer; raises as `single_writer`."""
        with single_writer(self.folder):
            yield

    def documents(self) -> list[DocumentRow]:
        """Return the catalogue of files, in order of root and document.

        Raises:
            StoreError: it is damaged, or gone while that of the pages is there.
        """
        file = self.folder / "documents.parquet"
        if not file.exists() and not self._pages_file.exists():
            return []
        with _reading(file, f"delete it and {self._pages_file.name}, and ingest all folders in one command") as stream:
            return [DocumentRow(**row) for row in pq.read_table(stream).to_pylist()]

    def pages(self) -> Iterator[Page]:
        """Yield all pages, in order of document and number; memory stays bounded.

        Raises:
            StoreError: the catalogue is damaged; so do `page_ids` and `find`.
        """
        names = [field.name for field in fields(Page)]
        with self._reading_pages() as stream, pq.ParquetFile(stream) as file:
            for batch in file.iter_batches(batch_size=_ROW_GROUP, columns=names):
                for row in batch.to_pylist():
                    row["image"] = str((self.folder / row["image"]).absolute())
                    yield Page(**row)

    def page_ids(self) -> list[str]:
        """Return the ids of all pages, in the order of `pages`."""
        with self._reading_pages() as stream:
            return pq.read_table(stream, columns=["page_id"])["page_id"].to_pylist()

    def find(self, page_ids: Iterable[str]) -> dict[str, Page]:
        """Return those of the wanted pages that are there."""
        names, wanted = [field.name for field in fields(Page)], sorted(set(page_ids))
        if not wanted:
            return {}
        found = {}
        with self._reading_pages() as stream:
            table = pq.read_table(stream, columns=names, filters=[("page_id", "in", wanted)])
            for row in table.to_pylist():
                row["image"] = str((self.folder / row["image"]).absolute())
                found[row["page_id"]] = Page(**row)
        return found

    def has_content(self, content: str) -> bool:
        """Say whether the pages of these bytes are there."""
        return (self.content_folder(content) / "pages.json").exists()

    def content_folder(self, content: str) -> Path:
        """Where the pages of these bytes are, or would be."""
        return self.folder / "pages" / content[:2] / content

    def num_pages(self, content: str) -> tuple[int, str]:
        """Return how many pages these bytes have, and which they lack ("" for none)."""
        record = self._record(content)
        return len(record["pages"]), record["error"]

    def commit(self, rows: Iterable[DocumentRow]) -> None:
        """Replace both tables.

        Raises:
            StoreError: the disk is full; the tables before are intact.
        """
        ordered = sorted(rows, key=lambda row: (row.root, row.document, row.path))
        with writing(self.folder):
            replace_table(self.folder / "documents.parquet", (asdict(row) for row in ordered), _DOCUMENT_SCHEMA)
            replace_table(self._pages_file, self._page_rows(ordered), _PAGE_SCHEMA)

    def collect_garbage(self) -> int:
        """Remove contents that no document has, and leftovers of processes that died; return how many."""
        used = {row.content for row in self.documents()}
        num_removed = 0
        for folder in self.folder.glob("pages/*/*"):
            if folder.name not in used:
                num_removed += not folder.name.startswith(".")
                shutil.rmtree(folder)
        for leftover in self.folder.glob(".*.writing"):
            leftover.unlink()
        return num_removed

    @property
    def _pages_file(self) -> Path:
        return self.folder / "pages.parquet"

    def settings(self) -> dict[str, Any]:
        """Return what decides the pixels of this store's pages.

        Raises:
            StoreError: they cannot be read.
        """
        try:
            written = json.loads((self.folder / "store.json").read_text())
            if written["format"] == FORMAT:
                return written["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.folder / 'store.json'} cannot be read: {error}; make the store anew") from error
        raise StoreError(f"{self.folder} has format {written['format']}, this program reads {FORMAT}; make it anew")

    def _reading_pages(self) -> AbstractContextManager[pa.NativeFile]:
        return _reading(self._pages_file, "delete it and run the last ingest again; nothing is rendered anew")

    def _record(self, content: str) -> dict[str, Any]:
        file = self.content_folder(content) / "pages.json"
        with _reading(file, f"delete {file.parent} and ingest all folders of the store in one command") as stream:
            return json.loads(stream.read())

    def _page_rows(self, rows: list[DocumentRow]) -> Iterator[dict[str, Any]]:
        by_content: dict[str, list[DocumentRow]] = {}
        for row in rows:
            if row.num_pages:
                by_content.setdefault(row.content, []).append(row)
        for content, same in by_content.items():
            folder = self.content_folder(content).relative_to(self.folder)
            for page in self._record(content)["pages"]:
                yield {
                    "page_id": page_id(content, page["number"]),
                    "document": same[0].document,
                    "root": same[0].root,
                    "copies": [row.document for row in same[1:]],
                    "content": content,
                    "number": page["number"],
                    "image": str(folder / page["image"]),
                    "width": page["width"],
                    "height": page["height"],
                    "text": page["text"],
                }


@contextmanager
def single_writer(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; it goes with the process, however that ends.

    Raises:
        StoreError: another process holds it, or it cannot be written.
    """
    with writing(folder):
        lock = (folder / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"another process is writing to {folder}; wait for it") from error
        yield


@contextmanager
def content_writer(final: Path) -> Iterator[Path]:
    """Give a folder to write one content's pages into; it takes its name when the block ends well."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            os.rename(temporary, final)
        except OSError:
            if not final.exists():  # else two files with the same bytes were rendered side by side
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_record(folder: Path, pages: list[RenderedPage], error: str) -> None:
    """Write the list of a content's pages beside them."""
    (folder / "pages.json").write_text(json.dumps({"pages": [asdict(page) for page in pages], "error": error}))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*_FULL, *_FORBIDDEN):
            raise
        remedy = "Make room" if error.errno in _FULL else "Make it writable"
        raise StoreWriteError(
            f"cannot write to {folder}: {os.strerror(error.errno)}; what was finished is intact. {remedy}, then "
            "start the same command again to continue"
        ) from error


@contextmanager
def _reading(file: Path, remedy: str) -> Iterator[pa.NativeFile]:
    """Open a file; if it is gone or damaged, say what to do.

    Raises:
        StoreError: names the file.
    """
    try:
        with pa.OSFile(os.fsencode(file)) as stream:  # bytes, for paths that are not UTF-8
            yield stream
    except FileNotFoundError as error:
        raise StoreError(f"{file} is gone; {remedy}") from error
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise StoreError(f"{file} is damaged ({' '.join(str(error).split())}); {remedy}") from error


def replace_file(file: Path, content: bytes) -> None:
    """Write a file so that it is either the old or the new one, also after a power cut."""
    temporary = file.with_name(f".{file.name}.writing")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def replace_table(file: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    """Write a parquet file in one step, a few thousand rows at a time."""
    temporary = file.with_name(f".{file.name}.writing")
    remaining = iter(rows)
    with pa.OSFile(os.fsencode(temporary), "wb") as sink, pq.ParquetWriter(sink, schema) as writer:
        while batch := list(itertools.islice(remaining, _ROW_GROUP)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    with open(temporary, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, file)
