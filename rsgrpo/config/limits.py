"""Limits of single values: each function raises a ConfigError that names the key, the value and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from rsgrpo.errors import ConfigError


def require(holds: bool, message: str) -> None:
    """Raise ConfigError with `message` unless it holds."""
    if not holds:
        raise ConfigError(message)


def one_of(key: str, value: str, options: Collection[str]) -> None:
    """Raise ConfigError, with the nearest option, unless `value` is one of them."""
    if value not in options:
        listed = ", ".join(options)
        raise ConfigError(f"{key} must be one of {listed}; got {value!r}{nearest(value, options)}")


def at_least(limit: float, **values: float) -> None:
    """Raise ConfigError for a value below `limit`; in a keyword, `__` stands for the dot of a key."""
    for key, value in values.items():
        require(value >= limit, f"{key.replace('__', '.')} must be >= {limit:g}, got {value:g}")


def above(limit: float, **values: float) -> None:
    """Raise ConfigError for a value that is not over `limit`."""
    for key, value in values.items():
        require(value > limit, f"{key.replace('__', '.')} must be > {limit:g}, got {value:g}")


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "; did you mean X?", or nothing when no known word is close."""
    best = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {best[0]}?" if best else ""
