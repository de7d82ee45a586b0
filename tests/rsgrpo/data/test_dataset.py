"""Data sets: every format, every way to give images and gold answers, and every fault of a row."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from rewards.evisrag import read_gold
from rewards.gold import GoldError
from rollout.config import InputsConfig
from rollout.inputs.images import bytes_of
from rollout.inputs.processor import InputProcessor
from rsgrpo.config.train import DataConfig, PromptConfig
from rsgrpo.data.dataset import PromptDataset, load_prompts, sort_rows
from rsgrpo.data.prompts import render_template
from rsgrpo.data.rows import Row, read_rows
from rsgrpo.errors import RsgrpoError
from tests.material.synthetic_run import png

GOLD = "<evidence>\n[1]: code 4 amount 7\n[2]: no relevant information\n</evidence>\n<answer>7</answer>"
RAW = PromptConfig()
EVISRAG = "rewards.evisrag:read_gold"


@pytest.fixture(scope="module")
def processor(tiny_model_path) -> InputProcessor:
    return InputProcessor(tiny_model_path, InputsConfig(784, 784 * 4, max_images=3, max_prompt_tokens=150))


@pytest.fixture
def folder(tmp_path) -> Path:
    for index, size in enumerate([(28, 28), (56, 28), (28, 56)]):
        Image.new("RGB", size, (index, 0, 0)).save(tmp_path / f"p{index}.png")
    return tmp_path


def good_row(**changes) -> dict:
    row = {"prompt": "[1]<image>[2]<image>what?", "answer": GOLD, "image": ["p0.png", "p1.png"]}
    return {key: value for key, value in (row | changes).items() if value is not ...}


def write(folder: Path, *rows: dict, name: str = "train.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows) if path.suffix == ".jsonl" else json.dumps(rows))
    return str(path)


def load(source: str, processor: InputProcessor, prompt: PromptConfig = RAW, **data) -> PromptDataset:
    return load_prompts(source, DataConfig(**{"gold": EVISRAG, **data}), prompt, processor)


# --- what a prompt holds ----------------------------------------------------------------------------------------


def test_an_evisrag_row_becomes_a_prompt(folder, processor):
    dataset = load(write(folder, good_row(id="q7", source="chartqa")), processor)
    assert dataset.dropped == {}
    (prompt,) = dataset
    assert prompt.id == "q7"
    assert prompt.num_tokens == processor.count_tokens(prompt) > 0
    assert prompt.text == "[1]<image>[2]<image>what?"
    assert prompt.images == (str(folder / "p0.png"), str(folder / "p1.png"))
    assert prompt.question == "[1][2]what?"
    assert prompt.truth == {
        "answers": ["7"],
        "evidence": ["code 4 amount 7", "no relevant information"],
        "gold": GOLD,
        "id": "q7",
        "source": "chartqa",
    }


def test_rows_without_id_are_numbered_and_all_keys_can_be_renamed(folder, processor):
    source = write(
        folder, {"p": "<image>x", "a": "<evidence>[1]: y</evidence><answer>z</answer>", "i": "p0.png", "q": "x?"}
    )
    dataset = load(source, processor, columns={"prompt": "p", "answer": "a", "image": "i", "question": "q"})
    assert (dataset[0].id, dataset[0].question, dataset[0].truth["evidence"]) == ("row-1", "x?", ["y"])


def test_the_gold_of_supervised_rows_is_kept_verbatim(folder, processor):
    response = f"<observe>two pages</observe>\n{GOLD.replace('<answer>', '<think>page 1</think><answer>')}\n"
    prompt = load(write(folder, good_row(answer=response)), processor)[0]
    assert prompt.truth["gold"] == response
    assert prompt.truth["answers"] == ["7"]


@pytest.mark.parametrize(
    ("answer", "evidence", "expected"),
    [
        ("7", ["a", "b"], {"gold": "7", "answers": ["7"], "evidence": ["a", "b"]}),
        (["7", "seven"], ["a", "b"], {"answers": ["7", "seven"], "evidence": ["a", "b"]}),
        (["7"], None, {"answers": ["7"]}),  # evaluation sets: rewards on evidence then do not apply
        ("<answer>7</answer>", ["a"], {"gold": "<answer>7</answer>", "answers": ["7"], "evidence": ["a"]}),
        (GOLD, "ignored: the tags say it", {"gold": GOLD, "answers": ["7"],
                                            "evidence": ["code 4 amount 7", "no relevant information"]}),
    ],
)  # fmt: skip
def test_gold_answers_come_in_several_forms(answer, evidence, expected):
    assert read_gold(answer, {"evidence": evidence}, len(expected.get("evidence", ()))) == expected


@pytest.mark.parametrize(
    ("answer", "evidence", "reason"),
    [
        ("7", None, "gold answer without <answer> tags"),
        ("<answer>7", None, "gold answer without <answer> tags"),
        ("<answer>7", ["a"], "gold answer without <answer> tags"),
        ("<evidence>[1]: a</evidence> 7", None, "gold answer without <answer> tags"),
        ("<answer>7</answer>", None, "gold answer without <evidence> tags"),
        ("", None, "no gold answer"),
        (None, None, "no gold answer"),
        ([], ["a"], "no gold answer"),
        ([" "], ["a"], "no gold answer"),
        ("<evidence>[1]: a</evidence><answer> </answer>", None, "no gold answer"),
        (7, ["a"], "no gold answer"),
        ([GOLD], None, "unusable gold"),
        ("7", "a", "unusable gold"),
        ("7", ["a", None], "unusable gold"),
    ],
)
def test_gold_answers_that_no_reward_could_use_are_refused(answer, evidence, reason):
    with pytest.raises(GoldError) as caught:
        read_gold(answer, {"evidence": evidence}, 1)
    assert caught.value.reason == reason


def test_rows_of_another_task_need_no_tags_and_no_evidence(folder, processor):
    source = write(folder, good_row(answer="7"), good_row(answer=["7", "seven"], unit="EUR"), good_row())
    plain, several, tagged = load(source, processor, gold="rewards.gold:detect")
    assert plain.truth == {"gold": "7", "answers": ["7"]}
    assert several.truth == {"answers": ["7", "seven"], "unit": "EUR"}
    assert tagged.truth == {"gold": GOLD, "answers": ["7"], "evidence": ["code 4 amount 7", "no relevant information"]}
    assert load(source, processor, gold="rewards.gold:plain")[2].truth == {"gold": GOLD, "answers": [GOLD]}


@pytest.mark.parametrize(
    ("setting", "value", "match"),
    [
        ("gold", "plain", r"data\.gold must be module:function, .* got 'plain'"),
        ("gold", "rewards.gold:gone", r"data\.gold=rewards\.gold:gone: module rewards\.gold has no function 'gone'"),
        ("gold", "no_such_module:read", "no module 'no_such_module'"),
        ("image_dir", "/nowhere", r"data\.image_dir /nowhere is not a folder"),
    ],
)
def test_a_gold_reader_or_image_folder_that_is_not_there_is_named(folder, processor, setting, value, match):
    with pytest.raises(RsgrpoError, match=match):
        load(write(folder, good_row()), processor, **{setting: value})


# --- formats ----------------------------------------------------------------------------------------------------


def test_jsonl_json_parquet_and_folders_read_alike(folder, processor):
    import pyarrow
    import pyarrow.parquet

    rows = [good_row(id=str(n), note=n) for n in range(3)]
    sources = [write(folder, *rows), write(folder, *rows, name="rows.json"), str(folder / "rows.parquet")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sources[-1])
    (folder / "only").mkdir()
    write(folder / "only", *rows)
    sources += [f"{folder}:train", str(folder / "only")]
    loaded = [list(load(source, processor, image_dir=str(folder))) for source in sources]
    assert [prompt.truth["note"] for prompt in loaded[0]] == [0, 1, 2]
    assert all(prompts == loaded[0] for prompts in loaded)


def test_parquet_shards_of_one_name_are_one_data_set(folder):
    import pyarrow
    import pyarrow.parquet

    for shard in range(2):
        table = pyarrow.Table.from_pylist([{"id": shard * 2 + n} for n in range(2)])
        pyarrow.parquet.write_table(table, folder / f"train-0000{shard}-of-00002.parquet")
    rows, start = read_rows(str(folder))
    assert [(row.number, row.columns["id"]) for row in rows] == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert start == folder


def test_saved_data_sets_keep_their_images_compressed(folder, processor):
    import datasets

    images = [Image.new("RGB", (28, 28), color) for color in ("red", "blue")]
    text = datasets.Value("string")
    features = datasets.Features({"prompt": text, "answer": text, "image": datasets.List(datasets.Image())})
    rows = datasets.Dataset.from_list([good_row(image=images)] * 2, features=features)
    rows.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(folder / "splits")
    before = sorted((folder / "saved").iterdir())
    dataset = load(str(folder / "saved"), processor)
    assert len(dataset) == 2
    assert all(isinstance(image, bytes) and image.startswith(b"\x89PNG") for image in dataset[1].images)
    assert sorted((folder / "saved").iterdir()) == before  # nothing is cached beside the data
    assert len(load(f"{folder}/splits:test", processor)) == 1
    with pytest.raises(RsgrpoError, match=r"has the splits train, test; choose one as .*splits:SPLIT"):
        load(str(folder / "splits"), processor)
    with pytest.raises(RsgrpoError, match="has no splits"):
        load(f"{folder}/saved:test", processor)


def test_images_come_as_paths_bytes_mappings_and_pil(folder, processor):
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    absolute = str(folder / "p0.png")
    entries = [
        absolute,
        png(),
        {"bytes": png("blue"), "path": "x.png"},
        {"bytes": None, "path": "p1.png"},
        {"type": "image", "image": (folder / "p1.png").as_uri()},
        {"type": "image", "image": "data:image/png;base64," + base64.b64encode(png("red")).decode()},
        Image.new("L", (28, 28)),
    ]
    rows = [
        Row(f"row {n}", n, good_row(prompt="<image>q", image=[entry], answer=["7"])) for n, entry in enumerate(entries)
    ]
    prompts, bad = sort_rows(rows, DataConfig(image_dir=str(folder)), RAW, processor, folder=elsewhere)
    assert not bad
    *sources, pil = [prompt.images[0] for prompt in prompts]
    beside = str(folder / "p1.png")
    assert sources == [absolute, png(), png("blue"), beside, beside, png("red")]
    assert isinstance(pil, bytes)
    assert pil.startswith(b"\x89PNG")


@pytest.mark.parametrize("nested", [False, True])
def test_images_are_looked_up_in_images_parquet_beside_the_file(tmp_path, processor, nested):
    import pyarrow
    import pyarrow.parquet

    packed = [("a/p0.png", png("red")), ("a/p1.png", png("blue")), ("a/unused.png", png("green"))]
    table = [
        {"image": {"bytes": data, "path": path}} if nested else {"image": data, "path": path} for path, data in packed
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "images.parquet")
    dataset = load(write(tmp_path, good_row(image=["a/p1.png", "a/p0.png"])), processor)
    assert [bytes_of(image) for image in dataset[0].images if not isinstance(image, str)] == [png("blue"), png("red")]
    with pytest.raises(RsgrpoError, match=r"missing image: image .*a/gone\.png does not exist"):
        load(write(tmp_path, good_row(image=["a/p1.png", "a/gone.png"])), processor)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("train.jsonl", '{"a": 1}\n{"b": \n', r"1 of 2 rows .*\n  line 2 of train\.jsonl: not valid JSON: .* at"),
        ("train.jsonl", "\n[1]\n", r"\n  line 2 of train\.jsonl: a row must be a JSON object, got list$"),
        ("train.jsonl", "[" * 100_000, r"line 1 of train\.jsonl: not usable JSON: it is nested too deeply"),
        ("train.json", '[{"prompt": "a"}, 7]', r"\n  row 2 of train\.json: a row must be a JSON object, got int"),
        ("train.json", "{", r"train\.json is not valid JSON: .* at character 1\. Fix it"),
        ("train.jsonl", "\n\n", r"train\.jsonl has no rows"),
        ("train.json", '{"prompt": "a"}', r"must be a JSON list of objects; a file .* ends in \.jsonl"),
        ("train.json", "[]", "has no rows"),
        ("train.parquet", "hello", "is not a readable parquet file"),
        ("train.csv", "a,b", r"must end in one of \.jsonl, \.json, \.parquet"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(RsgrpoError, match=match):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{folder}", r"one data file .* found a\.jsonl, b\.jsonl\. Name the file, or .*:NAME"),
        ("{folder}:c", r"named c .* found none among a\.jsonl, b\.jsonl"),
        ("data/gone.jsonl", r"gone\.jsonl does not exist"),
        ("org/name:train", r"the data set org/name is not on this machine"),
        ("", r"set data\.train"),
    ],
)
def test_sources_that_are_not_there_are_named(tmp_path, source, match):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path, {}, name=name)
    with pytest.raises(RsgrpoError, match=match):
        read_rows(source.format(folder=tmp_path))


# --- faults of a row --------------------------------------------------------------------------------------------

BAD_ROWS = [
    (good_row(image=["p0.png", "gone.png"]), "missing image", r"gone\.png does not exist"),
    (good_row(image=["p0.png", "text.png"]), "unreadable image", r"text\.png cannot be read"),
    (good_row(image=["p0.png", "cut.png"]), "unreadable image", r"cut\.png cannot be read"),
    (good_row(image=["p0.png", "https://x/p.png"]), "unreadable image", "Download it and give its path"),
    (good_row(image=["p0.png", 5]), "unreadable image", "must be a path, bytes, .* got 5"),
    (good_row(answer="7"), "gold answer without <answer> tags", "got '7'; for rows with plain"),
    (good_row(answer=...), "no gold answer", "the answer is missing"),
    (good_row(prompt="<image>what?"), "<image> marks differ from images", "1 <image> marks for 2 images"),
    (good_row(image=...), "evidence entries differ from images", "2 entries for 0 images"),
    (good_row(prompt="<image>" * 4 + "q", image=["p0.png"] * 4), "too many images", "4 images, inputs.max_images is 3"),
    (good_row(prompt="<image>q", image=["p0.png"]), "evidence entries differ from images", "2 entries for 1 images"),
    (good_row(prompt=""), "empty prompt", "'prompt' is missing or empty; the row has prompt, answer, image"),
    (good_row(prompt="<image><image>"), "empty prompt", "'prompt'"),
    (good_row(prompt=["a"]), "empty prompt", "must be text, got list"),
    (good_row(prompt="<image><image> <|image_pad|>"), "unusable prompt", r"control token '<\|image_pad\|>'"),
    (good_row(id="same"), "duplicate id", "also the id of line 1"),
    (good_row(prompt="<image>" * 2 + "what? " * 100), "over-long prompt", r"\d+ tokens, .*max_prompt_tokens is 150"),
]


@pytest.mark.parametrize(("row", "reason", "detail"), BAD_ROWS)
def test_a_bad_row_is_named_or_dropped_and_counted(folder, processor, row, reason, detail, caplog):
    (folder / "text.png").write_text("hello")
    (folder / "cut.png").write_bytes((folder / "p1.png").read_bytes()[:60])
    source = write(folder, good_row(id="same"), row)
    key = "data.overlong=drop" if reason == "over-long prompt" else "data.bad_rows=drop"
    with pytest.raises(RsgrpoError, match=rf"line 2 of train.jsonl, id (row-2|same): {reason}: .*{detail}") as caught:
        load(source, processor)
    assert f"1 of 2 rows cannot be used (1 x {reason})" in str(caught.value)
    assert str(caught.value).endswith(f"leave them out with {key}")
    with caplog.at_level(logging.WARNING):
        dataset = load(source, processor, bad_rows="drop", overlong="drop")
    assert [prompt.id for prompt in dataset] == ["same"]
    assert dataset.dropped == {reason: 1}
    assert f"dropped 1 of 2 rows (1 x {reason})" in caplog.text


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        ('{"prompt": "a", "ans', "not valid JSON: "),
        ("[1, 2]", "a row must be a JSON object, got list"),
        ("null", "a row must be a JSON object, got NoneType"),
    ],
)
@pytest.mark.parametrize("is_last", [False, True])
def test_a_broken_line_is_a_bad_row_like_any_other(folder, processor, caplog, line, detail, is_last):
    good = json.dumps(good_row(id="a"))
    lines = [good, "", line] if is_last else [good, "", line, json.dumps(good_row())]
    (folder / "train.jsonl").write_text("\n".join(lines))  # the last line has no end, as after a write that was cut
    source = str(folder / "train.jsonl")
    with pytest.raises(RsgrpoError, match=r"rows cannot be used \(1 x broken row\)") as caught:
        load(source, processor)
    assert f"  line 3 of train.jsonl, id row-2: broken row: {detail}" in str(caught.value)
    assert str(caught.value).endswith("leave them out with data.bad_rows=drop")
    with caplog.at_level(logging.WARNING):
        dataset = load(source, processor, bad_rows="drop")
    assert [prompt.id for prompt in dataset] == (["a"] if is_last else ["a", "row-3"])
    assert dataset.dropped == {"broken row": 1}
    assert f"dropped 1 of {len(dataset) + 1} rows (1 x broken row)" in caplog.text


def test_over_long_prompts_have_a_policy_of_their_own(folder, processor):
    overlong = BAD_ROWS[-1][0]
    source = write(folder, good_row(), overlong)
    assert load(source, processor, overlong="drop").dropped == {"over-long prompt": 1}
    with pytest.raises(RsgrpoError, match="over-long"):
        load(source, processor, bad_rows="drop")
    with pytest.raises(RsgrpoError, match=r"data\.bad_rows=drop data\.overlong=drop"):
        load(write(folder, good_row(), overlong, good_row(answer="")), processor)


def test_twenty_bad_rows_are_listed_and_all_are_counted(folder, processor):
    source = write(folder, good_row(), *[good_row(answer="7")] * 25)
    with pytest.raises(RsgrpoError, match=r"25 of 26 rows cannot be used \(25 x gold") as caught:
        load(source, processor)
    assert str(caught.value).count("line ") == 20
    assert "line 21 of" in str(caught.value)
    assert "... and 5 more" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "cause"), [("{\n{", "not valid JSON"), (json.dumps(good_row(answer="7")), "got '7'")]
)
def test_dropping_every_row_is_an_error(folder, processor, content, cause):
    (folder / "train.jsonl").write_text(content)
    with pytest.raises(RsgrpoError, match=f"no usable row left; the first was dropped because: {cause}"):
        load(str(folder / "train.jsonl"), processor, bad_rows="drop")


def test_progress_reaches_the_number_of_rows(folder, processor):
    calls = []
    load_prompts(
        write(folder, *[good_row()] * 5), DataConfig(), RAW, processor,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls == [(n, 5) for n in range(1, 6)]


# --- templates --------------------------------------------------------------------------------------------------


def test_a_template_takes_the_place_of_the_rows_own_prompt(folder, processor):
    config = PromptConfig(template="{images}\nRead all.\nQuestion: {question}", system="Be brief.")
    with_question = good_row(question="what {images}?")
    prompt = load(write(folder, with_question), processor, config)[0]
    assert prompt.text == "[1]: <image>\n[2]: <image>\nRead all.\nQuestion: what {images}?"
    assert (prompt.question, prompt.system) == ("what {images}?", "Be brief.")
    derived = load(write(folder, good_row(prompt="<image><image>what?")), processor, config)[0]
    assert derived.text.endswith("Question: what?")


def test_a_template_file_takes_the_place_of_the_text(folder, processor):
    (folder / "prompt.txt").write_text("{question} {images}", encoding="utf-8")
    config = PromptConfig(file=str(folder / "prompt.txt"))
    assert load(write(folder, good_row(question="é?", prompt=...)), processor, config)[0].text.startswith(
        "é? [1]: <image>"
    )


@pytest.mark.parametrize(
    ("prompt", "row", "match"),
    [
        ({"template": "{question} {pages}"}, {}, r"unknown placeholder \{pages\}\. Use \{question\}, \{images\}"),
        ({"template": "{images} what?"}, {}, r"must have \{question\}"),
        ({"file": "gone.txt"}, {}, r"prompt\.file gone\.txt cannot be read"),
        ({"template": "{question}"}, {"question": "q"}, "0 <image> marks for 2 images"),
        ({"template": "{images}{question}"}, {"prompt": ...}, "empty prompt: column 'question' is missing or empty"),
    ],
)
def test_templates_that_cannot_work_are_refused(folder, processor, prompt, row, match):
    with pytest.raises(RsgrpoError, match=match):
        load(write(folder, good_row(**row)), processor, PromptConfig(**prompt))


def test_braces_of_other_kinds_stay_in_a_template():
    assert render_template('{"a": 1} {question}', "q", 0) == '{"a": 1} q'


def test_a_source_with_more_rows_than_memory_may_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("rsgrpo.data.rows.MAX_ROWS", 3)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "?"}\n' * 3)
    assert len(read_rows(str(path))[0]) == 3
    path.write_text('{"prompt": "?"}\n' * 4)
    with pytest.raises(RsgrpoError, match=r"has more than 3 rows\. Split it, or train with data\.streaming=true"):
        read_rows(str(path))
