"""A task that has nothing to do with evidence blocks: count the stars. The framework shows it as well as its own."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rollout.config import RolloutConfig
from rsgrpo.cluster.local import LocalCluster
from rsgrpo.config.guards import GuardsConfig
from rsgrpo.config.train import CheckpointConfig, DataConfig, TrainConfig, ValidationConfig
from rsgrpo.records.tracking import read_metrics
from rsgrpo.running.guards import GuardBroken
from rsgrpo.running.run import Run
from rsgrpo.train import take_step
from tests.material.training import tiny_run

REWARDS = """
from rewards.api import Response, between, reward


@reward
def brief(response: Response) -> float:
    return -len(response.text) / 100


@reward(scope=between("=", None), short="cnt", leading=True)
def counted(response: Response) -> float:
    return float(response.text.partition("=")[2] == response.truth["answers"][0])
"""


@pytest.fixture
def config(tmp_path: Path, tiny_model_path: str, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Rows without pages, answers from a script of which one in four is right."""
    (tmp_path / "star_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"id": f"r{n}", "prompt": f"how many stars? {'*' * n}", "answer": str(n)} for n in range(1, 5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = [{"id": f"r{n}", "responses": [f"so ={n}", "=9", "no idea", "= 7"]} for n in range(1, 5)]
    (tmp_path / "script.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in script))
    source = str(tmp_path / "rows.jsonl")
    return tiny_run(
        tmp_path,
        Path(source),
        tiny_model_path,
        rewards={"brief": "star_rewards:brief", "counted": "star_rewards:counted"},
        reward_args={},
        data=DataConfig(train=source, val=source, gold="rewards.gold:plain"),
        rollout=RolloutConfig(
            engine="fake", script=str(tmp_path / "script.jsonl"), group_size=4, max_response_tokens=24
        ),
        validation=ValidationConfig(every=2, at_start=False, samples=4),
        checkpoint=CheckpointConfig(every=2, metric="val/sampled/counted", export=False),
        guards=GuardsConfig(rules={"reward/counted/mean": {"min": 0.1, "patience": 1}}),
    )


def train(config: TrainConfig) -> None:
    with Run.open(config, start_cluster=LocalCluster) as run:
        for step in run.steps_left:
            take_step(run, step)
        run.finish()


def test_another_task_has_its_own_names_in_console_report_and_checks(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config)
    output = capsys.readouterr().out
    assert "step 1/2  cnt .25  brief -.0" in output
    assert "val sampled  " in output
    assert "cnt .250" in output
    folder = Path(config.output_dir) / config.name
    assert {row["scope/counted/hit_rate"] for row in read_metrics(folder) if "scope/counted/hit_rate" in row} == {0.75}
    report = (folder / "report.html").read_text()
    assert "counted" in report
    for word in ("evid", "accuracy", "well_formed"):
        assert word not in output
    assert (folder / "checkpoints" / "latest").exists()


def test_a_reward_that_always_fails_is_seen_wherever_one_looks(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(tmp_path / "star_rewards.py", "a") as file:
        file.write("\n\n@reward\ndef mine(response: Response) -> float:\n    return 1 / 0\n")
    sys.modules.pop("star_rewards", None)
    rewards = {**config.rewards, "mine": "star_rewards:mine"}
    train(dataclasses.replace(config, rewards=rewards, on_reward_error="skip"))
    output = capsys.readouterr().out
    assert "mine failed 8x  len" in output
    assert "mine failed 16x" in output.split("val sampled")[1]
    assert "reward 'mine' failed 32 times and was skipped (on_reward_error=skip)" in output
    log = (Path(config.output_dir) / config.name / "run.log").read_text()
    assert "star_rewards.py:" in log
    assert "Traceback (most recent call last)" in log
    assert log.count("ZeroDivisionError: division by zero") == 2  # the message, and the end of one traceback


def test_a_run_that_learnt_nothing_says_so(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = {"even": "star_rewards:brief"}
    args: dict[str, Any] = {"even": {}}
    Path(config.rollout.script).write_text(
        "".join(json.dumps({"id": f"r{n}", "responses": ["same"] * 4}) + "\n" for n in range(1, 5))
    )
    once = dataclasses.replace(config.validation, every=9)
    plain = dataclasses.replace(config.checkpoint, metric="val/sampled/even")
    changes: dict[str, Any] = {"rewards": rewards, "reward_args": args, "validation": once, "checkpoint": plain}
    train(dataclasses.replace(config, **changes, guards=GuardsConfig()))
    output = capsys.readouterr().out
    assert "warning: none of the 2 steps updated the model" in output
    assert "-0.040 (one validation)" in output


def test_its_guards_stop_it(config: TrainConfig) -> None:
    rules = GuardsConfig(rules={"reward/counted/mean": {"min": 0.5, "patience": 1}})
    with pytest.raises(GuardBroken, match=r"reward/counted/mean.*at step 1 reward/counted/mean is 0\.25"):
        train(dataclasses.replace(config, guards=rules))
