"""Digests of a model's folder: every byte of every file that may decide a vector.

Hashing gigabytes takes seconds, so a file's digest is kept in the user's cache folder under its path, size and time of
change, and read again only if one of them differs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from rollout.files import write_text

log = logging.getLogger(__name__)

SMALL_BYTES = 1 << 20  # smaller files are hashed each time
_EDGE_BYTES = 1 << 20


def folder_digest(folder: Path) -> str:
    """Return the digest of a model's folder: names and contents of all its files, pictures and read-me files aside."""
    digest, known = hashlib.sha256(), _Known()
    for file in _files(folder):
        digest.update(f"{file.relative_to(folder).as_posix()} {known.digest(file)}\n".encode())
    known.save()
    return digest.hexdigest()


def edges_digest(folder: Path) -> str:
    """Return the digest that earlier releases made: large files by their length and both ends only."""
    digest = hashlib.sha256()
    for file in _files(folder):
        num_bytes = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {num_bytes}\n".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(_EDGE_BYTES))
            stream.seek(max(0, num_bytes - _EDGE_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix not in (".md", ".png") and not file.name.startswith("."):
            yield file


class _Known:
    """Digests of large files that were hashed before. A cache that cannot be read or written costs time only."""

    def __init__(self) -> None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._file = Path(cache) / "rsgrpo" / "weights.json"
        self._changed = False
        try:
            self._digests: dict[str, str] = dict(json.loads(self._file.read_text()))
        except (OSError, ValueError, TypeError):
            self._digests = {}

    def digest(self, file: Path) -> str:
        status = file.stat()
        if status.st_size < SMALL_BYTES:
            return hashlib.sha256(file.read_bytes()).hexdigest()
        key = f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
        if key not in self._digests:
            with open(file, "rb") as stream:
                self._digests[key] = hashlib.file_digest(stream, "sha256").hexdigest()
            self._changed = True
        return self._digests[key]

    def save(self) -> None:
        if self._changed:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                kept = {key: value for key, value in self._digests.items() if Path(key.rsplit(" ", 3)[0]).exists()}
                write_text(self._file, json.dumps(kept, indent=0))
            except OSError as error:
                log.info("digests of weights are not kept in %s: %s", self._file, error)
