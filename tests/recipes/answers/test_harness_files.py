"""Predictions of lmms-eval and VLMEvalKit are read, and ours are written so that reading them gives the same scores."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path

import pytest
from openpyxl import Workbook

from recipes import prepare
from recipes.answers.harness_files import write_lmms, write_table
from recipes.answers.predictions import Prediction, Predictions, load_predictions, placed
from recipes.answers.questions import read_questions
from recipes.evaluate import EvaluateConfig, evaluate
from rollout.inputs.images import read_size
from rsgrpo.errors import InputError

ROWS = [
    {"id": "q1", "question": "how many?", "answers": ("16",), "raw": '<answer>16 & <more>\n\ttabs, "quotes"</answer>'},
    {"id": "q2", "question": "who?", "answers": (), "raw": "ä 漢"},
    {"id": "q3", "question": "=1+1", "answers": (), "raw": "=SUM(A1)"},
]


@pytest.mark.parametrize("name", ["samples.jsonl", "table.tsv", "table.xlsx"])
def test_what_is_written_reads_the_same(tmp_path, name):
    path = tmp_path / name
    (write_lmms if name.endswith("jsonl") else write_table)(path, ROWS)
    found = load_predictions(path).by_id
    assert {row_id: one.text for row_id, one in found.items()} == {row["id"]: row["raw"] for row in ROWS}


def test_a_text_that_a_cell_would_cut_is_refused_with_the_format_that_holds_it(tmp_path):
    with pytest.raises(InputError, match=r"a text of long has 32,768 characters, but a cell .* 32,767\. Write a \.tsv"):
        write_table(tmp_path / "t.xlsx", [{"id": "long", "question": "", "answers": (), "raw": "x" * 32_768}])
    assert not (tmp_path / "t.xlsx").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"doc_id": 3, "resps": [["a"]], "filtered_resps": ["b"]}, ("3", "b")),
        ({"doc_id": 3, "resps": [["a", "c"]], "filtered_resps": []}, ("3", "a")),
        ({"doc_id": 3, "resps": "<think>t</think>\na", "filtered_resps": "a"}, ("3", "<think>t</think>\na")),
        ({"doc_id": 3, "filtered_resps": "b", "doc": {"questionId": 77}}, ("77", "b")),
    ],
)
def test_a_line_of_lmms_eval(tmp_path, line, expected):
    (tmp_path / "x_samples_y.jsonl").write_text(json.dumps(line))
    [found] = load_predictions(tmp_path / "x_samples_y.jsonl").by_id.values()
    assert (found.id, found.text) == expected


def test_a_table_as_other_programs_write_it(tmp_path):
    book = Workbook()
    for row in (["index", "answer", "prediction"], [5.0, None, "yes"]):
        book.worksheets[0].append(row)
    book.save(tmp_path / "t.xlsx")
    assert load_predictions(tmp_path / "t.xlsx").by_id["5"].text == "yes"
    (tmp_path / "t.tsv").write_text("index\tanswer\n1\tx\n")
    with pytest.raises(InputError, match=r"row 1 of .*t\.tsv needs index and prediction; it has index, answer"):
        load_predictions(tmp_path / "t.tsv")
    (tmp_path / "broken.xlsx").write_text("no zip")
    with pytest.raises(InputError, match=r"broken\.xlsx cannot be read: BadZipFile"):
        load_predictions(tmp_path / "broken.xlsx")


def test_a_request_that_vlmevalkit_could_not_get_through_counts_as_failed(tmp_path):
    (tmp_path / "t.tsv").write_text("index\tprediction\n0\tFailed to obtain answer via API. \n1\tyes\n")
    found = load_predictions(tmp_path / "t.tsv").by_id
    assert [found[name].finish_reason for name in ("0", "1")] == ["error", ""]


def test_questions_of_a_vlmevalkit_table_with_pages_and_choices(tmp_path, page_images):
    first, second = (base64.b64encode(Path(path).read_bytes()).decode() for path in page_images[:2])
    header = ["index", "image", "image_path", "question", "answer", "A", "B", "C", "hint"]
    rows = [
        [3, first, "", "which?", "B", "one", "two", "", "look"],
        [4, "3", "", "the same page?", "['yes', 'y']", "", "", "", ""],  # the page of row 3
        [5, repr([first, second]), "['a.png', 'b.png']", "two pages?", "16", "", "", "", ""],
        [6, "", page_images[0], "a file?", "7", "", "", "", ""],
    ]
    with (tmp_path / "t.tsv").open("w", newline="") as file:
        csv.writer(file, dialect="excel-tab").writerows([header, *rows])
    choice, same, two, file_row = read_questions(str(tmp_path / "t.tsv"), need_answers=True)
    assert choice.question == (
        "Hint: look\nQuestion: which?\nOptions:\nA. one\nB. two\n"
        "Please select the correct answer from the options above."
    )
    assert choice.answers == ("B", "two", "B. two")
    assert (same.id, same.answers, same.images) == ("4", ("yes", "y"), choice.images)
    assert [len(question.images) for question in (choice, two)] == [1, 2]
    assert read_size(choice.images[0]) == read_size(page_images[0])
    assert file_row.images == (page_images[0],)
    (tmp_path / "t.tsv").write_text("index\tanswer\n1\tx\n")
    with pytest.raises(InputError, match=r"row 1 of .*t\.tsv needs index and question; it has index, answer"):
        read_questions(str(tmp_path / "t.tsv"))


def test_our_own_table_reads_back_as_the_same_questions(tmp_path, page_images):
    rows = [{"id": "a", "question": "?", "answer": "16", "image": page_images[:2]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    assert prepare.main(["harness", str(tmp_path / "rows.jsonl"), "--prompt", "direct", "--out", str(tmp_path)]) == 0
    [found] = read_questions(str(tmp_path / "vlmevalkit/rsgrpo_rows.tsv"))
    assert (found.id, found.answers, len(found.images)) == ("a", ("16",), 2)
    converted = tmp_path / "ours.jsonl"
    assert prepare.main(["convert", str(tmp_path / "vlmevalkit/rsgrpo_rows.tsv"), "--out", str(converted)]) == 0
    row = json.loads(converted.read_text())
    assert (row["answer"], len(row["image"])) == (["16"], 2)
    assert read_size(str(tmp_path / row["image"][0])) == read_size(page_images[0])


@pytest.mark.parametrize(
    ("numbers", "expected"), [(("0", "1"), ["a", "b"]), (("1", "2"), ["a", "b"]), (("0", "9"), ["0", "9"])]
)
def test_counts_become_the_ids_of_the_benchmark(numbers, expected):
    found = Predictions({number: Prediction(number, "t") for number in numbers})
    assert list(placed(found, ["a", "b"]).by_id) == expected
    assert placed(found, [numbers[0], "b"]) is found  # the benchmark itself has such ids


def test_through_another_harness_and_back_the_scores_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"id": f"q{n}", "question": "how many?", "answer": str(n)} for n in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"id": f"q{n}", "raw": f"<answer>{n if n % 2 else 9}</answer>"} for n in range(4)]
    Path("ours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))

    def scores(predictions: str, name: str) -> dict:
        config = EvaluateConfig(
            benchmark="rows.jsonl", topk=0, predictions=predictions, name=name, bootstrap_samples=20, harness_files=True
        )
        evaluate(config)
        return json.loads(Path(f"runs/evaluation/{name}/results.json").read_text())["scores"]

    ours = scores("ours.jsonl", "ours")
    assert ours["strict"]["global"]["em"]["value"] == 0.5
    for file in ("lmms_samples_predictions.jsonl", "vlmevalkit.tsv", "vlmevalkit.xlsx"):
        assert scores(f"runs/evaluation/ours/{file}", "back") == ours
