"""What a key declares beside its field, and how a message names it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from rollout.errors import ConfigError, InputError
from rollout.keys import as_named, check, key, keys_of, named


@dataclass(frozen=True)
class Pages:
    """A part of a configuration."""

    count: int = key(5, "Pages per question.", ge=0)
    share: float = key(0.5, "Share of them.", gt=0, le=1)
    clip: float = key(3.0, "A bound on the loss.", gt=1, off=0)
    kind: Literal["scan", "slide"] = key("scan", "What a page is.")
    names: list[str] = key(["a"], "Their names.")
    other: int = field(default=0)

    def __post_init__(self) -> None:
        check(self, "pages")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"count": "x"}, "pages.count must be a number, got 'x'"),
        ({"kind": 3}, "pages.kind must be a text, got 3"),
        ({"names": "a"}, "pages.names must be a list, got 'a'"),
        ({"count": -1}, "pages.count must be >= 0, got -1"),
        ({"share": 0.0}, "pages.share must be in (0, 1], got 0"),
        ({"share": 1.5}, "pages.share must be in (0, 1], got 1.5"),
        ({"clip": 0.5}, "pages.clip must be 0 (off) or > 1, got 0.5"),
        ({"kind": "scann"}, "pages.kind must be one of scan, slide; got 'scann'; did you mean scan?"),
    ],
)
def test_a_value_out_of_its_bounds_names_the_key_the_bounds_and_the_value(values, said):
    with pytest.raises(ConfigError) as error:
        Pages(**values)
    assert str(error.value) == said


def test_what_is_allowed_is_accepted_and_mutable_defaults_are_not_shared():
    assert Pages(count=0, share=1.0, clip=0, kind="slide").clip == 0
    assert Pages().names is not Pages().names
    assert list(keys_of(Pages)) == ["count", "share", "clip", "kind", "names"]


def test_errors_name_a_setting_as_the_command_line_calls_it():
    with pytest.raises(ConfigError, match=r"^--pages must be >= 0, got -1$"), named({"pages.count": "--pages"}):
        Pages(count=-1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("set rollout.engine=hf.", "set --engine hf."),
        ("lower rollout.engine, or", "lower --engine, or"),
        ("rollout.engine= is empty", "--engine= is empty"),
        ("my/rollout.engine and rollout.engine.yaml and rollout.engines", None),
    ],
)
def test_only_whole_keys_are_renamed(text, expected):
    assert as_named(text, {"rollout.engine": "--engine"}) == (expected or text)


def test_an_error_keeps_its_class():
    with pytest.raises(InputError) as error, named({"a.b": "--b"}):
        raise InputError("a.b is wrong")
    assert (type(error.value), str(error.value)) == (InputError, "--b is wrong")


def test_a_command_line_is_blamed_by_its_own_option():
    command = [sys.executable, "-m", "recipes.infer", "how much?", "--model", "nowhere", "--max-images", "-1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (2, "error: --max-images must be >= 0, got -1\n")
