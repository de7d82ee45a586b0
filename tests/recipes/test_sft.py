"""The supervised recipe: it learns, resumes exactly, and refuses rows that it cannot imitate."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes import prepare
from recipes.answers.gold_responses import GoldResponses
from recipes.sft import as_train_config, sft
from rollout.types import Prompt
from rsgrpo.cli import compose
from rsgrpo.config.train import SftConfig, TrainConfig
from rsgrpo.data.dataset import PromptDataset
from rsgrpo.errors import RsgrpoError
from rsgrpo.records.console import Console
from rsgrpo.records.tracking import read_metrics
from rsgrpo.running.stopping import StopRequested

NO_VALIDATION = ["validation.every=0"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Folder with sft.jsonl (12 rows) and val.jsonl (3 rows)."""
    folder = tmp_path_factory.mktemp("sft-rows")
    settings = prepare.DemoSettings(sft_items=12, train_items=1, val_items=3, noise=0.0)
    prepare.write_demo_data(settings, folder, Console())
    return folder


@pytest.fixture
def configure(rows, tiny_model_path, tmp_path):
    def configure(*overrides: str) -> SftConfig:
        settings = [
            "recipe=sft_demo", f"output_dir={tmp_path}", f"model.path={tiny_model_path}",
            f"data.train={rows}/sft.jsonl", f"data.val={rows}/val.jsonl", "max_response_tokens=256", "batch_size=4",
            "total_steps=4", "learner.num_threads=1", "learner.warmup_steps=0",
        ]  # fmt: skip
        return compose(SftConfig, "sft", [*settings, *overrides])

    return configure


def exact_metrics(run: Path) -> list[dict]:
    """Return what a run measured, but for clocks and memory."""
    rows = read_metrics(run)
    return [{k: v for k, v in row.items() if not k.startswith(("time", "perf/"))} for row in rows]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export/model.safetensors")


def test_the_loss_starts_as_that_of_a_guess_among_all_tokens_and_falls(configure, tmp_path):
    sft(configure(*NO_VALIDATION, "total_steps=6", "batch_size=12", "learner.lr=5e-3", "checkpoint.every=6"))
    rows = exact_metrics(tmp_path / "sft")
    losses = [row["actor/loss"] for row in rows]
    assert len(losses) == 6
    assert losses[0] == pytest.approx(6.0, abs=0.5)  # ln 400: 400 tokens, 5 of them banned
    assert losses[-1] < losses[0] - 1.0
    assert rows[0]["actor/lr"] == pytest.approx(5e-3)


def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(configure, tmp_path, monkeypatch):
    checks = ["validation.every=3", "validation.samples=1", "checkpoint.every=100"]
    sft(configure(*checks, "name=whole"))

    groups, calls = GoldResponses.groups, []

    def stop_in_second_step(self, prompts):
        calls.append(1)
        if len(calls) == 3:  # the first is for the held-out rows
            os.kill(os.getpid(), signal.SIGTERM)
        return groups(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(GoldResponses, "groups", stop_in_second_step)
        with pytest.raises(StopRequested, match="SIGTERM"):
            sft(configure(*checks, "name=parts"))
    assert [row["step"] for row in exact_metrics(tmp_path / "parts")] == [1, 2]
    assert not (tmp_path / "parts/export").exists()
    sft(configure(*checks, "name=parts"))

    whole, parts = exact_metrics(tmp_path / "whole"), exact_metrics(tmp_path / "parts")
    assert [row["step"] for row in whole] == [1, 2, 3, 3, 4, 4]
    assert whole == parts
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_rows_that_are_streamed_teach_what_they_teach_when_read_whole_also_after_a_stop(configure, tmp_path):
    plain = [*NO_VALIDATION, "data.shuffle=false", "checkpoint.every=2", "learner.lr_schedule=constant"]
    sft(configure(*plain, "name=whole"))
    sft(configure(*plain, "name=streamed", "data.streaming=true", "total_steps=2"))
    sft(configure(*plain, "name=streamed", "data.streaming=true"))
    whole, streamed = (exact_metrics(tmp_path / name) for name in ("whole", "streamed"))
    assert [row["actor/loss"] for row in streamed] == [row["actor/loss"] for row in whole]


def test_validation_reports_held_out_loss_and_the_shipped_rewards(configure, tmp_path):
    sft(configure("total_steps=1", "validation.every=1", "validation.at_start=true", "validation.samples=2"))
    before, step, after = exact_metrics(tmp_path / "sft")
    assert (before["step"], step["step"], after["step"]) == (0, 1, 1)
    assert step["val/loss"] > 0
    for mode in ("greedy", "sampled"):
        for name in ("accuracy", "evidence", "well_formed", "abstained", "num_tokens"):
            assert f"val/{mode}/{name}" in before.keys() & after.keys()
    assert after["val/sampled/num_prompts"] == 3


def test_the_run_folder_has_the_recipes_settings_and_an_export_that_loads_and_has_moved(
    configure, tmp_path, tiny_model_path
):
    import yaml
    from transformers import AutoModelForImageTextToText, AutoProcessor

    sft(configure(*NO_VALIDATION, "total_steps=1"))
    written = yaml.safe_load((tmp_path / "sft/config.yaml").read_text())
    assert (written["batch_size"], "algorithm" in written) == (4, False)
    assert (tmp_path / "sft/report.html").exists()
    AutoProcessor.from_pretrained(tmp_path / "sft/export")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "sft/export")
    old = load_file(Path(tiny_model_path) / "model.safetensors")
    new = weights(tmp_path / "sft")
    assert old.keys() == new.keys()
    moved = [name for name in old if not torch.equal(old[name], new[name])]
    assert any("visual" in name for name in moved)  # the demo's warm start trains the tower too
    assert any("lm_head" in name for name in moved)
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(tensor.numel() for tensor in old.values())


