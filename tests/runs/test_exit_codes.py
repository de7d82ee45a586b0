"""Exit codes: 2 where what the user gave cannot work and nothing was started, 1 where the work failed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import rewards.__main__
import rsgrpo.cli
from recipes import infer, prepare, retrieve
from recipes.serve import server as serve
from recipes.sft import sft
from recipes.synthesize import commands as synthesize
from rsgrpo.config.train import SftConfig, TrainConfig
from rsgrpo.errors import ConfigError, InputError, RsgrpoError
from rsgrpo.report import page as report
from rsgrpo.train import train

GOLD = "<evidence>\n[1]: 16%\n</evidence>\n<answer>16%</answer>"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder: a page, good rows and bad rows."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (28, 28)).save("page.png")
    good = {"prompt": "<image>what?", "answer": GOLD, "image": ["page.png"]}
    Path("good.jsonl").write_text(json.dumps(good))
    Path("bad.jsonl").write_text(json.dumps(good) + "\n{cut o")
    return tmp_path


def hydra_code(monkeypatch, program: str, *overrides: str) -> int | str | None:
    main, schema, name = {"train": (train, TrainConfig, "config"), "sft": (sft, SftConfig, "sft")}[program]
    monkeypatch.setattr(sys, "argv", [program, *overrides])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as caught:
        rsgrpo.cli.run(main, schema, name)  # type: ignore[arg-type]
    return caught.value.code


WITH_ROWS = ["data.train=good.jsonl", "data.val=good.jsonl"]


@pytest.mark.parametrize(
    ("program", "overrides", "said"),
    [
        ("train", ["recipe=demo", "rollout.group_size=1"], "rollout.group_size must be >= 2"),
        ("train", ["recipe=demo", "data.train=gone.jsonl"], "gone.jsonl"),
        ("train", ["recipe=demo", "model.path=./gone/model", *WITH_ROWS], "model.path=./gone/model"),
        ("train", ["recipe=demo", "model.path=org/nowhere", *WITH_ROWS], "Run `hf download org/nowhere` where"),
        ("train", ["recipe=demo", "rewards.mine=gone:fn", *WITH_ROWS], "rewards.mine: no module 'gone'"),
        ("train", ["recipe=demo", "reward_args.overlong.min_token=1", *WITH_ROWS], "did you mean 'min_tokens'?"),
        ("train", ["recipe=demo", "data.train=bad.jsonl", "data.val=good.jsonl"], "line 2 of bad.jsonl"),
        ("sft", ["recipe=sft_demo", "data.train=bad.jsonl", "data.val=good.jsonl"], "line 2 of bad.jsonl"),
        ("sft", ["recipe=sft_demo", "data.train=gone.jsonl"], "gone.jsonl"),
        ("sft", ["recipe=sft_demo", "learner.lr=fast"], "learner.lr must be a number"),
    ],
)
def test_a_run_that_cannot_work_exits_with_2_and_leaves_no_run_folder(
    folder, tiny_model_path, monkeypatch, capsys, program, overrides, said
):
    own_model = any(override.startswith("model.path") for override in overrides)
    limits = ["inputs.max_images=3"] + ([] if own_model else [f"model.path={tiny_model_path}"])
    assert hydra_code(monkeypatch, program, *overrides, *limits) == 2
    errors = capsys.readouterr().err
    assert "error: " in errors
    assert said in errors
    assert list(folder.rglob("config.yaml")) == []


COMMANDS: list[tuple[ModuleType, list[str]]] = [
    (prepare, ["demo", "--noise", "2"]),
    (prepare, ["validate", "gone.jsonl"]),
    (prepare, ["convert", "bad.jsonl", "--out", "out.jsonl"]),
    (infer, ["what?", "--image", "gone.png", "--model", "m"]),
    (infer, ["what?", "--image", "page.png", "--prompt", "directt", "--model", "m"]),
    (infer, ["what?", "--question", "what?"]),
    (infer, ["--batch", "bad.jsonl", "--engine", "fake"]),
    (serve, ["--engine", "fake", "--min-pixels", "0", "--max-images", "-1"]),
    (synthesize, ["trajectories", "--in", "bad.jsonl", "--out", "out.jsonl", "--model", "m"]),
    (retrieve, ["ingest", "gone", "--out", "store"]),
    (report, ["gone"]),
    (rewards.__main__, ["gone:fn", "good.jsonl"]),
    (rewards.__main__, ["rewards.evisrag:accuracy", "gone.jsonl"]),
    (rewards.__main__, ["rewards.evisrag:overlong", "good.jsonl", "--args", '{"min_token": 1}']),
]


@pytest.mark.parametrize(
    ("module", "arguments"), COMMANDS, ids=[f"{m.__name__}-{n}" for n, (m, _) in enumerate(COMMANDS)]
)
def test_a_command_that_cannot_work_exits_with_2(folder, capsys, module, arguments):
    try:
        code = module.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    errors = capsys.readouterr().err
    assert "error: " in errors
    assert "Traceback" not in errors
    assert not (folder / "out.jsonl").exists()


def test_a_command_that_finds_faults_exits_with_1(folder, capsys, monkeypatch):
    assert prepare.main(["validate", "bad.jsonl"]) == 1
    (folder / "failing_reward.py").write_text(
        "from rewards.api import reward\n@reward\ndef fails(response):\n    raise KeyError('x')\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    (folder / "responses.jsonl").write_text('{"text": "a"}\n')
    assert rewards.__main__.main(["failing_reward:fails", "responses.jsonl"]) == 1


def test_the_class_of_an_error_decides():
    import rollout.config
    from rollout.workers.worker import WorkerError
    from rsgrpo.algorithm.scoring import RewardFailed
    from rsgrpo.cluster.engine_check import EnginesDiffer
    from rsgrpo.learning.optimizer import NonFiniteSteps
    from rsgrpo.running.checkpoint import CheckpointError

    for failure in (RsgrpoError, CheckpointError, WorkerError, RewardFailed, EnginesDiffer, NonFiniteSteps):
        assert failure.exit_code == 1
    for mistake in (InputError, ConfigError, rollout.config.ConfigError):
        assert mistake.exit_code == 2
