"""Configuration keys: default, help and bounds beside each field, and the check of values. Standard library only.

    @dataclass(frozen=True)
    class InputsConfig:
        max_images: int = key(5, "Maximum number of images per prompt; 0 allows text only.", ge=0)

        def __post_init__(self) -> None:
            check(self, "inputs")

A field that is a `Literal` takes its options from its type.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import re
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Number
from typing import Any, Literal, TypeVar

from rollout.errors import ConfigError, RsgrpoError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """What is known about one key.

    help: one or two sentences. ge, gt, le, lt: bounds of a number; None is unbounded. off: one further value, outside
    the bounds, that switches the feature off. one_of: the only values allowed; empty allows all.
    """

    default: Any
    help: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    off: float | None = None
    one_of: Collection[Any] = ()

    @property
    def bounds(self) -> str:
        """Return the bounds in words, such as ">= 1", "in (0, 1]" or "0 (off) or > 1"; "" if there are none."""
        low, high = (self.ge if self.gt is None else self.gt), (self.le if self.lt is None else self.lt)
        if low is not None and high is not None:
            text = f"in {'[' if self.gt is None else '('}{low:g}, {high:g}{']' if self.lt is None else ')'}"
        elif low is not None:
            text = f"{'>=' if self.gt is None else '>'} {low:g}"
        elif high is not None:
            text = f"{'<=' if self.lt is None else '<'} {high:g}"
        else:
            return f"one of {', '.join(filter(None, map(str, self.one_of)))}" if self.one_of else ""
        return text if self.off is None else f"{self.off:g} (off) or {text}"

    @property
    def shown_default(self) -> str:
        """Return the default as a command line takes it."""
        return self.default if isinstance(self.default, str) and self.default else json.dumps(self.default)

    def check(self, name: str, value: Any) -> None:
        """Raise ConfigError unless `value` is allowed."""
        require(self._has_kind(value), f"{name} must be {_KINDS.get(type(self.default))}, got {value!r}")
        if self.one_of:
            if value not in self.one_of:
                near = nearest(str(value), map(str, self.one_of))
                raise ConfigError(f"{name} must be {self.bounds}; got {value!r}{near}")
        elif self.bounds and value != self.off:
            holds = (
                (self.ge is None or value >= self.ge)
                and (self.gt is None or value > self.gt)
                and (self.le is None or value <= self.le)
                and (self.lt is None or value < self.lt)
            )
            require(holds, f"{name} must be {self.bounds}, got {value:g}")

    def _has_kind(self, value: Any) -> bool:
        """Whether the value is of the default's kind: an interpolation may bring any other."""
        if isinstance(self.default, dict):
            return isinstance(value, Mapping)
        if isinstance(self.default, str):
            return not isinstance(value, Number | Mapping | list)
        if isinstance(self.default, list):
            return isinstance(value, Sequence) and not isinstance(value, str)
        return not isinstance(self.default, Number) or isinstance(value, Number)


_KINDS = {dict: "a map of names to values", str: "a text", list: "a list", bool: "true or false"}
_KINDS |= {int: "a number", float: "a number"}


def key(default: T, help: str, **bounds: Any) -> T:
    """Return a dataclass field with a default, its meaning, and its bounds: ge, gt, le, lt, off, one_of of `Key`."""
    about = {"key": Key(default, help, **bounds)}
    if isinstance(default, (list, dict)):
        return typing.cast(T, dataclasses.field(default_factory=default.copy, metadata=about))
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """One dataclass of a configuration.

    path: where it is mounted; "" at the top. about: the first paragraph of its docstring. keys: by field name; parts
    that are dataclasses have sections of their own.
    """

    path: str
    about: str
    keys: Mapping[str, Key]

    def name(self, field: str) -> str:
        """Return the dotted name of one of its keys."""
        return f"{self.path}.{field}".lstrip(".")


def sections(schema: type, path: str = "") -> Iterator[Section]:
    """Yield a dataclass and those in it, outer ones first."""
    hints = typing.get_type_hints(schema)
    about = " ".join((inspect.getdoc(schema) or "").partition("\n\n")[0].split())
    yield Section(path, about, keys_of(schema))
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from sections(hints[field.name], f"{path}.{field.name}".lstrip("."))


def keys_of(schema: type) -> Mapping[str, Key]:
    """Return the keys that a dataclass declares itself, by field name; parts of it have their own."""
    return _keys_of(schema)  # type: ignore[arg-type,unused-ignore]


@functools.cache
def _keys_of(schema: type) -> Mapping[str, Key]:
    hints = typing.get_type_hints(schema)
    found: dict[str, Key] = {}
    for field in dataclasses.fields(schema):
        about = field.metadata.get("key")
        if about is not None:
            literal = typing.get_origin(hints[field.name]) is Literal
            options = typing.get_args(hints[field.name]) if literal else about.one_of
            found[field.name] = dataclasses.replace(about, one_of=options)
    return found


def check(config: object, mounted_at: str = "") -> None:
    """Raise ConfigError for the first key of a dataclass whose value is not allowed.

    mounted_at: dotted path of the dataclass in the configuration, for messages.
    """
    for name, about in keys_of(type(config)).items():
        about.check(f"{mounted_at}.{name}".lstrip("."), getattr(config, name))


@contextmanager
def named(options: Mapping[str, str]) -> Iterator[None]:
    """Make errors name settings as a command line calls them.

    >>> with named({"inputs.max_images": "--max-images"}):
    ...     InputsConfig(max_images=-1)
    ConfigError: --max-images must be >= 0, got -1

    A key with a value in a message (`rollout.engine=hf`) becomes the option with its value (`--engine hf`).
    """
    try:
        yield
    except RsgrpoError as error:
        error.args = (as_named(str(error), options), *error.args[1:])
        raise


def as_named(text: str, options: Mapping[str, str]) -> str:
    """Return a message in which keys are replaced by their names in `options`."""
    known = "|".join(re.escape(name) for name in sorted(options, key=len, reverse=True))
    return re.sub(
        rf"(?<![\w./-])({known})(?![\w-]|\.\w)(=(?=\S))?",
        lambda found: options[found[1]] + (" " if found[2] else ""),
        text,
    )


def require(holds: bool, message: str) -> None:
    """Raise ConfigError with `message` unless it holds."""
    if not holds:
        raise ConfigError(message)


def at_least(limit: float, **values: float) -> None:
    """Raise ConfigError for a value below `limit`, by the name of its keyword."""
    for name, value in values.items():
        require(value >= limit, f"{name} must be >= {limit:g}, got {value:g}")


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "; did you mean X?", or "" if no known word is close."""
    best = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {best[0]}?" if best else ""
