"""Every recipe's command given what cannot work: one message, an exit code, no trace, and nothing finished is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes import evaluate, infer, prepare
from recipes.evaluate import EvaluateConfig
from recipes.serve import server
from recipes.synthesize import commands as synthesize
from rsgrpo.config.train import PromptConfig
from rsgrpo.errors import InputError, RsgrpoError
from tests.material.answering import lines_of, write_page
from tests.material.http_stub import ANSWER

PROMPT = PromptConfig(template="{images}\n{question}")
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "infer": lambda rest: infer.main(["--batch", *rest]),
    "synthesize": lambda rest: synthesize.main(["trajectories", "--out", "never.jsonl", "--in", *rest]),
    "validate": lambda rest: prepare.main(["validate", *rest[:1]]),
    "convert": lambda rest: prepare.main(["convert", *rest[:1], "--out", "never.jsonl"]),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(folder: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return "rows.jsonl"


def row_of(number: int, image: str) -> dict[str, Any]:
    return {"id": f"q{number}", "question": f"question {number}", "image": [image], "answer": ["16%"]}


def says(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    return shown.out + shown.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_is_not_there_is_named(command, serve, capsys, here):
    assert COMMANDS[command](["gone.jsonl", "--endpoint", serve().url]) == 2
    assert "gone.jsonl" in says(capsys)
    assert not (here / "never.jsonl").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_line_that_is_no_json_is_named(command, serve, capsys, here):
    rows = write_rows(here, row_of(1, write_page(here)), '{"id": "q2", "question')
    assert COMMANDS[command]([rows, "--endpoint", serve().url]) in (1, 2)
    assert "line 2 of rows.jsonl" in says(capsys)
    assert not (here / "never.jsonl").exists()


@pytest.mark.parametrize("command", ["validate", "convert"])
def test_a_corrupt_image_is_named_before_anything_is_made_of_it(command, capsys, here):
    (here / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    assert COMMANDS[command]([write_rows(here, row_of(1, "bad.png"))]) in (1, 2)
    assert "bad.png" in says(capsys)
    assert not (here / "never.jsonl").exists()


@pytest.mark.parametrize("image", ["bad.png", "gone.png"])
def test_a_corrupt_or_missing_page_is_one_questions_error_and_the_others_are_answered(serve, capsys, here, image):
    (here / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    rows = write_rows(here, row_of(1, write_page(here)), row_of(2, image), row_of(3, "page.png"))
    assert infer.main(["--batch", rows, "--endpoint", serve().url, "--max-pixels", "300000"]) == 0
    lines = lines_of(here / "rows.answers.jsonl")
    assert [line["finish_reason"] for line in lines] == ["stop", "error", "stop"]
    assert image in lines[1]["errors"][0]
    assert "failed" in says(capsys)


def test_an_endpoint_that_goes_down_is_tried_again_then_named_and_what_was_finished_is_taken_up(serve, capsys, here):
    rows = write_rows(here, *(row_of(number, write_page(here)) for number in range(5)))
    down = serve(lambda number, _: ANSWER if number <= 2 else (503, {"Retry-After": "0"}, "gone"))
    options = ["--concurrency", "1", "--max-pixels", "300000"]
    assert infer.main(["--batch", rows, "--endpoint", down.url, "--max-tries", "3", *options]) == 1
    message = says(capsys)
    assert "did not answer in 3 tries, the last was HTTP 503: gone" in message
    assert "2 answers of this run and 0 earlier ones are kept in rows.answers.jsonl" in message
    assert len(down.bodies) in (2 + 3, 2 + 3 + 1)  # the next question may have been sent meanwhile
    up = serve()
    assert infer.main(["--batch", rows, "--endpoint", up.url, *options]) == 0
    assert len(up.bodies) == 3
    assert [line["answer"] for line in lines_of(here / "rows.answers.jsonl")] == ["16%"] * 5


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"benchmark": "SlidVQA"}, "did you mean SlideVQA"),
        ({"benchmark": "none.jsonl"}, "neither an existing file or folder"),
        ({"benchmark": "rows.jsonl", "predictions": "gone.jsonl"}, "predictions=gone.jsonl cannot be read"),
        ({"benchmark": "rows.jsonl", "predictions": "broken.jsonl"}, "line 1 of broken.jsonl is not valid JSON"),
        ({"benchmark": "broken.jsonl"}, "line 1 of broken.jsonl"),
        ({"benchmark": "rows.jsonl"}, "1 of 1 pages are missing"),
    ],
)
def test_an_evaluation_that_cannot_be_says_why(settings, complaint, here):
    write_rows(here, row_of(1, "gone.png"))
    (here / "broken.jsonl").write_text('{"id": \n')
    with pytest.raises(InputError, match=complaint):
        evaluate.evaluate(EvaluateConfig(topk=0, prompt=PROMPT, bootstrap_samples=0, permutations=1, **settings))


def test_an_evaluation_of_an_endpoint_that_is_down_keeps_its_predictions(serve, here):
    write_rows(here, *(row_of(number, write_page(here)) for number in range(3)))
    down = serve(lambda number, _: ANSWER if number == 1 else (503, {"Retry-After": "0"}, "gone"))
    endpoint = evaluate.EndpointConfig(url=down.url, concurrency=1, max_tries=1)
    config = EvaluateConfig("rows.jsonl", topk=0, name="e", endpoint=endpoint, prompt=PROMPT, bootstrap_samples=0)
    with pytest.raises(RsgrpoError, match=r"did not answer in 1 tries[\s\S]*1 answers of this run") as error:
        evaluate.evaluate(config)
    assert error.value.exit_code == 1
    assert len(lines_of(here / "runs/evaluation/e/predictions.jsonl")) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["unpack", "gone"], "gone has no images.parquet"),
        (["unpack", "packed"], "is not a readable parquet file"),
        (["mini", "--demo", "gone"], "Run `python -m recipes.prepare demo`"),
    ],
)
def test_folders_that_cannot_be_used_are_named(arguments, complaint, capsys, here):
    (here / "packed").mkdir()
    (here / "packed" / "images.parquet").write_bytes(b"no parquet")
    assert prepare.main(arguments) == 2
    assert complaint in says(capsys)


@pytest.mark.parametrize("command", ["validate", "convert"])
@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        ("a" * 5000 + ".png", "does not exist"),
        ("a\0b.png", "does not exist"),
        ("", "an image must be a path"),
        (None, "an image must be a path"),
        (["page.png"], "an image must be a path"),
        ({"bytes": 5, "path": None}, "an image must be a path"),
    ],
)
def test_an_image_that_is_no_path_to_a_file_is_one_rows_fault(command, image, complaint, capsys, here):
    assert COMMANDS[command]([write_rows(here, {**row_of(1, ""), "image": [image]})]) in (1, 2)
    shown = says(capsys)
    assert "line 1 of rows.jsonl" in shown
    assert complaint in shown


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("column", ["id", "question", "image"])
def test_half_a_character_is_a_broken_row_and_a_whole_one_is_not(command, column, serve, capsys, here):
    row = row_of(1, write_page(here)) | {"evidence": ["16%"]}
    half = json.dumps(row | {column: ["\ud83d"] if column == "image" else "\ud83d"})
    whole = json.dumps(row | {"id": "q2", "question": chr(0x1F600)})
    assert "\\ud83d\\ude00" in whole
    assert COMMANDS[command]([write_rows(here, half, whole), "--endpoint", serve().url]) in (1, 2)
    shown = says(capsys)
    assert "line 1 of rows.jsonl" in shown
    assert r"not valid Unicode: '\ud83d' lacks its other half" in shown
    assert "line 2" not in shown


def test_half_a_character_in_a_prediction_is_scored_and_shown_as_a_question_mark(here):
    write_rows(here, row_of(1, write_page(here)))
    (here / "preds.jsonl").write_text('{"id": "q1", "pred": "\\ud83d <answer>16%</answer>"}\n')
    evaluate.evaluate(EvaluateConfig(benchmark="rows.jsonl", predictions="preds.jsonl", name="scored", prompt=PROMPT))
    results = json.loads((here / "runs/evaluation/scored/results.json").read_text())
    assert results["scores"]["strict"]["global"]["em"]["value"] == 1.0


@pytest.mark.parametrize(
    "text",
    ["\0\n", "[" * 100_000, '{"id": ' + "9" * 5000 + ', "pred": "x"}', '{"pred": "x"}', '{"id": "q1", "pred": null}'],
)
def test_a_prediction_file_that_cannot_be_read_is_named_with_its_line(text, here):
    write_rows(here, row_of(1, write_page(here)))
    (here / "preds.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"line 1 of preds\.jsonl"):
        evaluate.evaluate(EvaluateConfig(benchmark="rows.jsonl", predictions="preds.jsonl", prompt=PROMPT))


@pytest.mark.parametrize("given", ["99999", "-1", "http"])
def test_a_port_that_is_none_is_refused_before_anything_starts(given, capsys):
    with pytest.raises(SystemExit, match="2"):
        server.main(["--model", "m", "--port", given])
    assert f"a port is a number from 0 to 65535, got '{given}'" in says(capsys)
