"""The English of messages, docstrings, comments and pages: phrases that a native reader would stumble over.

Facts about prose belong to people; this holds the phrases that were once written everywhere and must not come back.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("rsgrpo", "rollout", "rewards", "recipes", "benchmarks", "tools", "conf")
CODE = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "conf").rglob("*.yaml"), ROOT / "Makefile"]
)

BANNED = {
    r"\bfor want of\b": "because there is no, without",
    r"\bborne\b": "tolerated",
    r"\banew\b": "again",
    r"\bso many\b": "name the number",
    r"\bholds? nothing back\b": "say what it does",
    r"\bsaid once\b": "logged once",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\bfor ever\b": "forever, or a bound",
    r"\bknows nothing of\b": "say what the module does",
    r"(?<!there )(?<!There )\bis no (?!longer|more|such|less|fewer|better|worse)\w": "is not a",
    r"\bcannot be had\b": "is not supported",
    r"\blooks why\b": "finds out why",
    r"\bwould mean anything\b": "would be meaningless",
    r"\bnothing learnt\b": "say what is meaningless",
    r"\b(?:goes?|going|went|gone) on from\b": "resume from",
    r"\bthe same command goes on\b": "run the same command to resume",
    r"\bgo on with it\b": "resume it",
    r"\bstands (?:in|on|for|beside|at|here|there|elsewhere|by)\b": "is",
    r"\bin a row are\b": "consecutive",
    r"\bnewest ones to keep\b": "number of most recent checkpoints to keep",
}
"""Phrase (a regular expression, case ignored) and what to write instead."""
ANY_BANNED = re.compile("|".join(BANNED), re.IGNORECASE)


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of all strings and comments of a Python file, or of all lines of another file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            yield from enumerate(token.string.splitlines(), token.start[0])


def findings(path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {found[0]!r} (write: {better})"
        for line, text in prose(path)
        if ANY_BANNED.search(text)
        for phrase, better in BANNED.items()
        for found in re.finditer(phrase, text, re.IGNORECASE)
    ]


@pytest.mark.parametrize("where", [*ROOMS, "pages"])
def test_no_banned_phrase(where):
    files = PAGES if where == "pages" else [path for path in CODE if path.relative_to(ROOT).parts[0] == where]
    assert files
    assert [found for path in files for found in findings(path)] == []


def test_the_search_finds_phrases_in_strings_comments_and_f_strings(tmp_path):
    code = tmp_path / "module.py"
    code.write_text('"""Stopped for want of rows."""\nx = f"{1} failures are borne"  # mend it\nborne = 1\n')
    assert sum(bool(re.search(phrase, text)) for _, text in prose(code) for phrase in BANNED) == 3


def test_messages_point_to_nothing_that_an_installed_wheel_lacks():
    """Only packages are installed: no docs/, no tests/, no tools/, and the package is on no index."""
    wrong = []
    for path in CODE:
        if path.relative_to(ROOT).parts[0] in ("benchmarks", "tools"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                for found in re.finditer(r"\b(?:docs|tests|tools|benchmarks)/\w|pip install [\"']?rsgrpo", node.value):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {found[0]!r}")
    assert wrong == []
