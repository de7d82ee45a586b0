"""Folders that commands make from settings: complete, with a manifest of the settings, or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rollout.files import json_object
from rsgrpo.errors import InputError

MANIFEST = "manifest.json"
FORMAT = 1  # raised when the same settings give different files


def reusable(folder: Path, settings: dict[str, Any], *, force: bool) -> dict[str, Any] | None:
    """Return the facts of a folder made from exactly these settings; None if it must be made.

    Raises:
        InputError: something else is there and `force` is not given.
    """
    if force or not folder.exists():
        return None
    manifest = folder / MANIFEST
    if not manifest.exists():
        why = f"and it was not made by this command (no {MANIFEST} in it)"
    else:
        found = json_object(manifest.read_bytes(), str(manifest))
        if (found["format"], found["settings"]) == (FORMAT, settings):
            return found["facts"]
        changed = [
            f"{key}={found['settings'].get(key)!r} instead of {settings.get(key)!r}"
            for key in {**found["settings"], **settings}
            if found["settings"].get(key) != settings.get(key)
        ]
        why = "made with " + (", ".join(changed) or f"format {found['format']} instead of {FORMAT}")
    raise InputError(f"{folder} already exists, {why}. Choose another --out, or replace it with --force.")


def make_folder(
    folder: Path, settings: dict[str, Any], fill: Callable[[Path], dict[str, Any]], *, force: bool
) -> dict[str, Any]:
    """Let `fill` write a temporary folder and rename it once complete; reuse one made from the same settings.

    Returns:
        The facts that `fill` returned, now or when the folder was made, and `state`: "made" or "reused".
    """
    found = reusable(folder, settings, force=force)
    if found is not None:
        return found | {"state": "reused"}
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
