"""Runs whose rows are streamed: from files, from packed images, over a network that fails; stopped and gone on with."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from recipes.files.row_check import Uncounted
from recipes.sft import sft
from rollout.config import InputsConfig
from rollout.types import Prompt
from rsgrpo.cluster.local import LocalCluster
from rsgrpo.config.train import (
    AlgorithmConfig,
    CheckpointConfig,
    DataConfig,
    LearnerConfig,
    ModelConfig,
    PromptConfig,
    SftConfig,
    TrainConfig,
    ValidationConfig,
)
from rsgrpo.data import streaming as streamed_prompts
from rsgrpo.data.rows import Row, open_rows
from rsgrpo.data.streaming import StreamedPrompts
from rsgrpo.errors import SourceBroke
from rsgrpo.records.tracking import read_metrics
from rsgrpo.running.checkpoint import CheckpointFolder
from rsgrpo.running.run import Run
from rsgrpo.train import take_step
from tests.material.hub_stub import data_set_hub
from tests.material.training import tiny_run, write_rewards, write_rows

SHARD = "train-{}-of-00003.jsonl"


@pytest.fixture
def rows(tmp_path: Path, page_images: list[str]) -> Path:
    """A folder with rows.jsonl and its images.parquet, and nothing else."""
    (tmp_path / "rows").mkdir()
    source = write_rows(tmp_path / "rows" / "rows.jsonl", page_images)
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    names = sorted({path for line in lines for path in line["image"]})
    contents = [Path(name).read_bytes() for name in names]
    short = {name: f"imgs/{Path(name).name}" for name in names}
    for line in lines:
        line["image"] = [short[path] for path in line["image"]]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = pyarrow.table({"path": [short[name] for name in names], "bytes": contents})
    pyarrow.parquet.write_table(table, source.parent / "images.parquet", row_group_size=1)
    return source.parent


@pytest.fixture(autouse=True)
def short_start(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows are looked at before a run; there is a user's reward with signal on random text."""
    monkeypatch.setattr("rsgrpo.running.prompts.NUM_SHOWN_AT_START", 2)
    folder = tmp_path_factory.mktemp("rewards")
    write_rewards(folder)
    monkeypatch.syspath_prepend(str(folder))


