"""What a run was configured with, kept in its folder: written at the start, compared when the run is resumed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rollout.errors import one_line
from rollout.files import write_text

log = logging.getLogger(__name__)

SETTINGS_FILE = "config.yaml"
Settings = dict[str, Any]
"""What the user configured, as plain values."""


def write_settings(folder: Path, settings: Settings) -> None:
    """Write config.yaml."""
    write_text(folder / SETTINGS_FILE, yaml.safe_dump(_plain(settings), sort_keys=False))


def changed_settings(folder: Path, settings: Settings) -> dict[str, tuple[Any, Any]]:
    """Return, of every key that differs from the run's config.yaml, the value there and the value now."""
    before: Any = None
    try:
        before = yaml.safe_load((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        log.warning("%s cannot be read: %s", folder / SETTINGS_FILE, one_line(error))
    if not isinstance(before, dict):
        log.warning("what the run in %s began with is not known; it is resumed with the settings of now", folder)
        return {}
    return _differences(before, _plain(settings))


def about_changes(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Return a line per setting that has another value now; keys that came or went since share one each."""
    gone = [key for key, (_, new) in changes.items() if new is None]
    came = [f"{key}={new!r}" for key, (old, new) in changes.items() if old is None]
    lines = [
        f"{key} was {old!r} when this run began; it is now {new!r}"
        for key, (old, new) in changes.items()
        if old is not None and new is not None
    ]
    lines += [f"this run began without {', '.join(came)}"] if came else []
    return lines + ([f"this run began with settings that are gone: {', '.join(gone)}"] if gone else [])


def _plain(value: Any) -> Any:
    """Tuples become lists, so that a configuration reads back from yaml as it was written."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _differences(before: Settings, after: Settings, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key in before.keys() | after.keys():
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found[prefix + key] = (old, new)
    return dict(sorted(found.items(), key=lambda item: str(item[0])))
