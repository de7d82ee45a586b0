"""The day with a GPU is rehearsed: steps run, are resumed, cut off and skipped, and their tables are written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_day.day import Day, Record, Step, shown
from benchmarks.gpu_day.steps import STEPS
from benchmarks.gpu_day.tables import page
from tests.material import ROOT


def gpu_day(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_day", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=250)


def test_a_rehearsed_step_leaves_numbers_and_tables_and_is_not_run_twice(tmp_path, capsys):
    from benchmarks.gpu_day import __main__ as program

    [step] = program.choose(["exactness"])
    assert program.work(step, tmp_path, True, "cpu") == 0
    left = json.loads((tmp_path / "exactness.json").read_text())
    assert left["status"] == "done"
    assert left["rehearsal"] is True
    [table] = left["tables"]
    assert [row[0] for row in table["rows"]] == ["best", "plain"]
    assert all(0 <= difference < 1e-4 for row in table["rows"] for difference in row[1:])
    program.write_page(tmp_path, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| exactness | done |" in text
    assert "| learner_7b | not begun |" in text
    args = program.arguments().parse_args(["--rehearse"])
    assert program.run_all([step], tmp_path, args) == []
    assert "exactness: done before" in capsys.readouterr().out
    assert json.loads((tmp_path / "exactness.json").read_text()) == left


@pytest.mark.slow  # half a minute
def test_a_whole_rl_run_of_a_shaped_model_is_rehearsed_in_one_process(tmp_path):
    result = gpu_day("--rehearse", "--only", "rl_3b", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    [table] = json.loads((tmp_path / "rl_3b.json").read_text())["tables"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["mismatch largest"] < 1e-4 and row["gradient norm"] > 0 for row in rows)


def test_no_step_begins_that_would_not_fit(tmp_path):
    result = gpu_day("--rehearse", "--minutes", "0.1", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("not begun") == len(STEPS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the day would begin")
def test_without_a_gpu_the_real_day_is_refused():
    result = gpu_day("--only", "exactness")
    assert result.returncode == 2
    assert "torch finds no CUDA device" in result.stderr


def broken(day: Day) -> None:
    table = day.record.table("Before it broke", ["what", "number"])
    day.record.row(table, "kept | a pipe", 12345.6)
    raise RuntimeError("no kernel\nand more")


def test_a_step_that_breaks_keeps_what_it_had_measured(tmp_path, monkeypatch):
    from benchmarks.gpu_day import __main__ as program

    step = Step("broken", "unused", 1, "breaks")
    monkeypatch.setattr(Step, "load", lambda self: broken)
    assert program.work(step, tmp_path, True, "cpu") == 1
    record = Record.read(tmp_path / "broken.json")
    assert record is not None
    assert (record.status, record.reason) == ("failed", "RuntimeError: no kernel\nand more")
    text = page([step], [record])
    assert "| broken | failed: RuntimeError: no kernel |" in text
    assert "| kept \\| a pipe | 12,346 |" in text


def test_results_of_two_days_are_merged(tmp_path):
    from benchmarks.gpu_day import __main__ as program

    for day, name in (("one", "exactness"), ("two", "growth")):
        record = Record(tmp_path / day / f"{name}.json", name, machine={"device": f"card {day}", "torch": "2.11"})
        record.figure("number", 1.5)
        record.end("done")
        program.write_page(tmp_path / day, tmp_path / "tables")
    merged = json.loads((tmp_path / "tables" / "results.json").read_text())
    assert {name: values["figures"] for name, values in merged.items()} == {
        "exactness": {"number": 1.5}, "growth": {"number": 1.5}
    }  # fmt: skip
    text = (tmp_path / "tables" / "results.md").read_text()
    assert "On card one; torch 2.11." in text
    assert "On card two; torch 2.11." in text


def test_a_step_without_its_packages_is_skipped_with_the_reason(tmp_path):
    from benchmarks.gpu_day import __main__ as program

    step = Step("needy", "unused", 1, "needs more", ("no_such_package", "json"))
    assert program.work(step, tmp_path, True, "cpu") == 0
    record = Record.read(tmp_path / "needy.json")
    assert record is not None
    assert (record.status, record.reason) == ("skipped", "no_such_package not installed")


def test_the_page_lists_every_step_with_its_minutes_and_no_step_may_take_over_ten():
    text = (ROOT / "docs" / "gpu" / "README.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", text, re.MULTILINE)
    assert listed == [(step.name, f"{step.minutes:g}") for step in STEPS]
    assert all(step.minutes < 10 for step in STEPS)
    for step in STEPS:
        step.load()


def test_numbers_are_shown_with_three_digits():
    assert [shown(cell) for cell in (None, "x", 0.0001234, 2.0, 12345.6, 3.14159)] == [
        "", "x", "0.000123", "2", "12,346", "3.14"
    ]  # fmt: skip
