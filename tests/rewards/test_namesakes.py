"""Our packages are found, and a user's own rewards too, where the current folder has files of the same names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rsgrpo
from rewards import namesakes
from rewards.api import Response, RewardError, load_reward
from rsgrpo import doctor
from rsgrpo.records.summary import next_commands
from tests.material import ROOT

MINE = """
from rewards.api import reward, whole
@reward(scope=whole)
def mine(response):
    return 0.25
"""
BREAKS = "raise RuntimeError('the file of the user was run in the place of the package')\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder; what loading a reward adds is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("user_rewards", "user_rewards.mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder that comes first on its path, as `python -m` does."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_names_are_those_of_the_package_and_of_the_repository():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"} == set(namesakes.PACKAGES)
    assert set(rsgrpo._PACKAGES) == set(namesakes.PACKAGES) - {"rsgrpo"}


@pytest.mark.parametrize("program", ["rsgrpo.train", "rsgrpo.plan", "recipes.infer", "recipes.prepare"])
def test_a_program_finds_our_packages_whatever_lies_in_the_folder(tmp_path, program):
    for name in ("rewards", "rollout", "conf"):
        (tmp_path / f"{name}.py").write_text(BREAKS)
    (tmp_path / "rollout").mkdir()
    (tmp_path / "rollout" / "__init__.py").write_text(BREAKS)
    (tmp_path / "recipes").mkdir()  # a folder of yaml files, say
    done = python(tmp_path, "-m", program, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: python -m" in done.stdout


def test_a_reward_in_a_file_named_rewards_is_found(folder):
    Path("rewards.py").write_text(MINE)
    assert load_reward("rewards:mine")(Response("")) == 0.25
    assert load_reward("rewards.evisrag:accuracy").name == "accuracy"
    with pytest.raises(RewardError, match=r"'rewards' has no 'mime'; did you mean mine\? Its rewards are mine"):
        load_reward("rewards:mime")


def test_a_file_named_rewards_that_is_elsewhere_is_asked_for(folder):
    with pytest.raises(RewardError, match=r"'rewards' has no 'mine'\. This is rsgrpo's own package, and .* -P -m"):
        load_reward("rewards:mine")


def test_a_reward_in_a_folder_named_rewards_is_found(folder):
    Path("rewards").mkdir()
    Path("rewards/other.py").write_text(MINE.replace("0.25", "0.5"))
    Path("rewards/mine.py").write_text("from .other import mine\n")
    assert load_reward("rewards.mine:mine")(Response("")) == 0.5
    with pytest.raises(RewardError, match=r"no module 'rewards\.gone' for 'rewards\.gone:fn'"):
        load_reward("rewards.gone:fn")


def test_what_imports_a_taken_name_is_told_to_rename_it(folder):
    Path("rewards").mkdir()
    Path("rewards/other.py").write_text("")
    Path("rewards/mine.py").write_text("from rewards.other import mine\n")
    with pytest.raises(RewardError, match="rsgrpo has a package of that name: rename yours"):
        load_reward("rewards.mine:mine")


def test_the_offline_trial_finds_it_too(tmp_path):
    (tmp_path / "rewards.py").write_text(MINE)
    (tmp_path / "responses.jsonl").write_text('{"text": "a"}\n')
    done = python(tmp_path, "-P", "-m", "rewards", "rewards:mine", "responses.jsonl", "--summary")
    assert "mean 0.2500" in done.stdout, done.stderr


def test_what_was_imported_before_under_our_name_is_named(tmp_path):
    (tmp_path / "rewards.py").write_text("")
    done = python(tmp_path, "-c", "import rewards, rsgrpo")
    assert f"{tmp_path}/rewards.py was imported as 'rewards'" in done.stderr
    assert "Rename the file" in done.stderr


def test_the_path_changes_only_where_a_name_is_taken(tmp_path):
    tell = "import sys; before = list(sys.path); import rsgrpo; print(sys.path == before)"
    assert python(tmp_path, "-c", tell).stdout == "True\n"
    (tmp_path / "conf").mkdir()
    assert python(tmp_path, "-c", tell).stdout == "False\n"


def test_the_doctor_looks_for_taken_names(folder):
    assert list(doctor._namesakes()) == []
    Path("rewards.py").write_text("")
    Path("conf").mkdir()
    reward, conf = doctor._namesakes()
    assert "rewards.py has the name of a package of rsgrpo" in reward.found
    assert "`python -P -m rewards ...`" in reward.fix
    assert (conf.status, conf.fix) == ("warn", "rename it")


def test_the_command_that_is_worth_trying_next_runs_ours(folder):
    assert "python -m rewards " in next_commands(Path("runs/a"), [], "rewards:mine")[0][1]
    Path("rewards.py").write_text("")
    assert "python -P -m rewards " in next_commands(Path("runs/a"), [], "rewards:mine")[0][1]


def test_ray_workers_find_our_packages_too(tmp_path):
    (tmp_path / "rollout.py").write_text(BREAKS)
    (tmp_path / "ask.py").write_text(
        "import rsgrpo, ray\n"
        "from rsgrpo.cluster.connect import connect_ray\n"
        "connect_ray('', num_cpus=1, object_store_bytes=80 << 20)\n"
        "def where():\n"
        "    import rollout\n"
        "    return rollout.__file__\n"
        "print('found', ray.get(ray.remote(where).remote()))\n"
        "ray.shutdown()\n"
    )
    done = python(tmp_path, "ask.py")
    assert f"found {ROOT}/rollout/__init__.py" in done.stdout, done.stderr
