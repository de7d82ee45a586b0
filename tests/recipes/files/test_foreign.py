"""Rows as verl, EasyR1, TRL and ms-swift write them become ours, with their images and gold."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes import prepare
from recipes.answers.questions import read_questions
from recipes.files.row_check import check_rows
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


@pytest.mark.parametrize("trainer", ["verl", "easyr1", "trl", "swift"])
def test_training_and_evaluation_read_such_rows_as_they_are(page, trainer, tiny_model_path):
    pq.write_table(pa.Table.from_pylist([foreign_rows(page)[trainer]] * 2), "theirs.parquet")
    processor = InputProcessor(tiny_model_path, InputsConfig(784, 12544))
    data = DataConfig(bad_rows="drop")  # the second verl row has the first one's id
    [prompt, *_] = load_prompts("theirs.parquet", data, PromptConfig(), processor)
    images = ("page.png",) if trainer == "swift" else (page,)
    assert (prompt.text, prompt.question, prompt.images) == ("<image>how many?", "how many?", images)
    assert prompt.truth["answers"] == ["7"]
    if trainer == "verl":
        assert (prompt.id, prompt.system, prompt.truth["data_source"]) == ("train-3", "be brief", "slides")
    [question, _] = read_questions("theirs.parquet", need_answers=True)
    assert (question.question, question.images, question.answers) == ("how many?", images, ("7",))


def test_a_prompt_of_the_run_replaces_the_messages_of_such_rows(page, tiny_model_path):
    pq.write_table(pa.Table.from_pylist([foreign_rows(page)["verl"]]), "theirs.parquet")
    processor = InputProcessor(tiny_model_path, InputsConfig(784, 12544))
    own = PromptConfig(template="{images} {question}", system="be exact")
    [prompt] = load_prompts("theirs.parquet", DataConfig(), own, processor)
    assert (prompt.text, prompt.system) == ("[1]: <image> how many?", "be exact")


def test_no_row_of_theirs_is_said_to_lack_images(page, tiny_model_path, caplog):
    pq.write_table(pa.Table.from_pylist([foreign_rows(page)["verl"]]), "theirs.parquet")
    load_prompts(
        "theirs.parquet", DataConfig(), PromptConfig(), InputProcessor(tiny_model_path, InputsConfig(784, 12544))
    )
    assert caplog.text == ""


def test_a_row_that_lacks_its_gold_is_a_bad_row(page, tiny_model_path):
    row = foreign_rows(page)["verl"] | {"reward_model": {"style": "rule"}}
    Path("theirs.jsonl").write_text(json.dumps(row | {"images": ["page.png"]}))
    with pytest.raises(InputError, match="a row for verl needs reward_model with ground_truth"):
        load_prompts(
            "theirs.jsonl", DataConfig(), PromptConfig(), InputProcessor(tiny_model_path, InputsConfig(784, 12544))
        )


def test_a_run_that_is_given_rows_of_llamafactory_names_the_command(page, tiny_model_path):
    row = {"messages": [user("<image>how many?"), {"role": "assistant", "content": "7"}], "images": ["page.png"]}
    Path("theirs.jsonl").write_text(json.dumps(row))
    processor = InputProcessor(tiny_model_path, InputsConfig(784, 12544))
    with pytest.raises(InputError, match=r"recipes\.prepare convert FILE --from llamafactory --out rows\.jsonl"):
        load_prompts("theirs.jsonl", DataConfig(), PromptConfig(), processor)
    Path("theirs.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    report = "\n".join(check_rows("theirs.jsonl", "grpo", InputsConfig(784, 12544)).lines())
    assert "2 of 2 rows cannot be used (2 x row for another trainer)" in report
    assert "data.columns" not in report


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
