"""Command-line options that are the keys of settings: what adds them, reads them, and checks their bounds."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, TypeVar

from rollout.keys import keys_of

SettingsT = TypeVar("SettingsT")


def option_of(name: str) -> str:
    """Return the command-line option of a key: `--max-pages` of max_pages."""
    return "--" + name.replace("_", "-")


def port(text: str) -> int:
    """Read the number of a port; 0 asks for a free one."""
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, got {text!r}")
    return int(text)


def add_options(command: Any, settings: type) -> None:
    """Add an option for each key of `settings`."""
    for name, about in keys_of(settings).items():
        if isinstance(about.default, bool):
            command.add_argument(option_of(name), action="store_true", help=about.help)
            continue
        kind = str if about.default is None else type(about.default)
        choices = [value for value in about.one_of if value] or None
        command.add_argument(option_of(name), type=kind, default=about.default, choices=choices, help=about.help)


class Parser(argparse.ArgumentParser):
    """A parser whose help says the default of every option that has one."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": DefaultsFormatter} | settings)


class DefaultsFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds "(default: ...)" to the help of an option, unless it is off, empty, or said already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_off = action.default is None or isinstance(action.default, bool) or action.default in ("", argparse.SUPPRESS)
        if is_off or action.default == [] or not action.option_strings or "default" in (action.help or "").lower():
            return action.help
        return f"{action.help or ''} (default: %(default)s)"


def chosen(settings: type[SettingsT], options: object, **given: Any) -> SettingsT:
    """Return settings whose fields have the names of attributes of `options`; `given` overrides them."""
    names = {field.name for field in fields(settings)} & set(vars(options))  # type: ignore[arg-type]
    return settings(**{name: getattr(options, name) for name in names} | given)


def check_options(settings: object) -> None:
    """Raise ConfigError, which names the option, for the first key whose value is out of bounds."""
    for name, about in keys_of(type(settings)).items():
        about.check(option_of(name), getattr(settings, name))
