"""Write the "All keys" section of docs/reference/configuration.md from the docstrings of the configuration classes.

Run it after a key was added or changed: `python tools/config_reference.py` (`make format` does). A test compares.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from pathlib import Path

from rsgrpo.config.train import SftConfig, TrainConfig

DOCUMENT = Path(__file__).parent.parent / "docs" / "reference" / "configuration.md"
HEADING = "## All keys\n"


def document(text: str) -> str:
    """Return the document with a fresh section of keys at its end."""
    head = text.partition(HEADING)[0]
    sections = [*_sections(TrainConfig, ""), *_sections(SftConfig, "", nested=False)]
    return head + HEADING + "".join(sections)


def _sections(schema: type, key: str, nested: bool = True) -> list[str]:
    hints = typing.get_type_hints(schema)
    inner = {field.name: hints[field.name] for field in dataclasses.fields(schema)}
    groups = {name: hint for name, hint in inner.items() if dataclasses.is_dataclass(hint)}
    title = f"`{key}`" if key else f"Top level of `{schema.__name__}`"
    paragraphs = inspect.cleandoc(schema.__doc__ or "").split("\n\n")
    lines = [f"\n### {title}\n", "\n" + " ".join(paragraphs[0].split()) + "\n"]
    names = "|".join(field.name for field in dataclasses.fields(schema))
    entries = _entries("\n\n".join(paragraphs[1:]), names)
    if entries:
        lines.append("\n" + "".join(f"- {entry}\n" for entry in entries))
    defaults = [f"`{field.name}={_default(field)}`" for field in dataclasses.fields(schema) if field.name not in groups]
    lines.append(f"\nDefaults: {', '.join(defaults)}\n")
    if nested:
        for name, hint in groups.items():
            lines += _sections(typing.cast(type, hint), f"{key}.{name}".lstrip("."))
    return lines


def _entries(body: str, names: str) -> list[str]:
    """One entry for each docstring line that starts with key names; indented lines belong to the one before."""
    found: list[str] = []
    for line in body.splitlines():
        if line.startswith(" ") and found:
            found[-1] += " " + line.strip()
        elif line.strip():
            found.append(line.strip())
    return [re.sub(rf"(^|(?<=\. ))((?:{names})(?:, (?:{names}))*):", r"`\2`:", entry) for entry in found]


def _default(field: dataclasses.Field[typing.Any]) -> str:
    value = field.default
    if callable(field.default_factory):
        value = field.default_factory()
    return value if isinstance(value, str) and value else json.dumps(value)


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
