"""Checksums of a folder's files, which `sha256sum -c SHA256SUMS` reads too. Standard library only."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SUMS_FILE = "SHA256SUMS"
_THREADS = min(8, os.cpu_count() or 1)  # hashing leaves other threads free


def write_sums(folder: Path) -> None:
    """Write the checksums of all files below a folder into its `SHA256SUMS`."""
    names = sorted(
        os.path.relpath(os.path.join(parent, name), folder) for parent, _, names in os.walk(folder) for name in names
    )
    names = [name for name in names if name != SUMS_FILE]
    lines = [f"{digest}  {name}\n" for digest, name in zip(_digests(folder, names), names, strict=True)]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def damage(folder: Path, num_files: int | None) -> list[str]:
    """Return what is wrong with each file that `write_sums` listed; [] if none has changed. Others may be there.

    num_files: listed then; None for a folder of an older release, which may have no checksums.
    """
    try:
        lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
        wanted = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    except FileNotFoundError:
        return [] if num_files is None else [f"{SUMS_FILE} is missing"]
    except (OSError, UnicodeDecodeError) as error:
        return [f"{SUMS_FILE} cannot be read: {error}"]
    if num_files not in (None, len(wanted)):
        return [f"{SUMS_FILE} lists {len(wanted)} files of {num_files}"]
    there = [name for name in wanted if (folder / name).is_file()]
    found = dict(zip(there, _digests(folder, there), strict=True))
    faults = {name: "is missing" if name not in found else "has another content than was written" for name in wanted}
    return [f"{name} {fault}" for name, fault in faults.items() if found.get(name) != wanted[name]]


def _digests(folder: Path, names: list[str]) -> list[str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda name: _digest(folder / name), names))


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # a sector that cannot be read
        return f"unreadable: {error.strerror}"
