"""Write docs/reference/api.md from the docstrings of what `from rsgrpo import NAME` gives.

Run it after a public docstring or signature was changed: `python tools/api_reference.py` (`make format` does). A test
compares.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import rsgrpo

DOCUMENT = Path(__file__).parent.parent / "docs" / "reference" / "api.md"
INTRODUCTION = """# Python API

What `from rsgrpo import NAME` gives, made from the docstrings by `tools/api_reference.py`.
[Python without Ray](python_api.md) puts the pieces together.
"""


def document() -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    for module, names in rsgrpo._HOMES.items():
        parts.append(f"\n## `{module}`\n")
        parts += [_entry(name, getattr(rsgrpo, name)) for name in names]
    return "".join(parts)


def _entry(name: str, value: Any) -> str:
    """Return the section of one class, function or constant."""
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return f"\n### {name}\n\n    {name} = {value!r}\n"
    kind = "class " if inspect.isclass(value) else ""
    shown = "" if dataclasses.is_dataclass(value) or getattr(value, "_is_protocol", False) else _signature(value)
    parts = [f"\n### {name}\n\n    {kind}{name}{shown}\n", _text(value)]
    if inspect.isclass(value):
        if dataclasses.is_dataclass(value):
            lines = [f"    {field.name}: {_type(field.type)}{_default(field)}" for field in dataclasses.fields(value)]
            parts.append("\nFields:\n\n" + "\n".join(lines) + "\n")
        for method, function in vars(value).items():
            inner = function.__func__ if isinstance(function, classmethod | staticmethod) else function
            if inspect.isfunction(inner) and not method.startswith("_") and inner.__doc__:
                parts.append(f"\n#### {name}.{method}\n\n    {method}{_signature(inner)}\n{_text(inner)}")
    return "".join(parts)


def _signature(function: Any) -> str:
    try:
        return str(inspect.signature(function)).replace("'", "")
    except ValueError:  # an exception's own constructor
        return ""


def _text(value: Any) -> str:
    return f"\n```text\n{inspect.cleandoc(value.__doc__ or '')}\n```\n"


def _type(written: Any) -> str:
    return str(written).replace("'", "")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {field.default!r}"
    return " = ..." if field.default_factory is not dataclasses.MISSING else ""


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