def shards_of(folder: Path) -> dict[str, bytes]:
    """The rows in three files, as a hub data set has them."""
    lines = (folder / "rows.jsonl").read_bytes().splitlines(keepends=True)
    each = -(-len(lines) // 3)
    return {SHARD.format(f"{n:05d}"): b"".join(lines[n * each : (n + 1) * each]) for n in range(3)}


def learner_config() -> LearnerConfig:
    return LearnerConfig(
        device="cpu", precision="float32", lr=1e-3, num_threads=1, gradient_checkpointing="none",
        max_tokens_per_micro_batch=1024,
    )  # fmt: skip


def rl_config(folder: Path, model: str, source: str, **data: Any) -> TrainConfig:
    """Steps of two prompts with four rollouts."""
    return tiny_run(
        folder,
        Path(source),
        model,
        total_steps=3,
        data=DataConfig(train=source, streaming=True, shuffle_buffer=3, **data),
        validation=ValidationConfig(every=0, at_start=False),
        checkpoint=CheckpointConfig(every=100, export=False),
    )


def train(config: TrainConfig) -> None:
    """The loop of `rsgrpo.train` with all roles in this process."""
    with Run.open(config, start_cluster=LocalCluster) as run:
        for step in run.steps_left:
            take_step(run, step)


def exact(config: TrainConfig | SftConfig, name: str) -> list[dict[str, Any]]:
    """What a run measured, but for clocks and memory."""
    metrics = read_metrics(Path(config.output_dir) / name)
    return [{k: v for k, v in row.items() if not k.startswith(("time", "perf/"))} for row in metrics]


def sent(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts as another process gets them: with the images' bytes."""
    return pickle.loads(pickle.dumps(list(prompts)))


def break_after(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    """Let every source that is opened from now on break off after so many rows."""

    def open_broken(source: str, **how: Any) -> tuple[Iterator[Row], Path]:
        rows, folder = open_rows(source, **how)

        def until() -> Iterator[Row]:
            for row in rows:
                if row.number > num_rows:
                    raise SourceBroke(f"broke off after row {num_rows}")
                yield row

        return until(), folder

    monkeypatch.setattr(streamed_prompts, "open_rows", open_broken)


# RL


def test_streamed_rows_with_packed_images_teach_what_files_teach_also_after_a_stop(
    rows, tmp_path, tiny_model_path, page_images
):
    config = rl_config(tmp_path, tiny_model_path, str(rows / "rows.jsonl"))
    train(dataclasses.replace(config, name="whole"))
    for total_steps in (1, 3):
        train(dataclasses.replace(config, name="parts", total_steps=total_steps))
    whole = exact(config, "whole")
    assert [row["step"] for row in whole] == [1, 2, 3]
    assert exact(config, "parts") == whole
    plain = write_rows(tmp_path / "plain.jsonl", page_images)
    train(dataclasses.replace(rl_config(tmp_path, tiny_model_path, str(plain)), name="files"))
    assert exact(config, "files") == whole


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_source_that_breaks_off_saves_the_run_and_the_same_command_goes_on(
    rows, tmp_path, tiny_model_path, monkeypatch, ahead
):
    algorithm = AlgorithmConfig(prompts_per_step=2, max_staleness=ahead, importance_cap=2.0 if ahead else 0.0)
    config = rl_config(tmp_path, tiny_model_path, str(rows / "rows.jsonl"), shuffle=False)
    config = dataclasses.replace(config, algorithm=algorithm)
    train(dataclasses.replace(config, name="whole"))
    with monkeypatch.context() as patch:
        break_after(patch, 4)
        with pytest.raises(SourceBroke, match="broke off after row 4"):
            train(dataclasses.replace(config, name="parts"))
    assert [row["step"] for row in exact(config, "parts")] == [1, 2]
    newest = CheckpointFolder(tmp_path / "parts/checkpoints", keep_last=1, keep_best=0).newest()
    assert newest is not None
    assert newest.step == 2
    train(dataclasses.replace(config, name="parts"))
    whole, parts = exact(config, "whole"), exact(config, "parts")
    assert parts[:2] == whole[:2]
    if ahead:  # step 3 was to be sampled before step 2 was learnt; now it is sampled after it, from the same rows
        assert [row["rollout/oldest_weights_version"] for row in parts] == [0, 0, 2]
        assert parts[2]["rollout/num_prompt_tokens_mean"] == whole[2]["rollout/num_prompt_tokens_mean"]
    else:
        assert parts == whole


# The hub


def test_a_hub_that_fails_for_good_in_the_middle_of_a_pass_is_named_with_the_row_it_came_to(
    rows, tmp_path, monkeypatch
):
    with data_set_hub(monkeypatch, str(tmp_path / "cache"), "org/rows", shards_of(rows)) as hub:
        data = DataConfig(train="org/rows:train", streaming=True, shuffle=False, image_dir=str(rows))
        stream = StreamedPrompts(data, PromptConfig(), Uncounted(InputsConfig()), 0)
        expected = [prompt.id for prompt in stream.next(6)]
        assert expected == [f"row{n}" for n in range(6)]
        stream = StreamedPrompts(data, PromptConfig(), Uncounted(InputsConfig()), 0)
        hub.breaks.add(SHARD.format("00001"))
        stream.next(1)
        state = stream.state()
        for _ in range(2):  # it stays broken, and does not take the end for the end of the pass
            with pytest.raises(
                SourceBroke, match="the hub data set org/rows broke off after row 2: RemoteProtocolError"
            ):
                stream.next(3)
        assert hub.num_broken > 2, "the libraries try again before they give up"
        assert stream.state() == state
        hub.breaks.clear()
        resumed = StreamedPrompts(data, PromptConfig(), Uncounted(InputsConfig()), 0)
        resumed.load_state(state)
        assert [prompt.id for prompt in resumed.next(5)] == expected[1:]


def test_a_supervised_run_over_a_hub_that_fails_ends_with_a_checkpoint_and_goes_on_as_if_it_had_not(
    rows, tmp_path, tiny_model_path, monkeypatch
):
    def config(source: str, name: str) -> SftConfig:
        return SftConfig(
            name=name,
            output_dir=str(tmp_path),
            total_steps=3,
            batch_size=2,
            max_response_tokens=256,
            model=ModelConfig(path=tiny_model_path),
            data=DataConfig(train=source, streaming=True, shuffle=False, image_dir=str(rows)),
            inputs=InputsConfig(min_pixels=784, max_pixels=50_176, max_prompt_tokens=400),
            learner=learner_config(),
            validation=ValidationConfig(every=0, at_start=False),
            checkpoint=CheckpointConfig(every=100, export=False),
        )

    whole = config(str(rows / "rows.jsonl"), "whole")
    sft(whole)
    with data_set_hub(monkeypatch, str(tmp_path / "cache"), "org/rows", shards_of(rows)) as hub:
        run = config("org/rows:train", "hub")
        hub.breaks.add(SHARD.format("00001"))
        with pytest.raises(SourceBroke, match="Run the same command to resume from the last checkpoint"):
            sft(run)
        assert [row["step"] for row in exact(run, "hub")] == [1]
        hub.breaks.clear()
        sft(run)
    assert exact(run, "hub") == exact(whole, "whole")


def test_a_hub_data_set_with_packed_images_is_fetched_and_streamed_from_disk_and_then_without_a_network(
    rows, tmp_path, monkeypatch
):
    files = {name: (rows / name).read_bytes() for name in ("rows.jsonl", "images.parquet")}
    local = StreamedPrompts(
        DataConfig(train=str(rows / "rows.jsonl"), streaming=True), PromptConfig(), Uncounted(InputsConfig()), 0
    ).next(8)
    with data_set_hub(monkeypatch, str(tmp_path / "cache"), "org/packed", files):
        data = DataConfig(train="org/packed:rows", streaming=True)
        fetched = StreamedPrompts(data, PromptConfig(), Uncounted(InputsConfig()), 0).next(8)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        offline = StreamedPrompts(data, PromptConfig(), Uncounted(InputsConfig()), 0).next(8)
    assert sent(fetched) == sent(offline) == sent(local)
