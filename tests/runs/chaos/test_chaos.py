"""A few cells of the matrix (`make chaos` runs all): faults in one run, held against an undisturbed one."""

from __future__ import annotations

import pytest

from tests.runs.chaos.injector import fail_at
from tests.runs.chaos.matrix import wrong_messages
from tests.runs.chaos.runs import config_of, differences, export_hash, make_material, metrics_of, run_with, segments

FAULTS = [fail_at("engine", 1, "sampling", "SIGSTOP"), fail_at("reward", 2, "scoring", "SIGKILL")]


def test_a_run_whose_engine_and_rewards_fail_equals_one_that_was_left_alone(tmp_path):
    material = make_material(tmp_path / "material")
    runs = {}
    for name, faults in (("disturbed", FAULTS), ("whole", [])):
        folder = tmp_path / name
        outcome = run_with(faults, folder, config_of(material, folder / "runs", steps=2), material)
        assert outcome.codes == [0], outcome.console
        assert outcome.orphans == []
        runs[name] = outcome, folder / "runs" / "run"
    told = segments(runs["disturbed"][0].console)
    assert [wrong_messages(fault, text) for fault, text in zip(FAULTS, told, strict=True)] == [[], []]
    found, wanted = (metrics_of(run) for _, run in runs.values())
    assert differences(found, wanted) == []
    assert export_hash(runs["disturbed"][1]) == export_hash(runs["whole"][1]) != ""


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("step 2: rollout worker 0 died in sampling: gone; restarting worker 0", []),
        ("", ["0 messages"]),
        ("rollout worker 0 died in sampling\nrollout worker 0 died in sync", ["2 messages"]),
        ("rollout worker 0 died in sync\nTraceback (most recent call last)", ["console has Traceback"]),
    ],
)
def test_a_cell_needs_one_message_and_no_traceback(text, wrong):
    assert wrong_messages(fail_at("engine", 1, "sampling"), text) == wrong
