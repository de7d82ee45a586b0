"""Several runs in one table, and bands that stay inside the range of a score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rsgrpo.report.charts import build_charts, collect_curves
from rsgrpo.report.page import main
from rsgrpo.report.several import RunScores, paired, read_scores, table


def write_run(folder: Path, name: str, accuracy: float) -> str:
    rows = [
        {"step": 0, "val/sampled/accuracy": 0.1, "val/sampled/num_prompts": 4.0},
        {"step": 9, "val/sampled/accuracy": accuracy, "val/sampled/mine_errors": 2.0},
    ]
    (folder / name).mkdir()
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def test_runs_of_several_seeds_stand_in_one_table(tmp_path, capsys):
    scores = {"demo-seed-1": 0.7, "demo-seed-2": 0.8, "grpo-seed=1": 0.5, "grpo-seed=2": 0.7, "alone": 0.3}
    assert main([write_run(tmp_path, name, score) for name, score in scores.items()]) == 0
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "val/sampled/accuracy demo 0.750 ± 0.071 (n = 2)",
        "val/sampled/accuracy grpo 0.600 ± 0.141 (n = 2)",
        "val/sampled/accuracy alone 0.300 (n = 1)",
        "val/sampled/accuracy grpo - demo -0.150 ± 0.071 (n = 2, paired by seed, standard error 0.050)",
    ]


def test_a_seed_that_the_name_does_not_spell_out_is_read_from_the_settings(tmp_path):
    for name, seed in (("demo-1", 1), ("demo-2", 2), ("other", 2), ("v-3", 7)):
        Path(write_run(tmp_path, name, 0.5), "config.yaml").write_text(f"name: x\nseed: {seed}\ndata:\n  seed: 9\n")
    found = [read_scores(tmp_path / name) for name in ("demo-1", "demo-2", "other", "v-3")]
    assert [(run.arm, run.seed) for run in found] == [("demo", "1"), ("demo", "2"), ("other", "2"), ("v-3", "7")]


def test_only_seeds_that_both_have_are_paired():
    one = [RunScores("a", "1", {"m": 0.5}), RunScores("a", "2", {"m": 0.5}), RunScores("a", "", {"m": 0.1})]
    two = [RunScores("b", "2", {"m": 0.7}), RunScores("b", "1", {"m": 0.6}), RunScores("b", "3", {"m": 0.9})]
    assert paired(one, two, "m") == pytest.approx([0.2, 0.1])
    assert paired(one[:1], two, "m") == []
    assert table(one[:1]) == "m  a  0.500 (n = 1)"


def test_a_folder_that_is_not_a_run_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    run = write_run(tmp_path, "demo", 0.5)
    assert main([run, str(tmp_path / "empty")]) == 2
    assert "empty is not a run folder (no metrics.jsonl)" in capsys.readouterr().err
    assert read_scores(Path(run)).arm == "demo"


@pytest.mark.parametrize(
    ("mean", "std", "low", "high"),
    [(0.9, 0.3, 0.6, 1.0), (0.1, 0.2, 0.0, 0.3), (-0.9, 0.3, -1.0, -0.6), (0.5, 0.9, -0.4, 1.4), (3.0, 1.0, 2.0, 4.0)],
)
def test_a_band_stays_inside_the_range_that_the_score_can_have(mean, std, low, high):
    rows = [{"step": step, "reward/x/mean": mean, "reward/x/std": std} for step in (1, 2)]
    [chart] = [chart for chart in build_charts(collect_curves(rows)) if chart["title"] == "x"]
    [series] = chart["series"]
    assert series["low"] == [(1, pytest.approx(low)), (2, pytest.approx(low))]
    assert series["high"] == [(1, pytest.approx(high)), (2, pytest.approx(high))]
