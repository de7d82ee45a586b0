"""Rows as verl, EasyR1, TRL and ms-swift write them become ours, with their images and gold."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes import prepare
from rollout.config import InputsConfig
from rollout.inputs.processor import InputProcessor
from rsgrpo.config.train import DataConfig, PromptConfig
from rsgrpo.data.dataset import load_prompts
from rsgrpo.data.foreign import trainer_of
from rsgrpo.errors import InputError


@pytest.fixture
def page(tmp_path: Path, page_images, monkeypatch) -> bytes:
    """The bytes of a page, which also lies in the working folder."""
    monkeypatch.chdir(tmp_path)
    content = Path(page_images[0]).read_bytes()
    Path("page.png").write_bytes(content)
    return content


def user(content) -> dict:
    return {"role": "user", "content": content}


def foreign_rows(page: bytes) -> dict[str, dict]:
    packed = {"bytes": page, "path": None}
    parts = [{"type": "image"}, {"type": "text", "text": "how many?"}]
    return {
        "verl": {
            "data_source": "slides",
            "prompt": [{"role": "system", "content": "be brief"}, user("<image>how many?")],
            "images": [packed],
            "ability": "vqa",
            "reward_model": {"style": "rule", "ground_truth": "7"},
            "extra_info": {"split": "train", "index": 3},
        },
        "easyr1": {"problem": "how many?", "answer": "7", "images": [packed]},
        "trl": {
            "prompt": [user(parts)],
            "images": [packed],
            "solution": "7",
        },
        "swift": {"messages": [user("<image>how many?")], "images": ["page.png"], "solution": "7"},
    }


@pytest.mark.parametrize("trainer", ["verl", "easyr1", "trl", "swift"])
def test_a_row_of_another_trainer_becomes_ours(page, trainer, tiny_model_path, capsys):
    row = foreign_rows(page)[trainer]
    assert trainer_of(row) == trainer
    pq.write_table(pa.Table.from_pylist([row]), "theirs.parquet")
    assert prepare.main(["convert", "theirs.parquet", "--from", trainer, "--out", "ours.jsonl"]) == 0
    [converted] = [json.loads(line) for line in Path("ours.jsonl").read_text().splitlines()]
    assert converted["prompt"] == "<image>how many?"
    assert converted["answer"] == ["7"]
    [image] = converted["image"]
    assert Path(image).read_bytes() == page
    if trainer == "verl":
        assert (converted["id"], converted["data_source"], converted["extra_info"]["index"]) == ("train-3", "slides", 3)
        assert "system message 'be brief'" in capsys.readouterr().out
    processor = InputProcessor(tiny_model_path, InputsConfig(784, 12544))
    assert load_prompts("ours.jsonl", DataConfig(), PromptConfig(), processor)[0].truth["answers"] == ["7"]


def test_the_trainer_is_told_by_the_columns_and_responses_to_imitate_are_kept(page):
    seven = {"role": "assistant", "content": "seven"}
    chats = [
        {
            "prompt": [user("<image>how many?")],
            "completion": [seven],
            "images": ["page.png"],
        },
        {"messages": [user("<image>how many?"), seven], "images": ["page.png"]},
    ]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    assert prepare.main(["convert", "chats.jsonl", "--out", "ours.jsonl"]) == 0
    assert [json.loads(line)["answer"] for line in Path("ours.jsonl").read_text().splitlines()] == ["seven", "seven"]


@pytest.mark.parametrize("trainer", ["verl", "easyr1", "trl"])
def test_a_run_that_is_given_such_rows_names_the_command(page, trainer, tiny_model_path):
    pq.write_table(pa.Table.from_pylist([foreign_rows(page)[trainer]]), "theirs.parquet")
    processor = InputProcessor(tiny_model_path, InputsConfig(784, 12544))
    with pytest.raises(InputError, match=rf"recipes\.prepare convert FILE --from {trainer} --out rows\.jsonl"):
        load_prompts("theirs.parquet", DataConfig(), PromptConfig(), processor)


@pytest.mark.parametrize(
    ("row", "trainer", "message"),
    [
        ({"prompt": [user("a")], "reward_model": {}}, "verl", "needs reward_model with ground_truth"),
        ({"answer": "7"}, "easyr1", "needs the text column problem"),
        (
            {"prompt": [user("a"), user("b")], "solution": "7"},
            "trl",
            "its messages are of user, user",
        ),
        ({"messages": [user("a")]}, "swift", "no gold: a row needs solution"),
        ({"prompt": "no json", "solution": "7"}, "trl", "text that is not JSON"),
    ],
)
def test_what_cannot_be_converted_is_named(page, capsys, row, trainer, message):
    Path("rows.jsonl").write_text(json.dumps(row))
    assert prepare.main(["convert", "rows.jsonl", "--from", trainer, "--out", "ours.jsonl"]) == 2
    assert message in capsys.readouterr().out
