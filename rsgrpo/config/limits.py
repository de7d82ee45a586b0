"""Limits of single values: each function raises a ConfigError that names the key, the value and what would work."""

from __future__ import annotations

from collections.abc import Collection

from rollout.keys import nearest as nearest
from rollout.keys import require as require


def one_of(key: str, value: str, options: Collection[str]) -> None:
    """Raise ConfigError, with the nearest option, unless `value` is one of them."""
    require(value in options, f"{key} must be one of {', '.join(options)}; got {value!r}{nearest(value, options)}")


def at_least(limit: float, **values: float) -> None:
    """Raise ConfigError for a value below `limit`; in a keyword, `__` stands for the dot of a key."""
    for key, value in values.items():
        require(value >= limit, f"{key.replace('__', '.')} must be >= {limit:g}, got {value:g}")


def above(limit: float, **values: float) -> None:
    """Raise ConfigError for a value that is not over `limit`."""
    for key, value in values.items():
        require(value > limit, f"{key.replace('__', '.')} must be > {limit:g}, got {value:g}")
