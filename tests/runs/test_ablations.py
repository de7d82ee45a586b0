"""The trial of credit rules: the order of its plan, what is skipped, how rates are chosen, tables worked by hand."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.ablations.sweep import RESULTS, Planned, plan, sweep
from benchmarks.ablations.tables import (
    ARMS,
    RATES,
    SCORES,
    STEPS,
    TUNED_ON,
    TUNING_SEEDS,
    read_runs,
    tables,
    tuned_rate,
)
from rsgrpo import cli
from rsgrpo.config.train import TrainConfig


def write_run(
    results: Path, arm: str, rate: float, seed: int, f1: float, *, level: str = TUNED_ON, settings: str = "s"
) -> None:
    """Write a finished run, all of whose scores are `f1` at every step."""
    column = {"step": list(range(1, STEPS + 1)), "value": [f1] * STEPS}
    names = ("reward/accuracy/mean", "reward/evidence/mean", "actor/entropy")
    held_out = {f"val/{name}": {"step": [STEPS], "value": [f1]} for name in ("sampled/accuracy", "sampled/evidence")}
    run = {"level": level, "arm": arm, "rate": rate, "seed": seed, "settings": settings, "warm_start": level}
    metrics = dict.fromkeys(names, column) | held_out | {"val/greedy/accuracy": {"step": [STEPS], "value": [f1]}}
    path = results / level / arm / f"x{rate:g}-seed{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**run, "metrics": metrics}))


def test_a_part_of_the_plan_has_all_arms_of_the_first_seeds():
    first = list(islice(plan(["easy", "two_hop"], ["grpo", "causal"], 8), 4))
    assert first == [
        Planned(level, arm, 1.0, 1)
        for level, arm in [("easy", "grpo"), ("easy", "causal"), ("two_hop", "grpo"), ("two_hop", "causal")]
    ]
    whole = list(plan(["easy"], list(ARMS), 8))
    tuning = [planned for planned in whole if planned.seed in TUNING_SEEDS]
    assert len(tuning) == len(ARMS) * len(RATES) * len(TUNING_SEEDS)
    assert not {planned.seed for planned in tuning} & {planned.seed for planned in whole if planned not in tuning}
    chosen_later = [planned.rate is None for planned in whole]
    assert chosen_later == sorted(chosen_later)  # rates are chosen when all tuning runs are there


def test_finished_runs_are_not_run_again(tmp_path):
    wanted = list(plan(["easy"], ["grpo", "causal"], 2))
    for planned in wanted:
        write_run(tmp_path / "results", planned.arm, planned.rate or 1.0, planned.seed, 0.5)
    sweep(wanted, tmp_path / "folder", tmp_path / "results")
    assert not (tmp_path / "folder").exists()


def test_the_rate_is_the_one_whose_tuning_runs_score_best(tmp_path):
    for rate, f1 in ((0.5, 0.7), (1.0, 0.8)):
        for seed in TUNING_SEEDS:
            write_run(tmp_path, "causal", rate, seed, f1)
    assert tuned_rate(read_runs(tmp_path), "causal") is None
    write_run(tmp_path, "causal", 2.0, 1, 0.95)  # a fresh seed decides nothing
    assert tuned_rate(read_runs(tmp_path), "causal") is None
    for seed in TUNING_SEEDS:
        write_run(tmp_path, "causal", 2.0, seed, 0.75)
    assert tuned_rate(read_runs(tmp_path), "causal") == 1.0


def test_tables_pair_the_seeds_that_both_arms_have(tmp_path):
    for seed, f1 in ((1, 0.8), (2, 0.9)):
        write_run(tmp_path, "grpo", 1.0, seed, f1)
    for seed, f1 in ((1, 0.82), (2, 0.94), (3, 0.1)):
        write_run(tmp_path, "causal", 1.0, seed, f1)
    [table] = tables(read_runs(tmp_path))
    grpo, causal = table.splitlines()[-2:]
    assert grpo == "| plain GRPO | 1 | 2 |" + " 0.850 |" * len(SCORES)
    # Mean of .82, .94 and .10; differences .02 and .04: half-width 12.706 x .01.
    assert causal == "| causal | 1 | 3 |" + " 0.620 [+0.030 ± 0.127] |" * len(SCORES)


def test_runs_of_two_trials_are_not_mixed(tmp_path):
    write_run(tmp_path, "grpo", 1.0, 1, 0.8)
    write_run(tmp_path, "causal", 1.0, 1, 0.8, settings="other")
    with pytest.raises(SystemExit, match="its runs have 2 different settings"):
        read_runs(tmp_path)


def test_every_arm_is_a_configuration_of_its_own():
    composed = [cli.compose(TrainConfig, overrides=["recipe=demo", *arm.overrides]) for arm in ARMS.values()]
    assert all(one != other for n, one in enumerate(composed) for other in composed[:n])


def test_the_committed_runs_make_tables():
    runs = read_runs(RESULTS)
    assert {run["arm"] for run in runs} <= set(ARMS)
    assert list(tables(runs))
