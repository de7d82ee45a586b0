"""`recipe=desk_demo` in small: the desk answers scripted policies, rewards tell them apart, one step is taken."""

from __future__ import annotations

import io
import json

import pytest

pytest.importorskip("sklearn")

from recipes.demo.desk_make import DeskSettings, write_desk_data, write_desk_model
from recipes.demo.desk_rows import DeskJob
from rollout.files import read_jsonl
from rsgrpo import cli
from rsgrpo.config.train import TrainConfig
from rsgrpo.records.console import Console
from rsgrpo.report.page import collect_report
from rsgrpo.train import train

SETTINGS = DeskSettings(sft_items=40, train_items=12, val_items=4, vision_steps=1)


def scripts(row):
    """Return four policies' turns: the right ones, another page, no page, and a malformed call first."""
    number = row["pages"].index(row["gold_pages"][0]) + 1
    box = " ".join(str(round(100 * edge)) for edge in row.get("gold_box", ()))
    zoom = [f"<zoom>{number} {box}</zoom>"] if box else []
    right = [f"<open>{number}</open>", *zoom, f"<answer>{row['answer']}</answer>"]
    other = [f"<open>{number % len(row['pages']) + 1}</open>", "<answer>none</answer>"]
    return [right, other, ["<answer>none</answer>"], ["<open>x</open>", *right]]


@pytest.mark.slow
def test_a_step_on_scripted_trajectories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job, quiet = DeskJob(0), Console(io.StringIO())
    data = tmp_path / "desk" / "data"
    data.mkdir(parents=True)
    write_desk_data(SETTINGS, job, data, quiet)
    write_desk_model(SETTINGS, job, data, tmp_path / "desk" / "model", quiet)
    rows = [row for _, row in read_jsonl(data / "train.jsonl")]
    lines = [{"id": row["id"], "responses": scripts(row)} for row in rows]
    (tmp_path / "script.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train(
        cli.compose(
            TrainConfig,
            "config",
            [
                "recipe=desk_demo", "model.path=desk/model", "rollout=fake", "rollout.script=script.jsonl",
                "cluster=inline", "total_steps=1", "rollout.group_size=4", "algorithm.prompts_per_step=4",
                "validation.every=0", "validation.at_start=false", "checkpoint.export=false", "checkpoint.keep_best=0",
            ],
        )
    )  # fmt: skip
    lines = [line for _, line in read_jsonl(tmp_path / "runs" / "desk_demo" / "metrics.jsonl")]
    metrics = {name: value for line in lines for name, value in line.items()}
    assert metrics["reward/answer_f1/mean"] == metrics["reward/gold_opened/mean"] == 0.5
    assert metrics["reward/well_called/mean"] == -0.25
    assert metrics["rollout/turns/bad_call"] == 4
    assert metrics["actor/grad_norm"] > 0

    report = collect_report(tmp_path / "runs" / "desk_demo")
    (view,) = report["views"]
    rollouts = [rollout for group in view["groups"] for rollout in group["rollouts"]]
    shown = [(rollout, read) for rollout in rollouts for read in rollout["observations"] if read["images"]]
    assert {read["facts"]["call"] for _, read in shown} >= {"open"}
    for rollout, read in shown:
        assert read["text"].count("<image>") == len(read["images"])
        assert all(report["images"][image].startswith("data:image/") for image in read["images"])
        assert 0 < read["at"] < len(rollout["ids"])  # between the call and what follows
    taught = view["terms"].index("answer_f1")
    right, _, blind, _ = rollouts[:4]
    assert {advantage > 0 for _, _, advantage in right["terms"][taught]} == {True}
    assert {advantage < 0 for _, _, advantage in blind["terms"][taught]} == {True}
    # the answer's score is determined at its end: with causal credit it teaches the calls before it as well
    assert right["terms"][taught][0][0] == 0
