"""Questions as a task folder of lmms-eval and as VLMEvalKit's table; what was recorded of the real harness holds."""

from __future__ import annotations

import ast
import base64
import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from recipes import prepare


@pytest.fixture
def written(tmp_path: Path, page_images, monkeypatch) -> Path:
    """Two questions, of two pages and of one, written for both harnesses."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"id": "a", "question": "which share?", "answer": ["16%", "16 percent"], "image": page_images[:2]},
        {"id": "b", "question": "the sum?", "answer": "<evidence>\n[1]: 7\n</evidence>\n<answer>7</answer>",
         "image": page_images[2:3]},
    ]  # fmt: skip
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare.main(["harness", "rows.jsonl", "--prompt", "demo", "--max-tokens", "64", "--out", "out"]) == 0
    return tmp_path / "out"


def task_functions(folder: Path) -> Any:
    spec: Any = importlib.util.spec_from_file_location("task_utils", folder / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_task_folder_is_read_by_its_own_functions_as_lmms_eval_calls_them(written, page_images):
    folder = written / "lmms_eval/rsgrpo_rows"
    text = (folder / "rsgrpo_rows.yaml").read_text()
    task = yaml.safe_load(text.replace("!function ", ""))
    assert "doc_to_messages: !function utils.doc_to_messages" in text
    assert (task["task"], task["dataset_path"], task["reasoning_tags"]) == ("rsgrpo_rows", "json", "none")
    assert task["generation_kwargs"] == {"max_new_tokens": 64, "temperature": 0, "do_sample": False}
    assert task["metadata"]["prompt"]
    rows = Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    first, second = map(json.loads, rows)
    functions = task_functions(folder)
    [message] = functions.doc_to_messages(first, None)
    assert [part["type"] for part in message["content"]] == ["text", "image", "text", "image", "text"]
    pages = [part["url"] for part in message["content"] if part["type"] == "image"]
    assert [page.tobytes() for page in pages] == [Image.open(path).convert("RGB").tobytes() for path in page_images[:2]]
    assert functions.doc_to_text(first) == "[1][2]which share?"
    assert functions.process_results(first, ["<answer>16 Percent.</answer>"]) == {"em": 1.0, "f1": 1.0}
    assert functions.process_results(second, ["<think>7</think><answer>8</answer>"]) == {"em": 0.0, "f1": 0.0}


def test_the_table_has_the_columns_and_pages_that_vlmevalkit_reads(written, page_images):
    csv.field_size_limit(1 << 30)
    with (written / "vlmevalkit/rsgrpo_rows.tsv").open(newline="") as file:
        two, one = csv.DictReader(file, dialect="excel-tab")
    assert (two["index"], two["id"], two["question"], two["answer"]) == ("0", "a", "[1][2]which share?", "16%")
    images, names = ast.literal_eval(two["image"]), ast.literal_eval(two["image_path"])
    assert len(images) == len(names) == 2
    for encoded, path in zip([*images, one["image"]], page_images[:3], strict=True):
        page = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert page.tobytes() == Image.open(path).convert("RGB").tobytes()
    assert one["image_path"] == "000001-1.png"


def test_questions_without_a_gold_answer_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps({"id": "a", "question": "?"}))
    assert prepare.main(["harness", "rows.jsonl", "--out", "out"]) == 2
    assert "no gold answer" in capsys.readouterr().err
