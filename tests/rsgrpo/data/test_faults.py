"""What a user is told of rows that cannot be used: each mistake once, and its cause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes import prepare
from rollout.config import InputsConfig
from rollout.inputs.processor import InputProcessor
from rsgrpo.config.train import DataConfig, PromptConfig
from rsgrpo.data.dataset import load_prompts
from rsgrpo.data.faults import BadRow, explained
from rsgrpo.errors import InputError

GOLD = "<evidence>[1]: a</evidence><answer>7</answer>"


@pytest.fixture
def folder(tmp_path: Path, page_images, monkeypatch) -> Path:
    """The working folder, with a page and a folder of the name of a page."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.png").write_bytes(Path(page_images[0]).read_bytes())
    (tmp_path / "scans").mkdir()
    return tmp_path


def rows(*changes: dict) -> str:
    plain = {"prompt": "<image>what?", "question": "what?", "answer": GOLD, "image": ["page.png"]}
    written = [{key: value for key, value in {**plain, **one}.items() if value is not None} for one in changes]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    return "rows.jsonl"


def refusal(source: str, model: str, limits: InputsConfig | None = None, **prompt: str) -> str:
    processor = InputProcessor(model, limits or InputsConfig(784, 12544))
    with pytest.raises(InputError) as caught:
        load_prompts(source, DataConfig(), PromptConfig(**prompt), processor)
    return str(caught.value)


def test_a_mistake_that_all_rows_share_is_said_once_with_its_cause(folder, tiny_model_path):
    message = refusal(rows(*({"image": [f"pages/{n}.png"]} for n in range(3))), tiny_model_path)
    assert message.count("does not exist") == 1
    assert (
        "every row: missing image: image pages/0.png does not exist; see data.image_dir (line 1 of rows.jsonl)"
        in message
    )
    assert "Set data.image_dir to the folder that the paths start from." in message


def test_different_mistakes_are_listed_row_by_row(folder, tiny_model_path):
    message = refusal(rows({}, {"image": ["gone.png"]}, {"image": ["scans"]}), tiny_model_path)
    assert "line 2 of rows.jsonl, id row-2: missing image: image gone.png does not exist" in message
    assert "line 3 of rows.jsonl, id row-3: missing image: image scans is a folder, not an image" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": ""}, "no gold answer: the answer is empty"),
        ({"answer": None}, "no gold answer: the answer is missing; the row's other columns are question"),
        ({"answer": "<evidence>[1]: a</evidence><answer></answer>"}, "no gold answer: the answer in its tags is empty"),
        ({"image": ["https://host/page.png"]}, "is not on this machine. Download it and give its path"),
        ({"image": [], "prompt": "<image>what?", "answer": "7"}, "1 <image> marks for 0 images"),
    ],
)
def test_each_fault_gets_a_plain_answer(folder, tiny_model_path, change, message):
    assert message in refusal(rows(change), tiny_model_path)


def test_a_template_that_shows_no_image_is_the_cause(folder, tiny_model_path):
    Path("prompt.txt").write_text("Answer: {question}")
    message = refusal(rows({}, {}), tiny_model_path, file="prompt.txt")
    assert "0 <image> marks for 1 images; the prompt template does not show them: write {images} into it" in message


def test_an_over_long_prompt_names_both_limits(folder, tiny_model_path):
    message = refusal(rows({}, {}), tiny_model_path, InputsConfig(784, 12544, max_prompt_tokens=3))
    assert "inputs.max_prompt_tokens is 3; with inputs.max_pixels=12,544 1 pages take most of them" in message
    assert "Raise inputs.max_prompt_tokens, or lower inputs.max_pixels." in message


def test_rows_without_an_image_are_noticed(folder, tiny_model_path, caplog):
    processor = InputProcessor(tiny_model_path, InputsConfig(784, 12544))
    text_only = {"prompt": "what?", "image": None, "answer": "7"}
    load_prompts(rows({}, text_only), DataConfig(), PromptConfig(), processor)
    assert "1 of 2 rows have no image and are used as text (line 2 of rows.jsonl first)" in caplog.text
    load_prompts(rows(text_only | {"pages": ["page.png"]}), DataConfig(), PromptConfig(), processor)
    assert "no row has a column 'image', so all are used as text; they have prompt," in caplog.text
    assert "data.columns.image" in caplog.text


def test_one_of_several_rows_is_not_every_row():
    row = BadRow("line 1", "a", "broken row", "not JSON")
    assert explained([row], 1) == "  line 1, id a: broken row: not JSON"
    assert explained([row], 2) == "  line 1, id a: broken row: not JSON"
    assert explained([row, row], 2) == "  every row: broken row: not JSON (line 1)"


def test_validate_takes_a_recipe_and_uses_its_limits_and_columns(folder, capsys):
    row = {"text": "<image><image>what?", "reply": GOLD, "image": ["page.png"] * 2}
    Path("mine.jsonl").write_text(json.dumps(row))
    columns = ["data.columns.prompt=text", "data.columns.answer=reply", "data.gold=rewards.gold:plain"]
    run = [
        "recipe=demo",
        "prompt=raw",
        "data.train=mine.jsonl",
        "data.val=mine.jsonl",
        "model.path=gone/model",
        *columns,
    ]
    assert prepare.main(["validate", *run]) == 0
    assert capsys.readouterr().out.count("mine.jsonl: all 1 rows can be used") == 2
    assert prepare.main(["validate", "mine.jsonl", *run, "inputs.max_images=1"]) == 1
    assert "too many images: 2 images, inputs.max_images is 1" in capsys.readouterr().out
    assert prepare.main(["validate", "mine.jsonl", *run, "--max-images", "1"]) == 1
    assert "too many images" in capsys.readouterr().out


def test_validate_answers_wrong_overrides_and_names_its_own_options(folder, capsys):
    assert prepare.main(["validate", "recipe=demos"]) == 2
    assert "recipe=demos: there is no such recipe; did you mean demo" in capsys.readouterr().err
    assert (
        prepare.main(["validate", rows({"image": ["page.png"] * 2, "prompt": "<image>" * 2}), "--max-images", "1"]) == 1
    )
    assert "2 images, --max-images is 1" in capsys.readouterr().out
