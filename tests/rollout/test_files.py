"""A file is whole or as it was; JSON lines name the line that is wrong."""

from __future__ import annotations

import pytest

from rollout.errors import InputError
from rollout.files import read_jsonl, replaced, write_bytes, write_text


def test_a_file_is_replaced_in_one_move(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "a.txt", "new")
    write_bytes(tmp_path / "b", b"\x00")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b"]


def test_an_exception_leaves_the_old_content_and_no_temporary_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(FileNotFoundError), replaced(tmp_path / "a.txt") as unfinished:  # noqa: PT012
        unfinished.write_text("half")
        (tmp_path / "absent").read_text()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_json_lines_are_numbered_and_blank_ones_passed_over(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"b": 2}')
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == [(1, {"a": 1}), (3, {"b": 2})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[1]", "line 2: must be a JSON object, got list"),
        ("{", "line 2: not valid JSON"),
        ("[" * 100_000, "line 2: not usable JSON: it is nested too deeply"),
    ],
)
def test_a_line_that_is_no_object_is_named(tmp_path, line, reason):
    (tmp_path / "rows.jsonl").write_text("{}\n" + line)
    with pytest.raises(InputError, match=reason):
        list(read_jsonl(tmp_path / "rows.jsonl"))
    with pytest.raises(InputError, match=r"absent.jsonl cannot be read: No such file"):
        list(read_jsonl(tmp_path / "absent.jsonl"))
