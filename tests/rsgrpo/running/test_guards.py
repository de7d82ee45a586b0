"""Guards: how rules are read, how long a metric may be out of its bound, and how a run ends that breaks one."""

from __future__ import annotations

import math
from typing import Literal

import pytest

from rsgrpo.config.guards import GuardsConfig
from rsgrpo.config.train import CheckpointConfig, ClusterConfig, TrainConfig
from rsgrpo.errors import ConfigError, InputError
from rsgrpo.records.tracking import read_metrics
from rsgrpo.running.checkpoint import CheckpointFolder
from rsgrpo.running.guards import GuardBroken, Guards
from rsgrpo.train import train
from tests.material.training import tiny_run, write_rows

MARKED = "monitor/marked/mean"
SCORED = "reward/overlong/mean"


def says(guards: Guards, *values: float | None) -> list[str]:
    """Check one step after the other, from 1; None is a step that did not measure the metric."""
    rows = [{} if value is None else {MARKED: value} for value in values]
    return [guards.check(step, row) for step, row in enumerate(rows, start=1)]


def rules(metric: str = MARKED, **bounds: object) -> GuardsConfig:
    return GuardsConfig({metric: bounds})


def guards_of(patience: int = 2, action: Literal["stop", "warn"] = "stop", earlier: list[dict] | None = None) -> Guards:
    return Guards(GuardsConfig({MARKED: {"min": 0.1, "patience": patience}}, action), earlier or [])


@pytest.mark.parametrize(
    ("bounds", "value", "holds"),
    [
        ({"min": 0.1}, 0.1, True),
        ({"min": 0.1}, 0.099, False),
        ({"max": -1e-3}, -0.001, True),
        ({"max": 2}, 2.01, False),
        ({"min": 1, "max": 2}, 0.5, False),
        ({"max": 2}, math.nan, False),
        ({"min": 2}, math.nan, False),
    ],
)
def test_a_rule_is_a_metric_with_bounds(bounds, value, holds):
    (rule,) = rules("a/b", **bounds).parsed()
    assert (rule.metric, rule.patience) == ("a/b", 5)
    assert rule.holds(value) is holds


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({}, "has no bound. Give it min or max"),
        ({"low": 1}, "takes min, max and patience, got 'low'"),
        ({"min": "x"}, "min must be a number, got 'x'"),
        ({"min": 1, "patience": 0}, "patience must be a whole number >= 1, got 0"),
        (3, r"must have bounds such as \{min: 0.1, patience: 5\}, got 3"),
        ("a/b >= 0.1", r"rules are no longer text. Write guards.rules=\{a/b: \{min: 0.1\}\}"),
        ("a/b <= -1e-3", r"Write guards.rules=\{a/b: \{max: -1e-3\}\}"),
    ],
)
def test_anything_else_is_refused_with_the_metric(bounds, said):
    with pytest.raises(ConfigError, match=rf"^guards\.rules.*a/b.*{said}"):
        GuardsConfig(rules={"a/b": bounds})


def test_a_rule_is_removed_with_null():
    assert GuardsConfig({MARKED: None}).parsed() == []


def test_metrics_of_validation_are_refused():
    with pytest.raises(ConfigError, match=r"val/greedy/accuracy: .*only validation measures this metric"):
        rules("val/greedy/accuracy", min=0.5)


def test_a_rule_is_broken_after_its_patience():
    found = says(guards_of(), 0.05, 0.3, 0.05, 0.05)
    assert found[:3] == ["", "", ""]
    assert found[3] == (f"{MARKED} >= 0.1 (guards.rules) has not held for 2 steps: at step 4 {MARKED} is 0.05")


def test_a_step_that_measured_nothing_neither_counts_nor_forgives():
    found = says(guards_of(), 0.05, None, 0.05)
    assert [bool(text) for text in found] == [False, False, True]


def test_a_warning_comes_once_until_the_rule_has_held_again():
    found = says(guards_of(action="warn"), 0, 0, 0, 0.5, 0, 0)
    assert [bool(text) for text in found] == [False, True, False, False, False, True]


def test_a_resumed_run_counts_on_and_one_that_was_stopped_stops_again():
    below = [{"step": step, MARKED: 0.05} for step in (1, 2)]
    assert says(guards_of(patience=3, earlier=below), 0.05)[0]
    assert says(guards_of(patience=2, earlier=below), 0.05)[0]
    assert says(guards_of(patience=2, earlier=[*below, {"step": 3, MARKED: None}]), 0.5) == [""]


def test_a_metric_that_no_step_measures_is_an_error_with_the_nearest_name():
    guards = Guards(rules("actor/entropi", min=0.1))
    with pytest.raises(InputError, match="step 1 does not measure actor/entropi; did you mean actor/entropy"):
        guards.check(1, {"actor/entropy": 0.5})


@pytest.mark.parametrize("metric", ["monitor/markd/mean", "reward/marked/mean"])
def test_rules_on_what_the_run_does_not_score_are_refused_before_it_starts(metric):
    with pytest.raises(ConfigError, match=r"guards.rules=.*: the run has no (monitor .markd.; did|reward .marked.)"):
        TrainConfig(monitors={"marked": "m:f"}, guards=rules(metric, min=0.1))


def test_a_broken_rule_ends_the_run_with_a_checkpoint_and_a_code_of_its_own(tmp_path, page_images, tiny_model_path):
    config = tiny_run(
        tmp_path,
        write_rows(tmp_path / "rows.jsonl", page_images),
        tiny_model_path,
        total_steps=4,
        rewards={"overlong": "rewards.evisrag:overlong"},
        checkpoint=CheckpointConfig(every=10, keep_best=0, export=False),
        guards=rules(SCORED, min=0, patience=2),
        cluster=ClusterConfig(kind="inline"),
    )
    said = r"has not held for 2 steps: at step 2 .*\n.*checkpoint of step 2"
    with pytest.raises(GuardBroken, match=said) as error:
        train(config)
    assert error.value.exit_code == 3
    assert len([row for row in read_metrics(tmp_path / "run") if SCORED in row]) == 2
    newest = CheckpointFolder(tmp_path / "run" / "checkpoints", keep_last=1, keep_best=0).newest()
    assert newest is not None
    assert newest.step == 2
