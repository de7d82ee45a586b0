"""The driver's part of a checkpoint: JSON beside numpy arrays. Reading it makes values, and runs no code.

Plain values are written as they are; what JSON does not have (tuples, bytes, arrays, times, our own dataclasses) is an
object with one key that begins with "$". The round trip is exact, floating-point bits included.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rewards.api import Credit, Span
from rollout.types import ImageReference, Prompt, Rollout, RolloutGroup
from rsgrpo.errors import RsgrpoError
from rsgrpo.learning.state import TypeRefused, read_pickle
from rsgrpo.types import ScoredGroup

VERSION = 1
STATE_FILE, ARRAYS_FILE = "driver.json", "driver.npz"
PICKLE_FILE = "driver.pkl"
"""Written by releases up to 0.1."""

_TYPES: dict[str, type[Any]] = {cls.__name__: cls for cls in (ScoredGroup, RolloutGroup, Prompt, Rollout, Credit, Span)}
_TEXTS: dict[str, tuple[type[Any], Callable[[Any], str], Callable[[str], Any]]] = {
    "$datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "$date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "$time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "$decimal": (decimal.Decimal, str, decimal.Decimal),
}
_PICKLED_TYPES = {f"{cls.__module__}.{cls.__name__}" for cls in _TYPES.values()} | {
    "builtins.bytes", "numpy.dtype", "numpy.ndarray", "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar", "numpy._core.numeric._frombuffer", "_codecs.encode",
}  # fmt: skip
_PACKED_LENGTH = 32
"""Longer lists of numbers, such as token ids, are stored as arrays."""


class StateError(RsgrpoError):
    """The driver's state cannot be written, or a file does not hold one; the text says why."""


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a state into an existing folder.

    Raises:
        StateError: it holds a value of a type that has no safe form; names its place.
        OSError: the folder cannot be written.
    """
    arrays: list[np.ndarray] = []
    encoded = {key: _encode(value, key, arrays) for key, value in state.items()}
    with open(folder / ARRAYS_FILE, "wb") as file:
        np.savez(file, allow_pickle=False, **{str(index): array for index, array in enumerate(arrays)})
    (folder / STATE_FILE).write_text(json.dumps({"version": VERSION, "state": encoded}), encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """Read what `write_state` wrote, or the pickle of an older release as far as it holds nothing but our own types.

    Raises:
        StateError: it is of another version, damaged, or could run code.
    """
    if (folder / PICKLE_FILE).exists() and not (folder / STATE_FILE).exists():
        return _read_pickle(folder / PICKLE_FILE)
    try:
        written = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        version = written["version"]
        if version != VERSION:
            raise StateError(
                f"{folder / STATE_FILE} has format version {version}, this release reads {VERSION}. Resume with the "
                "release that wrote the checkpoint, or start a new run under another name=."
            )
        with np.load(folder / ARRAYS_FILE, allow_pickle=False) as stored:
            arrays = {int(name): stored[name] for name in stored.files}
        return {key: _decode(value, arrays) for key, value in written["state"].items()}
    except StateError:
        raise
    except Exception as error:  # a damaged zip file or array raises nearly everything
        raise StateError(
            f"{folder} holds no driver state that can be read: {type(error).__name__}: {error}. Remove the folder to "
            "resume from the checkpoint before it."
        ) from error


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            state: dict[str, Any] = read_pickle(file, _PICKLED_TYPES)
    except TypeRefused as error:
        raise StateError(f"{path} is a pickle of an older release, and {error}") from error
    except Exception as error:
        raise StateError(
            f"{path} is damaged: {type(error).__name__}: {error}. Remove {path.parent} to resume from the checkpoint "
            "before it."
        ) from error
    return state


def _encode(value: Any, where: str, arrays: list[np.ndarray]) -> Any:
    """Return a value's JSON form; arrays and bytes go to `arrays` and are referred to by their index."""
    array = _as_array(value)
    if array is not None:
        arrays.append(array[1])
        return {array[0]: len(arrays) - 1}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {"$tuple": _encode(list(value), where, arrays)}
    if isinstance(value, list):
        return [_encode(item, f"{where}[{index}]", arrays) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        pairs = [(key, _encode(item, f"{where}.{key}", arrays)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {"$map": [[_encode(key, where, arrays), item] for key, item in pairs]}
    if type(value) in _TYPES.values():
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"$" + type(value).__name__: {key: _encode(v, f"{where}.{key}", arrays) for key, v in fields.items()}}
    for tag, (kind, write, _) in _TEXTS.items():
        if isinstance(value, kind):
            return {tag: write(value)}
    raise StateError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold; leave that column out")


def _as_array(value: Any) -> tuple[str, np.ndarray] | None:
    """Return what is stored as an array, with its tag: arrays, bytes, long lists of numbers or of pairs of them."""
    if isinstance(value, np.generic):
        return "$scalar", np.asarray(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return "$array", value
    if isinstance(value, bytes | ImageReference):  # the file that a packed image lies in may change
        content = value if isinstance(value, bytes) else value.read()
        return "$bytes", np.frombuffer(content, dtype=np.uint8)
    if not isinstance(value, list) or len(value) <= _PACKED_LENGTH:
        return None
    kinds = {type(item) for item in value}
    if kinds == {float}:
        return "$numbers", np.array(value, dtype=np.float64)
    if kinds == {tuple} and {(len(pair), *map(type, pair)) for pair in value} == {(2, int, int)}:
        return "$numbers", np.array(value, dtype=np.int64)
    if kinds == {int} and max(map(abs, value)) < 2**63:
        return "$numbers", np.array(value, dtype=np.int64)
    return None


def _decode(form: Any, arrays: Mapping[int, np.ndarray]) -> Any:
    if isinstance(form, list):
        return [_decode(item, arrays) for item in form]
    if not isinstance(form, dict):
        return form
    tag: str = next(iter(form), "")
    content: Any = form.get(tag)
    if not tag.startswith("$"):
        return {key: _decode(item, arrays) for key, item in form.items()}
    if tag == "$array":
        return arrays[content]
    if tag == "$scalar":
        return arrays[content][()]
    if tag == "$bytes":
        return arrays[content].tobytes()
    if tag == "$numbers":
        numbers = arrays[content].tolist()
        return [tuple(pair) for pair in numbers] if arrays[content].ndim == 2 else numbers
    if tag == "$tuple":
        return tuple(_decode(content, arrays))
    if tag == "$map":
        return {_decode(key, arrays): _decode(item, arrays) for key, item in content}
    if tag in _TEXTS:
        return _TEXTS[tag][2](content)
    return _TYPES[tag.removeprefix("$")](**{key: _decode(item, arrays) for key, item in content.items()})
