"""A folder that a command makes from settings: either whole, with a manifest that names them, or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rsgrpo.errors import InputError

MANIFEST = "manifest.json"
FORMAT = 1  # of what the commands write; raised when the same settings give other files


def is_whole(folder: Path, settings: dict[str, Any], *, force: bool) -> bool:
    """Whether `folder` is there from these very settings.

    Raises:
        InputError: something else is there and `force` is not given.
    """
    manifest = folder / MANIFEST
    found = json.loads(manifest.read_text()) if manifest.exists() else None
    if found and (found["format"], found["settings"]) == (FORMAT, settings):
        return not force
    if folder.exists() and not force:
        if found is None:
            why = f"and it was not made by this command (no {MANIFEST} in it)"
        else:
            changed = [
                f"{key}={found['settings'].get(key)!r} instead of {value!r}"
                for key, value in settings.items()
                if found["settings"].get(key) != value
            ]
            why = "made with " + (", ".join(changed) or f"format {found['format']} instead of {FORMAT}")
        raise InputError(f"{folder} exists already, {why}: choose another --out, or replace it with --force")
    return False


def make_folder(
    folder: Path, settings: dict[str, Any], fill: Callable[[Path], dict[str, Any]], *, force: bool
) -> dict[str, Any]:
    """Let `fill` write a folder beside its final place and rename it when it is whole; reuse one that fits.

    Returns:
        The facts that `fill` returned, now or when the folder was made, and `state`: "made" or "reused".
    """
    if is_whole(folder, settings, force=force):
        return json.loads((folder / MANIFEST).read_text())["facts"] | {"state": "reused"}
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        facts = fill(temporary)
        manifest = {"format": FORMAT, "settings": settings, "facts": facts}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return facts | {"state": "made"}
