"""The help of command lines: a sentence for every option, and its default, if it has one, once."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator

import pytest

PARSERS = ("infer", "prepare", "retrieve", "app", "serve.server", "synthesize.commands")


def with_commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from with_commands(command)


@pytest.mark.parametrize("program", PARSERS)
def test_every_option_is_explained(program):
    for parser in with_commands(importlib.import_module(f"recipes.{program}").parser()):
        silent = [action.dest for action in parser._actions if not action.help and action.nargs != "A..."]
        assert silent == [], parser.prog
        shown = " ".join(parser.format_help().split())
        assert not re.search(r"\(default: (None|\[\]|)\)", shown), parser.prog
        repeated = [text for text in re.split(r" --", shown) if len(re.findall(r"default:", text, re.IGNORECASE)) > 1]
        assert repeated == [], parser.prog


def test_a_default_of_zero_is_shown():
    shown = " ".join(importlib.import_module("recipes.infer").parser().format_help().split())
    assert "Seed of the sampling. (default: 0)" in shown
    assert "Sampling temperature; 0 is greedy. (default: 0.0)" in shown
