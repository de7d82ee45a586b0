"""Every file of the project is written whole or not at all: through `rollout.files`, or into a folder that is."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.material import ROOT

SAFE = ("replaced(", "replaced_folder(")
WRITERS = {
    "write_text",
    "write_bytes",
    "write_table",
    "ParquetWriter",
    "save_file",
    "write_index",
    "savez",
    "to_parquet",
}
ELSEWHERE = {
    "recipes/serve/documents.py": "an upload, in the scratch folder of its request",
    "rsgrpo/learning/export.py": "into the unfinished folder of Run.finish",
    "rsgrpo/records/integrity.py": "into an unfinished checkpoint or export",
    "rsgrpo/report/line_chart.py": "pictures of the documentation, on request",
    "rsgrpo/report/model_card.py": "into the unfinished export",
    "rsgrpo/running/checkpoint.py": "into the unfinished checkpoint",
    "rsgrpo/running/driver_state.py": "into the unfinished checkpoint",
    "recipes/app.py": "a download of one visit, in the process's own scratch folder",
    "recipes/demo/desk_rows.py": "into an unfinished data folder",
    "recipes/demo/evisrag_layout.py": "into an unfinished data folder",
    "recipes/demo/rows.py": "into an unfinished data folder",
    "recipes/demo/shapes.py": "into an unfinished data folder",
    "recipes/files/whole_folder.py": "into the folder that it makes whole",
    "recipes/retrieval/encoders/visrag_ret.py": "a script that users copy",
    "recipes/retrieval/evaluation/visrag_sets.py": "images of an unpacked benchmark, made again by repeating",
    "recipes/retrieval/pages/confined.py": "files of the kernel",
    "recipes/retrieval/pages/djvu.py": "output of programs, in the scratch folder of a conversion",
    "recipes/retrieval/pages/tasks.py": "into the unfinished folder of a document",
    "recipes/retrieval/pages/mail_and_books.py": "into the scratch folder of a conversion",
    "recipes/retrieval/pages/store.py": "the lock file, which has no content that counts",
}
"""File -> why its writes need not go through `rollout.files`."""


def unsafe_writes(tree: ast.AST, is_safe: bool = False) -> Iterator[str]:
    """Yield the calls that write a file outside a block of `replaced` or `replaced_folder`; appending is no such."""
    if isinstance(tree, ast.With | ast.AsyncWith):
        is_safe = is_safe or any(word in ast.unparse(item.context_expr) for item in tree.items for word in SAFE)
    if isinstance(tree, ast.Call) and not is_safe:
        function = tree.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        texts = {word.value for word in ast.walk(tree) if isinstance(word, ast.Constant)}
        truncates = name == "open" and not texts.isdisjoint(("w", "wb", "w+", "w+b", "wt", "x", "xb"))
        if truncates or (name in WRITERS and isinstance(function, ast.Attribute)):
            yield ast.unparse(tree)
    for child in ast.iter_child_nodes(tree):
        yield from unsafe_writes(child, is_safe)


def test_every_writer_is_atomic_or_says_why_not():
    found = {}
    for room in ("rollout", "rsgrpo", "recipes"):
        for path in (ROOT / room).rglob("*.py"):
            if calls := [
                call for call in unsafe_writes(ast.parse(path.read_text())) if "write_bytes(path," not in call
            ]:
                found[path.relative_to(ROOT).as_posix()] = calls
    assert {name: calls for name, calls in found.items() if name not in ELSEWHERE} == {}
    assert sorted(ELSEWHERE.keys() - found.keys()) == [], "these need no reason any more"


def test_the_scan_sees_what_it_should():
    text = "with replaced(a) as b:\n    b.write_text('x')\nopen(a, 'w')\nopen(a, 'a')\nopen(a)\na.write_bytes(b'')"
    assert list(unsafe_writes(ast.parse(text))) == ["open(a, 'w')", "a.write_bytes(b'')"]


DIES = """
import os, signal, sys
from rollout.files import replaced
with replaced(sys.argv[1]) as unfinished, open(unfinished, "wb") as file:
    for byte in b"the new content":
        if file.tell() == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        file.write(bytes([byte]))
        file.flush()
"""


@pytest.mark.parametrize("torn_at", [0, 1, 7, 14])
def test_a_file_that_is_torn_at_any_byte_is_the_old_one(tmp_path, torn_at):
    path = tmp_path / "file"
    path.write_bytes(b"the old content")
    command = [sys.executable, "-c", DIES, str(path), str(torn_at)]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"the old content"
