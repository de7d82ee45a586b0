"""The comparison of distillation with imitation: scores between measurements, and a table worked by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import inf

import pytest

from benchmarks.distill import Taught, read, table


def run(arm: str, seed: int, *scores: float) -> Taught:
    return Taught(arm, 1e-4, seed, (0.0, 10.0, 20.0)[: len(scores)], scores, steps=7)


def test_scores_between_measurements_lie_on_straight_lines():
    taught = run("sft", 1, 0.6, 0.8, 0.9)
    assert [taught.at(second) for second in (0, 5, 10, 15, 20)] == pytest.approx([0.6, 0.7, 0.8, 0.85, 0.9])
    assert taught.until(0.8) == pytest.approx(10.0)
    assert taught.until(0.85) == pytest.approx(15.0)
    assert taught.until(0.95) == inf
    assert taught.area == pytest.approx((7.0 + 8.5) / 20, abs=2e-3)


def test_the_table_pairs_seeds_and_says_where_a_score_is_not_reached():
    runs = [run("distill", seed, 0.6, 0.7 + 0.01 * seed, 0.85) for seed in (1, 2, 3)]
    runs += [run("sft", seed, 0.6, 0.8, 0.9) for seed in (3, 2, 1)]
    lines = table(runs).splitlines()
    assert "| 10 s: sampled F1 | 0.720 | 0.800 | -0.080 ± 0.025 |" in lines  # differences -.09, -.08, -.07; t 4.303
    assert "| seconds to 0.9 | inf | 20.0 | not all reach it |" in lines


def test_a_finished_run_is_read_as_it_was_written(tmp_path):
    taught = run("distill", 1, 0.6, 0.7)
    (tmp_path / "run.json").write_text(json.dumps(asdict(taught)))
    assert read(tmp_path / "run.json") == taught
