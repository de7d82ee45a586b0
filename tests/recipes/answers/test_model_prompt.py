"""A model's folder carries its prompt; a run's folder is not a model; what a model sees can be shown."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from PIL import Image

from recipes import infer
from recipes.answers.questions import named_prompt
from recipes.evaluate import EvaluateConfig, keep_settings, settings_of, spell_out
from recipes.retrieval.training.config import RetrieverConfig
from recipes.sft import next_command
from recipes.train_retriever import _keep_settings
from rsgrpo.config.checks import require_model
from rsgrpo.config.train import PromptConfig
from rsgrpo.data.prompt_file import prompt_of_model
from rsgrpo.errors import ConfigError, InputError
from rsgrpo.running.settings import about_changes


@pytest.fixture
def model(tmp_path: Path, tiny_model_path: str, monkeypatch) -> Path:
    """A model's folder with a prompt of its own, in the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_path, "model")
    (Path("model") / "prompt.txt").write_text("{images}\nlook: {question}")
    (Path("model") / "training_config.yaml").write_text("prompt: {system: be brief}")
    return Path("model")


def test_the_prompt_in_a_models_folder_is_the_default(model, caplog):
    assert named_prompt("", str(model)) == PromptConfig(template="{images}\nlook: {question}", system="be brief")
    assert named_prompt("", "") == named_prompt("evidence")
    assert prompt_of_model("org/hub-id") is None
    assert caplog.messages == []


def test_another_prompt_than_the_models_is_said(model, caplog):
    caplog.set_level(logging.WARNING)
    named_prompt("direct", str(model))
    assert "is not the one that model was trained with (prompt.txt in its folder)" in caplog.text
    caplog.clear()
    (model / "training_config.yaml").write_text("prompt: {system: ''}")
    named_prompt("model/prompt.txt", str(model))
    assert caplog.messages == []


def test_a_folder_without_both_files_carries_no_prompt(model):
    (model / "training_config.yaml").write_text("just words")
    with pytest.raises(InputError, match="the prompt in model cannot be read"):
        prompt_of_model("model")
    (model / "training_config.yaml").unlink()
    assert prompt_of_model("model") is None


def test_a_prompt_on_the_command_line_of_evaluate_wins():
    assert EvaluateConfig().own_prompt
    assert spell_out(["prompt=direct"]) == ["prompt=direct", "own_prompt=false"]
    assert spell_out(["prompt.system=x", "seed=1"])[-1] == "own_prompt=false"
    assert spell_out(["seed=1"]) == ["seed=1"]


def test_an_evaluation_that_predicted_nothing_takes_new_settings(tmp_path):
    settings = tmp_path / "settings.json"
    keep_settings(settings, {"seed": 0})
    (tmp_path / "predictions.jsonl").touch()
    keep_settings(settings, {"seed": 7})
    (tmp_path / "predictions.jsonl").write_text('{"id": "q", "raw": "a"}\n')
    with pytest.raises(ConfigError, match=r"seed=8, was 7"):
        keep_settings(settings, {"seed": 8})


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0" * 9])
def test_settings_that_a_power_cut_has_damaged_are_one_message(tmp_path, content):
    settings = tmp_path / "settings.json"
    settings.write_text(content)
    (tmp_path / "predictions.jsonl").write_text('{"id": "q", "raw": "a"}\n')
    for read in (
        lambda: keep_settings(settings, {"seed": 0}),
        lambda: settings_of(tmp_path / "predictions.jsonl"),
        lambda: _keep_settings(RetrieverConfig(), tmp_path),
    ):
        with pytest.raises(InputError, match=r"settings.json is damaged: "):
            read()


def test_the_folder_of_a_run_is_not_a_model(tmp_path, monkeypatch, tiny_model_path):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/a")
    run.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"model\.path=runs/a is a folder without a model"):
        require_model("model.path", "runs/a")
    (run / "config.yaml").touch()
    with pytest.raises(ConfigError, match="It has no export: the run has not ended"):
        require_model("model.path", "runs/a")
    shutil.copytree(tiny_model_path, run / "export")
    with pytest.raises(ConfigError, match=r"Did you mean runs/a/export, where its model is\?"):
        require_model("model.path", "runs/a")
    require_model("model.path", "runs/a/export")


def test_infer_names_its_own_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs/a").mkdir(parents=True)
    assert infer.main(["how much?", "--model", "runs/a"]) == 2
    assert "error: --model runs/a is a folder without a model" in capsys.readouterr().err
    assert infer.main(["how much?", "--model", "m", "--image", "runs"]) == 2
    assert "runs is a folder. Name the images in it, such as runs/*.png" in capsys.readouterr().err


def test_what_the_model_sees_is_shown_without_loading_it(model, capsys):
    (model / "model.safetensors").unlink()
    Image.new("RGB", (300, 100), "red").save("page.png")
    limits = ["--min-pixels", "784", "--max-pixels", "12544"]
    arguments = ["how much?", "--image", "page.png", "--model", "model", *limits, "--show-inputs", "seen"]
    assert infer.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "page 1  page.png  300 x 100 -> 168 x 56 pixels, 12 tokens" in shown
    assert "--max-prompt-tokens 15,000; --min-pixels 784, --max-pixels 12,544" in shown
    assert "look: how much?" in shown
    assert "be brief" in shown
    with Image.open("seen/page_1.png") as seen:
        assert seen.size == (168, 56)
    assert infer.main(["--model", "model", "--show-inputs"]) == 2
    assert "--show-inputs needs a question" in capsys.readouterr().err


def test_the_warm_start_names_the_recipe_that_follows():
    assert next_command(["recipe=sft_demo", "seed=1"], Path("demo/sft/export")) == (
        "python -m rsgrpo.train recipe=demo model.path=demo/sft/export"
    )
    assert "recipe=evisrag_7b model.path" in next_command(["recipe=evisrag_7b"], Path("x"))
    assert "recipe=NAME (one of demo, " in next_command(["--config-dir", "conf", "recipe=mine"], Path("x"))


def test_keys_that_came_or_went_since_a_run_began_share_a_line():
    changes = {"seed": (0, 1), "old.a": (1, None), "old.b": (2, None), "rewards.mine": (None, "m:f")}
    assert about_changes(changes) == [
        "seed was 0 when this run began; it is now 1",
        "this run began without rewards.mine='m:f'",
        "this run began with settings that are gone: old.a, old.b",
    ]