def test_rows_without_a_response_that_fits_are_listed(configure):
    complaint = r"12 of 12 rows .*\n  id sft-00000: .* max_response_tokens is 20\n[\s\S]*and 2 more"
    with pytest.raises(RsgrpoError, match=complaint) as caught:
        sft(configure(*NO_VALIDATION, "max_response_tokens=20"))
    assert "data.bad_rows=drop" in str(caught.value)


def test_dropped_rows_are_counted_and_the_rest_is_learnt(configure, rows, tmp_path):
    lines = (rows / "sft.jsonl").read_text().splitlines()[:4]
    long = json.loads(lines[0])
    long["answer"] = long["answer"].replace("</think>", " and so on" * 200 + "</think>")
    mixed = rows / "mixed.jsonl"
    mixed.write_text("\n".join([json.dumps(long), *lines[1:]]) + "\n")
    sft(configure(*NO_VALIDATION, f"data.train={mixed}", "data.bad_rows=drop", "total_steps=1"))
    [row] = exact_metrics(tmp_path / "sft")
    assert row["data/dropped"] == 1


def test_a_response_is_the_answer_column_and_end_of_text(configure):
    gold = GoldResponses(configure())
    text = "<observe>2 5</observe>\n<answer>7</answer>"
    prompt = Prompt("a", "<image>?", ("x.png",), truth={"gold": text, "answers": ["7"]})
    [group], num_dropped = gold.groups([prompt])
    [sample] = group.samples
    processor = gold._processor
    assert processor.tokenizer.decode(sample.token_ids_T[:-1]) == text
    assert sample.token_ids_T[-1] == processor.eos_token_id
    assert sample.rollout_logprobs_T is None
    assert num_dropped == 0
    listed = Prompt("b", "?", truth={"answers": ["7", "seven"]})
    assert gold.groups([listed]) == ([], 1)
    with pytest.raises(RsgrpoError, match="id b: column 'answer' holds a list of answers"):
        gold.check(PromptDataset([listed]))


def test_every_setting_that_training_shares_is_handed_over(configure):
    config = configure("seed=7", "learner.precision=bfloat16")
    train = as_train_config(config)
    for field in dataclasses.fields(SftConfig):
        if field.name not in ("batch_size", "max_response_tokens"):
            assert getattr(train, field.name) == getattr(config, field.name)
    assert train.algorithm.prompts_per_step == 4
    assert (train.rollout.max_response_tokens, train.rollout.dtype) == (256, "bfloat16")
    assert {field.name for field in dataclasses.fields(TrainConfig)} > {"cluster", "checkpoint"}


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(configure, tmp_path):
    checks = ["total_steps=2", "validation.every=2", "validation.samples=1"]
    sft(configure(*checks, "name=one"))
    sft(configure(*checks, "name=two", "learner.num_ranks=2"))
    for one, two in zip(exact_metrics(tmp_path / "one"), exact_metrics(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for key in ("actor/loss", "actor/grad_norm", "val/loss"):
            assert two.get(key) == (pytest.approx(one[key], rel=1e-4) if key in one else None)


def test_validation_samples_as_rollout_says(configure):
    config = configure("rollout=vllm", "rollout.num_workers=2", "learner.precision=bfloat16")
    rollout = as_train_config(config).rollout
    assert (rollout.engine, rollout.num_workers) == ("vllm", 2)
    assert (rollout.dtype, rollout.max_response_tokens) == ("bfloat16", 256)  # of the learner, and of the responses
    assert as_train_config(configure("rollout.max_response_tokens=64")).rollout.max_response_tokens == 64


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout=vllm", "cluster=inline"], "rollout.engine=vllm needs processes of its own"),
        (
            ["rollout=vllm", "rollout.vllm.sleep_level=2", "model.lora.rank=2", "model.freeze_vision=true"],
            "sleep_level=2",
        ),
    ],
)
def test_engines_that_cannot_validate_are_refused(configure, overrides, message):
    with pytest.raises(RsgrpoError, match=message):
        sft(configure(*overrides))


@pytest.mark.slow  # vLLM and Ray start: half a minute
def test_vllm_validates_what_the_embedded_engine_does(configure, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    checks = [
        "total_steps=2",
        "validation.every=2",
        "validation.greedy=true",
        "validation.samples=0",
        "checkpoint.keep_best=0",
    ]
    sft(configure(*checks, "name=embedded"))
    sft(configure(*checks, "name=vllm", "rollout=vllm"))
    embedded, vllm = (
        {key: value for row in exact_metrics(tmp_path / name) for key, value in row.items()}
        for name in ("embedded", "vllm")
    )
    assert vllm["actor/loss"] == pytest.approx(embedded["actor/loss"], rel=1e-5)
    assert vllm["val/greedy/num_prompts"] == embedded["val/greedy/num_prompts"] == 3
