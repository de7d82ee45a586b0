"""Other layouts: packed images to files, tables and SFT files to our rows, and the row-by-row report."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from recipes import prepare

GOLD = "<evidence>\n[1]: Sweden 16%\n[2]: no relevant information\n</evidence>\n<answer>16%</answer>"
WHOLE = f"<observe>two pages</observe>\n{GOLD}".replace("<answer>", "<think>from [1]</think>\n<answer>")
PROMPT = "[1]<image>[2]<image>what share had Sweden?"


def png(shade: int = 255) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def write_pack(path: Path, images: dict[str, bytes]) -> None:
    cells = [{"bytes": content, "path": name} for name, content in images.items()]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "path": list(images)}), path)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """EVisRAG-Train as it is published: rows beside an images.parquet."""
    folder = tmp_path / "packed"
    row = {"prompt": PROMPT, "answer": GOLD, "image": ["images/a.png", "images/b.png"]}
    write_rows(folder / "train.jsonl", [row])
    write_pack(folder / "images.parquet", {"images/a.png": png(), "images/b.png": png(9)})
    return folder


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


def run(*arguments: str | Path) -> int:
    return prepare.main([str(argument) for argument in arguments])


# unpack


def test_packed_images_become_the_files_that_the_rows_name(packed, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("unpack", packed, "--out", out) == 0
    assert [(out / f"images/{name}.png").read_bytes() for name in "ab"] == [png(), png(9)]
    assert (out / "train.jsonl").read_bytes() == (packed / "train.jsonl").read_bytes()
    assert run("validate", out / "train.jsonl") == 0
    assert "all 1 rows can be used" in capsys.readouterr().out
    (out / "images/a.png").write_bytes(b"half")
    assert run("unpack", packed, "--out", out) == 0
    assert "images written  1" in capsys.readouterr().out
    assert (out / "images/a.png").read_bytes() == png()


def test_an_image_that_no_pack_has_is_named(packed, capsys):
    write_rows(packed / "more.jsonl", [{"prompt": "<image>?", "answer": GOLD, "image": ["images/c.png"]}])
    assert run("unpack", packed) == 1
    assert "no image for line 1 of more.jsonl: images/c.png" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../a.png", "/tmp/a.png", "x/../../a.png"])
def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path, name, capsys):
    write_pack(tmp_path / "images.parquet", {name: png()})
    assert run("unpack", tmp_path, "--out", tmp_path / "deep/out") == 2
    assert "leads out of the folder" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


def test_two_images_of_one_path_and_no_pack_at_all_are_refused(tmp_path, capsys):
    assert run("unpack", tmp_path) == 2
    assert "no images.parquet" in capsys.readouterr().err
    write_pack(tmp_path / "images-0.parquet", {"a.png": png()})
    write_pack(tmp_path / "images-1.parquet", {"a.png": png(1)})
    assert run("unpack", tmp_path) == 2
    assert "two different images for the path a.png" in capsys.readouterr().err


# validate


def test_every_bad_row_has_a_line_and_the_exit_code_says_so(pages, capsys):
    good = {"id": "q1", "prompt": PROMPT, "answer": GOLD, "image": ["a.png", "b.png"]}
    rows = [good] + [good | {"id": f"lost{n}", "image": ["a.png", "x.png"]} for n in range(30)]
    rows += [good, good | {"id": "q3", "answer": "16%"}, good | {"id": "q4", "prompt": "<image>?"}]
    (pages / "b.png").write_bytes(png()[:50])
    assert run("validate", write_rows(pages / "train.jsonl", rows)) == 1
    out = capsys.readouterr().out
    assert out.count("missing image: image") == 30
    for line in (
        "line 33 of train.jsonl, id q3: gold answer without <answer> tags",
        "line 34 of train.jsonl, id q4: <image> marks differ from images",
        "line 1 of train.jsonl, id q1: unreadable image",
        "34 of 34 rows cannot be used (30 x missing image",
    ):
        assert line in out


def test_a_broken_line_is_one_of_the_rows_that_cannot_be_used(pages, capsys):
    good = {"id": "q1", "prompt": PROMPT, "answer": GOLD, "image": ["a.png", "b.png"]}
    (pages / "train.jsonl").write_text("{oops\n" + json.dumps(good) + '\n{"id": "q2", "pro')
    assert run("validate", pages / "train.jsonl") == 1
    out = capsys.readouterr().out
    assert "line 1 of train.jsonl, id row-1: broken row: not valid JSON: " in out
    assert "line 3 of train.jsonl, id row-3: broken row: not valid JSON: " in out
    assert "2 of 3 rows cannot be used (2 x broken row)" in out


def test_the_flag_that_is_named_for_plain_answers_is_one_that_works(pages, capsys):
    source = write_rows(pages / "plain.jsonl", [{"id": "q1", "prompt": "what colour?", "answer": "red"}])
    assert run("validate", source) == 1
    assert "for rows with plain answers, set --gold rewards.gold:plain" in capsys.readouterr().out
    assert run("validate", source, "--gold", "rewards.gold:plain") == 0


def test_rows_for_sft_need_the_whole_response_and_the_columns_of_training(pages, capsys):
    rows = [{"id": name, "prompt": PROMPT, "answer": text, "image": ["a.png", "b.png"]}
            for name, text in (("short", GOLD), ("whole", WHOLE))]  # fmt: skip
    source = write_rows(pages / "sft.jsonl", rows)
    assert run("validate", source) == 0
    assert run("validate", source, "--for", "sft") == 1
    out = capsys.readouterr().out
    assert "line 1 of sft.jsonl, id short: no whole response" in out
    assert "1 of 2 rows" in out
    row = {"id": "q1", "prompt": PROMPT, "answer": GOLD, "images": ["a.png", "b.png"]}  # training does not read images
    assert run("validate", write_rows(pages / "train.jsonl", [row])) == 1
    assert "gold evidence has 2 entries for 0 images" in capsys.readouterr().out


def test_test_rows_have_their_own_names_and_plain_answers(pages, capsys):
    row = {"qid": 7, "query": "what share?", "image": ["a.png"], "answer": ["16%", "0.16"], "is_sufficient": True}
    rows = [row, row | {"qid": 8, "answer": "16%"}, row | {"qid": 9, "query": ""}]
    source = write_rows(pages / "top3_test.jsonl", rows)
    assert run("validate", source, "--for", "test") == 1
    out = capsys.readouterr().out
    assert "line 3 of top3_test.jsonl, id 9: empty prompt" in out
    assert "1 of 3 rows" in out


# convert


def test_own_questions_become_rows_that_training_reads(pages, capsys):
    rows: list[dict[str, Any]] = [
        {"id": 1, "question": "share?", "images": ["a.png", "b.png"], "answers": ["16%"], "evidence": ["16%", "-"]},
        {"query": "tagged?", "image": "a.png", "answer": "<evidence>[1]: 5</evidence><answer>5</answer>"},
        {"question": "bare?", "image": "a.png", "answer": 5},
    ]
    source = write_rows(pages / "mine.jsonl", rows)
    out = pages / "new/train.jsonl"
    assert run("convert", source, "--out", out) == 0
    first, second, third = rows_of(out)
    assert (first["id"], first["image"]) == ("1", ["../a.png", "../b.png"])
    assert (first["answer"], first["evidence"]) == (["16%"], ["16%", "-"])
    assert first["prompt"].startswith("[1]: <image>\n[2]: <image>\n")
    assert second["id"] == "mine-000002"
    assert third["answer"] == ["5"]
    assert run("validate", out) == 0


def test_a_table_is_read_with_lists_in_cells(pages):
    source = pages / "mine.csv"
    source.write_text(
        '\ufeffid,question,images,answer,evidence\nq1,"how much, and why?",a.png; b.png,16%,"[""16%"", ""none""]"\n'
        "q2,which?,a.png,\"[\"\"x\"\", \"\"y\"\"]\",\n"
    )  # fmt: skip
    assert run("convert", source, "--out", pages / "out.jsonl") == 0
    first, second = rows_of(pages / "out.jsonl")
    assert (first["question"], first["image"]) == ("how much, and why?", ["a.png", "b.png"])
    assert (first["answer"], first["evidence"]) == (["16%"], ["16%", "none"])
    assert (second["answer"], "evidence" in second) == (["x", "y"], False)


def test_sharegpt_alpaca_and_messages_files_become_sft_rows(pages, capsys):
    shared = {"images": ["a.png", "b.png"], "system": "be exact"}
    sharegpt = {"conversations": [{"from": "human", "value": PROMPT}, {"from": "gpt", "value": WHOLE}], **shared}
    said = {"system": "be exact", "user": PROMPT, "assistant": WHOLE}
    messages = {
        "messages": [{"role": role, "content": text} for role, text in said.items()],
        "images": shared["images"],
    }
    alpaca = {"instruction": "[1]<image>[2]<image>", "input": "what share?", "output": WHOLE, "history": [], **shared}
    (pages / "llama.json").write_text(json.dumps([sharegpt, messages, alpaca]))
    out = pages / "sft.jsonl"
    assert run("convert", pages / "llama.json", "--out", out) == 0
    assert "All rows have the system message 'be exact'" in capsys.readouterr().out
    rows = rows_of(out)
    assert [row["prompt"] for row in rows] == [PROMPT, PROMPT, "[1]<image>[2]<image>\nwhat share?"]
    assert {row["answer"] for row in rows} == {WHOLE}
    assert run("validate", out, "--for", "sft") == 0


def turns(*roles: str) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": "text"} for role in roles]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (turns("human", "gpt", "human", "gpt"), "this conversation has human, gpt, human, gpt"),
        (turns("gpt"), "this conversation has gpt"),
        (turns("human", "gpt") | {"tools": "x"}, "column 'tools' cannot be converted"),
        (turns("human", "gpt") | {"images": ["a.png"]}, "0 <image> marks for 1 images"),
        ({"conversations": "text"}, "a conversation must be a list"),
        ({"conversations": [{"from": "system", "value": None}]}, "the system message must be text, got None"),
        ({"instruction": "x"}, "an alpaca row needs"),
        ({"instruction": "x", "output": "y", "history": [["a", "b"]]}, "column 'history'"),
        ([1], "a row must be a JSON object, got list"),
        ({"question": "x"}, "no gold answer"),
        ({"answer": "x"}, "no question"),
        ({"question": "x", "answer": "y", "image": ["gone.png"]}, "gone.png does not exist"),
        ({"question": "x", "answer": "y", "image": [5]}, "an image must be a path"),
        ({"question": "x", "answer": "y", "image": ["bad.png"]}, "bad.png cannot be read"),
        ({"question": "x", "answer": ["y"], "image": "a.png", "evidence": ["1", "2"]}, "2 entries for 1 images"),
    ],
)
def test_a_row_that_cannot_be_converted_is_named_and_stops_all_unless_dropped(pages, row, says, capsys):
    (pages / "bad.png").write_bytes(b"no image")
    source = write_rows(pages / "mine.jsonl", [row, {"question": "x", "answer": "y", "image": "a.png"}])
    out = pages / "out.jsonl"
    assert run("convert", source, "--out", out) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("line 1 of mine.jsonl: ")
    assert says in captured.out
    assert "1 of 2 rows cannot be converted, and nothing was written" in captured.err
    assert not out.exists()
    assert run("convert", source, "--out", out, "--drop-bad") == 0
    assert len(rows_of(out)) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("question,answer\na,b,c\n", "more cells than the header"),
        ("question,answer\na,[b\n", "is not a JSON list"),
        ("question,answer\n", "has no rows"),
        ('question,answer\n"a,b\n', "cannot be read as a table"),
    ],
)
def test_a_broken_table_is_one_line(tmp_path, text, says, capsys):
    (tmp_path / "mine.csv").write_text(text)
    assert run("convert", tmp_path / "mine.csv", "--out", tmp_path / "out.jsonl") == 2
    assert says in capsys.readouterr().err


def test_different_system_messages_are_refused(tmp_path, capsys):
    rows = [turns("human", "gpt") | {"system": system} for system in ("a", "b")]
    assert run("convert", write_rows(tmp_path / "x.jsonl", rows), "--out", tmp_path / "out.jsonl") == 2
    assert "rows with different system messages" in capsys.readouterr().err
