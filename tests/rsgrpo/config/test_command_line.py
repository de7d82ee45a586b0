"""A configured program as a user starts it: its help, its errors and exit codes, the user's own yaml, and sweeps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollout.keys import sections
from rsgrpo import cli
from rsgrpo.config.train import TrainConfig
from rsgrpo.errors import ConfigError
from tests.material import ROOT

PROGRAM = """
import sys
from rsgrpo import cli
from rsgrpo.config.checks import validate
from rsgrpo.config.train import TrainConfig
from rsgrpo.errors import RsgrpoError

def main(config):
    validate(config)
    if config.seed == 13:
        raise RsgrpoError("seed 13 brings bad luck")
    print(config.name, config.seed, config.rollout.engine, "torch" in sys.modules)
    return 3 if config.seed == 3 else None

cli.run(main, TrainConfig, "config")
"""


def run_program(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(PROGRAM)
    return subprocess.run(
        [sys.executable, "program.py", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("learner: {lrr: 3}", ["learner.lrr", "did you mean learner.lr?", "recipe/mine.yaml"]),
        ("learner: {lr: fast}", ["learner.lr", "'fast'", "recipe/mine.yaml"]),
        ("learner: {lr: 3", ["mine.yaml", "line"]),
        ("algorithm: {prompts_per_step: 0}", ["algorithm.prompts_per_step must be >= 1, got 0"]),
    ],
)
def test_mistakes_in_a_users_own_yaml_name_key_and_file(tmp_path, yaml, said):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/mine.yaml").write_text(f"# @package _global_\ndefaults: [demo]\n{yaml}\n")
    result = run_program(tmp_path, "--config-dir", str(tmp_path), "recipe=mine")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    for part in said:
        assert part in result.stderr


def test_a_run_gets_its_configuration_and_leaves_no_litter(tmp_path):
    result = run_program(tmp_path, "recipe=demo", "rollout=fake", "seed=3")
    assert result.stdout.split() == ["demo", "3", "fake", "False"], result.stderr
    assert result.returncode == 3
    assert [path.name for path in tmp_path.iterdir()] == ["program.py"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "recipe is missing. Choose one of "),
        (["recipe=demo", "rollout.group_size=1"], 2, "rollout.group_size must be >= 2"),
        (["recipe=demo", "seed=13"], 1, "seed 13 brings bad luck"),
        (["recipe=demo", "+reward_args=${seed}"], 2, "reward_args must be a map of names to values, got 0"),
        (["recipe=demo", "rewards=[1,2]"], 2, "the settings cannot be read (argument of type 'int' is not iterable)"),
        (["recipe=demo", f"{'x' * 300}=1"], 2, f"{'x' * 60}...: there is no such key. "),
        (["recipe=demo", "+foo.bar=1"], 2, "foo.bar: there is no such key. "),
        (["recipe=demo", "+rolout.group_size=4"], 2, "rolout.group_size: there is no such key; did you mean rollout.g"),
        (["recipe=demo", "learner.lr.foo=1"], 2, "learner.lr.foo: there is no such key; did you mean learner.lr? "),
        (
            ["recipe=demo", "++learner.warmup_stepz.x=1"],
            2,
            "learner.warmup_stepz.x: there is no such key; did you m",
        ),
    ],
)
def test_an_error_is_one_line_that_names_what_was_written_and_exits_with_its_code(tmp_path, arguments, code, said):
    result = run_program(tmp_path, *arguments)
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.startswith(f"error: {said}")
    assert len(result.stderr.splitlines()) == 1


def test_a_sweep_gives_every_run_a_name_of_its_own(tmp_path):
    result = run_program(tmp_path, "recipe=demo", "seed=1,2", "algorithm=grpo", "--multirun")
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names == ["demo-seed-1", "demo-seed-2"]
    assert {path.name for path in tmp_path.iterdir()} == {"program.py", "runs"}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["multirun.yaml"]


def test_help_shows_groups_options_keys_and_examples(tmp_path):
    result = run_program(tmp_path, "--help")
    assert result.returncode == 0
    help_words = " ".join(result.stdout.split())
    for section in sections(TrainConfig):
        for name, about in section.keys.items():
            assert f"\n  {section.name(name)}={about.shown_default}" in result.stdout
            assert " ".join(about.help.split()) in help_words
    for group, options in cli.groups(TrainConfig).items():
        assert group in result.stdout
        assert ", ".join(options) in result.stdout
    assert "recipe=demo --cfg job" in result.stdout


def test_help_of_a_part_shows_its_keys_alone():
    shown = cli.help_text(TrainConfig, part="rollout")
    assert "rollout.vllm.sleep_level=0" in shown
    assert "learner.lr" not in shown
    with pytest.raises(ConfigError, match=r"--help rolout: there is no such part; did you mean rollout\?"):
        cli.help_text(TrainConfig, part="rolout")


def test_cfg_job_shows_every_key(tmp_path):
    result = run_program(tmp_path, "recipe=demo", "--cfg", "job")
    assert result.returncode == 0
    missing = [key for key in cli.keys(TrainConfig) if f"{key.rpartition('.')[2]}:" not in result.stdout]
    assert missing == []


def test_every_job_of_a_sweep_has_a_name_of_its_own():
    assert cli.job_name("demo", ["seed=1", "+rewards.mine=a:b"]) == "demo-seed-1-mine-a_b"
    assert cli.job_name("demo", ["model.path=x", "data.path=y"]) == "demo-model.path-x-data.path-y"
    assert cli.job_name("demo", []) == "demo"
    names = {cli.job_name("demo", [f"data.train={'x' * 150}", f"seed={seed}"]) for seed in (1, 2)}
    assert len(names) == 2
    assert all(len(name) == cli.MAX_NAME_CHARS for name in names)


def test_only_what_varies_between_the_jobs_of_a_sweep_names_them():
    settings = ["seed=1", "learner.lr=1e-5", "rollout=vllm"]
    assert cli.varying(settings, ["recipe=demo", "seed=1,2", "learner.lr=1e-5", "rollout=vllm", "-m"]) == ["seed=1"]
    assert cli.varying(settings, ["seed=range(1,3)", "learner.lr=choice(1e-5)"]) == ["seed=1", "learner.lr=1e-5"]
    assert cli.varying(settings, ["--multirun"]) == settings
