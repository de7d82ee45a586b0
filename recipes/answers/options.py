"""Command-line options that are the keys of settings: what adds them, reads them, and checks their bounds."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from rollout.keys import keys_of

SettingsT = TypeVar("SettingsT")


def option_of(name: str) -> str:
    """Return the command-line option of a key: `--max-pages` of max_pages."""
    return "--" + name.replace("_", "-")


def add_options(command: Any, settings: type) -> None:
    """Add an option for each key of `settings`."""
    for name, about in keys_of(settings).items():
        if isinstance(about.default, bool):
            command.add_argument(option_of(name), action="store_true", help=about.help)
            continue
        kind = str if about.default is None else type(about.default)
        choices = [value for value in about.one_of if value] or None
        command.add_argument(option_of(name), type=kind, default=about.default, choices=choices, help=about.help)


def chosen(settings: type[SettingsT], options: object, **given: Any) -> SettingsT:
    """Return settings whose fields have the names of attributes of `options`; `given` overrides them."""
    names = {field.name for field in fields(settings)} & set(vars(options))  # type: ignore[arg-type]
    return settings(**{name: getattr(options, name) for name in names} | given)


def check_options(settings: object) -> None:
    """Raise ConfigError, which names the option, for the first key whose value is out of bounds."""
    for name, about in keys_of(type(settings)).items():
        about.check(option_of(name), getattr(settings, name))
