"""Atomic file writes, one writer per folder, and JSON lines whose errors carry line numbers. Standard library only.

Every writer of this project goes through `replaced`, so that a kill, a full disk or a power cut leaves either the old
content or the new one, never a part of it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rollout.errors import InputError, RsgrpoError, printable

LOCK_FILE = ".lock"
_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Make room") | dict.fromkeys(
    (errno.EROFS, errno.EACCES, errno.EPERM), "Make it writable"
)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of some network file systems


class WriteError(RsgrpoError):
    """The disk refused a write; what was finished before is intact."""


class FolderHeld(InputError):
    """Another process writes to this folder."""


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; leaving without an exception makes its file the content of `path`.

    The data is on the disk before the rename. After an exception `path` is unchanged and the temporary file is deleted.

    >>> with replaced(folder / "scores.json") as unfinished:
    ...     unfinished.write_text("{}")

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, target)
        sync(target.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the content of a UTF-8 text file atomically."""
    with replaced(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace the content of a file atomically."""
    with replaced(path) as unfinished:
        unfinished.write_bytes(content)


@contextmanager
def replaced_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new folder beside `path`; leaving without an exception makes it the content of `path`, whole.

    All of it is on the disk before the rename. After an exception, and after a kill, `path` is unchanged; a later call
    removes what the kill has left.
    """
    target = Path(path)
    before = target.with_name(f".{target.name}.before.writing")
    if before.exists() and not target.exists():  # killed between the two renames
        os.rename(before, target)
    for leftover in target.parent.glob(f".{target.name}.*.writing"):
        shutil.rmtree(leftover)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.writing")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        sync_tree(unfinished)
        if target.exists():
            os.replace(target, before)
            os.rename(unfinished, target)
            shutil.rmtree(before)
        else:
            os.rename(unfinished, target)
        sync(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sync_tree(folder: str | os.PathLike[str]) -> None:
    """Wait until a folder is on the disk with everything below it."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(parent)


@contextmanager
def naming_full_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a full or read-only disk into one message that names the file and the fix.

    Raises:
        WriteError: the block could not write.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        raise WriteError(
            f"{os.fspath(path)} cannot be written: {os.strerror(error.errno)}. {_REMEDIES[error.errno]}; then run the "
            "same command again to resume."
        ) from error


@contextmanager
def only_writer(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Make a folder and hold its lock, which ends with this process, however that ends.

    Raises:
        FolderHeld: another process holds it; the text says which one (host, process id, since when).
        WriteError: the folder cannot be written.
    """
    path = Path(folder) / LOCK_FILE
    with naming_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+", encoding="utf-8")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (*_NO_LOCKS, errno.EWOULDBLOCK, errno.EACCES):
                raise
            if error.errno not in _NO_LOCKS or _is_alive(_holder(lock)):
                raise FolderHeld(_held(path, _holder(lock))) from None
        with naming_full_disk(path):
            lock.seek(0)
            lock.truncate()
            json.dump(
                {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}, lock
            )
            lock.flush()
        yield
        lock.truncate(0)  # ended in order


def _holder(lock: IO[str]) -> dict[str, Any]:
    """Return what the last holder wrote of itself; {} if it ended in order or wrote nothing readable."""
    lock.seek(0)
    try:
        found = json.loads(lock.read(4096))
        return found if isinstance(found, dict) else {}
    except ValueError:
        return {}


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether a holder may still run, where the file system cannot tell: on another machine it is taken to."""
    if not holder or holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return bool(holder)
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _held(path: Path, holder: dict[str, Any]) -> str:
    who = "another process"
    if holder:
        since, pid, host = (printable(str(holder.get(name, "?"))) for name in ("since", "pid", "host"))
        who = f"process {pid} on {host}, since {since}"
    return (
        f"{path.parent} is being written by {who}. Wait until it has ended, stop it, or choose another name=. If no "
        f"such process exists, remove {path}."
    )


Stamp = tuple[int, int, int] | None
"""(inode, bytes, time of change) of a file; None without it."""


def stamp(path: str | os.PathLike[str]) -> Stamp:
    """Return what changes with a file's content."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not Path(path).is_dir():  # some file systems do not sync folders
            raise
    finally:
        os.close(descriptor)


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every line that is not blank.

    Raises:
        InputError: the file cannot be read, or a line is not a JSON object; names the file and the line.
    """
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json_object(line, f"{os.fspath(path)}, line {number}")
    except OSError as error:
        raise InputError(f"{os.fspath(path)} cannot be read: {error.strerror}") from error


def json_object(text: bytes | str, where: str) -> dict[str, Any]:
    """Return the JSON object in `text`, ignoring a byte order mark.

    Raises:
        InputError: it is not one; the message begins with `where`.
    """
    try:
        row = parse_json(text)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: must be a JSON object, got {type(row).__name__}")
    return row


def parse_json(text: bytes | str) -> Any:
    """Return the value of a JSON text, ignoring a byte order mark.

    Raises:
        ValueError: it is invalid, or its strings cannot be encoded again; the message says how and where.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # half a surrogate pair can be read but not written
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at character {error.pos}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode: {error.object[error.start]!a} lacks its other half") from error
    except RecursionError as error:
        raise ValueError("not usable JSON: it is nested too deeply") from error
