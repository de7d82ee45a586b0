"""Print how large each room is: `python tools/size.py [--ref COMMIT]`.

For every folder of code: files, lines, lines of pure code (without blank lines, comments and docstrings), the largest
file, the longest function and the entries of its fullest level. `--ref` measures a commit of this repository instead
of the working tree, so that two runs show before and after.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parent.parent
ROOMS = ("rsgrpo", "rollout", "rewards", "recipes", "tests", "benchmarks", "tools")
CORE = ("rsgrpo", "rollout", "rewards")
READING_PATH = ("rsgrpo/train.py", "rsgrpo/running/run.py", "rsgrpo/types.py", "rsgrpo/algorithm/")
SKIPPED_TOKENS = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Measures of one file: its lines, those of pure code, and its longest function with its length in lines."""

    path: str
    lines: int
    code_lines: int
    longest_function: str
    function_lines: int


def measure(path: str, text: str) -> Size:
    """Return the measures of one Python file."""
    tree = ast.parse(text)
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in SKIPPED_TOKENS
        for line in range(token.start[0], token.end[0] + 1)
    }
    longest, length = "", 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                code -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > length:
                longest, length = node.name, lines
    return Size(path, text.count("\n"), len(code), longest, length)


def sources(ref: str | None) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of every Python file of the working tree, or of a commit."""
    listing = ["git", "ls-tree", "-r", "--name-only", ref] if ref else ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in sorted(names):
        if name.endswith(".py") and name.partition("/")[0] in ROOMS:
            if ref:
                show = ["git", "show", f"{ref}:{name}"]
                yield name, subprocess.run(show, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            elif (ROOT / name).is_file():
                yield name, (ROOT / name).read_text(encoding="utf-8")


def levels(paths: list[str]) -> dict[str, int]:
    """Return how many entries each folder has; `__init__.py` is not one."""
    entries: dict[str, set[str]] = {}
    for path in map(PurePosixPath, paths):
        for depth in range(1, len(path.parts)):
            name = path.parts[depth]
            if name != "__init__.py":
                entries.setdefault("/".join(path.parts[:depth]), set()).add(name)
    return {folder: len(names) for folder, names in entries.items()}


def row(name: str, sizes: list[Size], entries: dict[str, int]) -> list[str]:
    """Return one line of the table."""
    largest = max(sizes, key=lambda size: size.lines)
    longest = max(sizes, key=lambda size: size.function_lines)
    inside = {folder: count for folder, count in entries.items() if folder == name or folder.startswith(name + "/")}
    fullest = max(inside, key=lambda folder: inside[folder], default="")
    return [
        name,
        str(len(sizes)),
        f"{sum(size.lines for size in sizes):,}",
        f"{sum(size.code_lines for size in sizes):,}",
        f"{PurePosixPath(largest.path).name} {largest.lines}",
        f"{longest.longest_function} {longest.function_lines}" if longest.function_lines else "",
        f"{fullest} {inside[fullest]}" if fullest else "",
    ]


def table(ref: str | None) -> list[list[str]]:
    """Return the whole table, headings first."""
    sizes = [measure(path, text) for path, text in sources(ref)]
    entries = levels([size.path for size in sizes])
    rows = [["room", "files", "lines", "code", "largest file", "longest function", "fullest level"]]
    for room in ROOMS:
        folders = [
            room,
            *sorted(folder for folder in entries if folder.count("/") == 1 and folder.startswith(room + "/")),
        ]
        for folder in folders:
            inside = [size for size in sizes if size.path.startswith(folder + "/")]
            if inside:
                rows.append(row(folder, inside, entries))
    core = [size for size in sizes if size.path.partition("/")[0] in CORE]
    path = [size for size in sizes if size.path.startswith(READING_PATH)]
    return [*rows, row("core (rsgrpo, rollout, rewards)", core, {}), *([row("reading path", path, {})] if path else [])]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ref", help="a commit to measure instead of the working tree")
    rows = table(parser.parse_args().ref)
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    for line in rows:
        cells = [
            cell.rjust(width) if 1 <= i <= 3 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
