"""How much room added documents take, how much is left for more, and uploads that were not added yet."""

from __future__ import annotations

import os
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.answers.options import check_options
from recipes.retrieval.pages.documents import why_skipped
from recipes.retrieval.pages.settings import RenderSettings
from recipes.retrieval.pages.store import DocumentRow, PageStore, shown
from rollout.keys import key
from rsgrpo.errors import InputError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class VisitSettings:
    """Limits on what those who open the page may take."""

    max_visit_mb: int = key(10_000, "room for the files that one visit adds and their pages", ge=1)
    max_visit_pages: int = key(20_000, "pages that one visit can add", ge=1)
    max_waiting_mb: int = key(10_000, "room for uploads of all visits that were not added yet", ge=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True)
class Room:
    """What documents take: bytes of files and page images, and pages."""

    num_bytes: int = 0
    num_pages: int = 0

    def __add__(self, other: Room) -> Room:
        return Room(self.num_bytes + other.num_bytes, self.num_pages + other.num_pages)


def room_of(store: PageStore, row: DocumentRow) -> Room:
    """Return what a document takes: its file and its page images."""
    pages = store.content_folder(row.content) if row.content and row.num_pages else None
    return Room(row.num_bytes + (folder_bytes(pages) if pages else 0), row.num_pages)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder; what disappears meanwhile does not count."""
    num_bytes = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                num_bytes += os.lstat(os.path.join(place, name)).st_size
    return num_bytes


@dataclass(frozen=True, slots=True)
class Quota:
    """What may be taken in all, and what is taken. option: the beginning of the two options' names."""

    option: str
    max_mb: int
    max_pages: int
    taken: Room

    @property
    def bytes_left(self) -> int:
        """Bytes that are free."""
        return max(0, self.max_mb * MIB - self.taken.num_bytes)

    @property
    def pages_left(self) -> int:
        """Pages that are free."""
        return max(0, self.max_pages - self.taken.num_pages)

    def refusal(self, more: Room, before: Room) -> str:
        """Return why a file cannot be taken together with those before it; "" if it can."""
        room = before + more
        if room.num_bytes > self.bytes_left:
            needs = f"takes {_mib(room.num_bytes)}"
            left = f"{_mib(self.bytes_left)} of {self.option}-mb {self.max_mb}"
        elif room.num_pages > self.pages_left:
            needs = f"has {room.num_pages:,} pages"
            left = f"{self.pages_left:,} of {self.option}-pages {self.max_pages}"
        else:
            return ""
        it = "it" if before == Room() else "together with the files before it, it"
        return f"{it} {needs}, and {left} are left; remove documents, or raise it"


class Quotas:
    """Several quotas of the same documents."""

    def __init__(self, *quotas: Quota) -> None:
        self._quotas = quotas

    def refusal(self, more: Room, before: Room) -> str:
        """Return why a file cannot be taken together with those before it; "" if it can."""
        return next(filter(None, (quota.refusal(more, before) for quota in self._quotas)), "")

    def bounds(self, settings: RenderSettings, num_files: int) -> dict[str, Any]:
        """Return limits for each of the files, so that while they are rendered they take no more than is left."""
        most_mb = min(quota.bytes_left for quota in self._quotas) // MIB // num_files
        return {
            "max_pages": max(1, min(settings.max_pages, *(quota.pages_left for quota in self._quotas))),
            "max_rendered_mb": max(1, min(settings.max_rendered_mb, most_mb)),
        }

    def explained(self, error: str, bounds: dict[str, Any], settings: RenderSettings) -> str:
        """Return an error that names a bound as one that names the quota, if the quota has lowered it."""
        pages = min(self._quotas, key=lambda quota: quota.pages_left)
        room = min(self._quotas, key=lambda quota: quota.bytes_left)
        for name, quota, ending in (("max_pages", pages, "pages"), ("max_rendered_mb", room, "mb")):
            if bounds[name] < getattr(settings, name):
                limit = f"{quota.option}-{ending} {getattr(quota, f'max_{ending}')}"
                option = f"--{name.replace('_', '-')} {bounds[name]}"
                error = error.replace(option, f"the {bounds[name]:,} that {limit} leaves to each file")
        return error


def sorted_out(
    files: Sequence[Path], max_files: int, max_file_mb: int, quotas: Quotas
) -> tuple[list[Path], list[tuple[str, str]]]:
    """Return the files that can be added, and the names of the others with the reason, before any is copied.

    Raises:
        InputError: there are no files, or too many.
    """
    if not 1 <= len(files) <= max_files:
        raise InputError(f"{len(files)} files were given; between 1 and --max-files {max_files} can be added")
    accepted: list[Path] = []
    refused = []
    room = Room()
    for file in files:
        num_bytes, name = file.stat().st_size, kept_name(file)
        if num_bytes > max_file_mb << 20:
            refused.append((name, f"it has {num_bytes >> 20:,} MiB, more than --max-file-mb {max_file_mb}"))
        elif name in map(kept_name, accepted):
            refused.append((name, "two of the files have this name; add one after the other, or rename one"))
        elif reason := why_skipped(file):
            refused.append((name, f"{reason}; add PDF, image, office, text, HTML, e-mail or e-book files"))
        elif reason := quotas.refusal(Room(num_bytes), room):
            refused.append((name, reason))
        else:
            accepted.append(file)
            room += Room(num_bytes)
    return accepted, refused


def kept_name(file: Path) -> str:
    """Return the name of a file that is added: not hidden."""
    return file.name.lstrip(".") or "document"  # an ingest skips hidden files


def taken_below(store: Path, root: Path) -> Room:
    """Return what the documents below a root take; nothing without a store."""
    if not (store / "pages.parquet").exists():
        return Room()
    opened, name = PageStore.open(store), shown(root.resolve())
    return sum((room_of(opened, row) for row in opened.documents() if row.root == name), Room())


def fitting(store: Path, root: Path, names: Container[str], quotas: Quotas) -> tuple[Room, dict[str, str]]:
    """Return what the named documents below a root take that fit, and the names of the others with the reason."""
    opened, name = PageStore.open(store), shown(root.resolve())
    room, beyond = Room(), {}
    for row in opened.documents():
        if row.root == name and row.document in names and row.num_pages:
            own = room_of(opened, row)
            if reason := quotas.refusal(own, room):
                beyond[row.document] = reason
            else:
                room += own
    return room, beyond


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.1f} MiB"


class WaitingRoom:
    """Refuses an upload, before any of it is read, once those that were not added yet take too much room (ASGI)."""

    def __init__(self, app: Any, folder: Path, max_mb: int) -> None:
        self._app, self._folder, self._max_mb = app, folder, max_mb
        self._arriving = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].rstrip("/").endswith("/upload"):
            await self._app(scope, receive, send)
            return
        sizes = [value for name, value in scope.get("headers", ()) if name == b"content-length"]
        if not sizes or not sizes[0].isdigit():
            await _refuse(send, 411, "an upload must say its size (Content-Length)")
            return
        size = int(sizes[0])
        if folder_bytes(self._folder) + self._arriving + size > self._max_mb * MIB:
            reason = f"uploads that were not added yet take up to --max-waiting-mb {self._max_mb}; try again later"
            await _refuse(send, 507, reason)
            return
        self._arriving += size
        try:
            await self._app(scope, receive, send)
        finally:
            self._arriving -= size


async def _refuse(send: Any, status: int, text: str) -> None:
    headers: Sequence[tuple[bytes, bytes]] = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
