"""Law 8: every key is declared with its meaning, read by something, and in the reference of keys."""

from __future__ import annotations

import ast
import dataclasses
import re
import runpy
import typing
from functools import cache

import pytest

from rollout.keys import keys_of, sections
from tests.material import ROOT

REFERENCE = runpy.run_path(str(ROOT / "tools/config_reference.py"))
PROGRAMS = REFERENCE["PROGRAMS"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_key_has_a_sentence(program):
    for section in sections(PROGRAMS[program]):
        assert section.about.endswith((".", ")."))
        for name, about in section.keys.items():
            assert re.fullmatch(r"[A-Z0-9\"'a-z].*[.]", about.help), f"{section.name(name)}: {about.help}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_field_is_a_key_or_a_part(program):
    for schema in config_classes(PROGRAMS[program]):
        parts = {name for name, hint in typing.get_type_hints(schema).items() if dataclasses.is_dataclass(hint)}
        assert set(keys_of(schema)) | parts == {field.name for field in dataclasses.fields(schema)}


def test_the_reference_of_keys_is_up_to_date():
    text = (ROOT / "docs/reference/configuration.md").read_text()
    assert text == REFERENCE["document"](text), "run: python tools/config_reference.py"


# These decide only whether a configuration is refused, and with which message.
CHECK_ONLY = {"allow_biased_sampling", "made_by"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_key_is_read_by_something(program):
    schemas = config_classes(PROGRAMS[program])
    declared = {name for schema in schemas for name in keys_of(schema)}
    assert declared - attributes_read(counts_plan=program == "rsgrpo.plan") <= CHECK_ONLY


def config_classes(schema: type) -> set[type]:
    hints = typing.get_type_hints(schema)
    inner = [hint for hint in hints.values() if dataclasses.is_dataclass(hint)]
    return {schema}.union(*(config_classes(typing.cast(type, hint)) for hint in inner))


@cache
def attributes_read(*, counts_plan: bool) -> set[str]:
    """Names read as an attribute anywhere but where keys are declared, checked and planned with."""
    rooms = ["rsgrpo/config/train", "rsgrpo/config/learner", "rsgrpo/config/checks", "rsgrpo/cli", "rollout/config",
             "recipes/retrieval/training/config", "rsgrpo/plan/config"]  # fmt: skip
    rooms += [] if counts_plan else ["rsgrpo/plan/__main__", "rsgrpo/plan/memory"]
    not_counted = {f"{room}.py" for room in rooms}
    names = set()
    for room in ("rsgrpo", "recipes", "rewards", "rollout"):
        for path in (ROOT / room).rglob("*.py"):
            if str(path.relative_to(ROOT)) not in not_counted:
                for node in ast.walk(ast.parse(path.read_text())):
                    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                        names.add(node.attr)
    return names
