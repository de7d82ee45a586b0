"""Atomic file writes, and JSON lines whose errors carry line numbers. Standard library only.

Every writer of this project goes through `replaced`, so that a kill, a full disk or a power cut leaves either the old
content or the new one, never a part of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rollout.errors import InputError


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
