"""Metrics, rollout files and trackers: what a run leaves behind, and what a resume takes back."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest

from rewards.api import Credit, Span
from rollout.types import Observation, Prompt
from rsgrpo.config.train import TrackingConfig
from rsgrpo.errors import RsgrpoError
from rsgrpo.lab.batches import rollout_group
from rsgrpo.records.rollouts import TokenRun, advantage_runs, read_rollouts, rollout_files, write_rollouts
from rsgrpo.records.tracking import FAILURES_KEY, NON_FINITE_KEY, Tracker, page_strip, read_metrics, spread_rows
from rsgrpo.types import ScoredGroup, TrainGroup
from tests.material import ROOT
from tests.material.synthetic_run import REWARDS, make_groups, make_scored, make_train_group, page_bytes

TEXT = "<observe>a</observe><evidence>b</evidence><think>c</think><answer>d</answer>"


def start(run_dir: Path, *, resume_step: int | None = None, state: dict | None = None, **tracking: Any) -> Tracker:
    return Tracker(run_dir, TrackingConfig(**tracking), {"seed": 1}, name="t", resume_step=resume_step, state=state)


def one_group() -> tuple[ScoredGroup, TrainGroup]:
    prompt = Prompt("p1", "<image>q?", (page_bytes(1, 2),), {"answers": ["2"], "page": 1}, "q?")
    scored = make_scored(prompt, [TEXT, "no tags at all"], [[1.0, 0.5, 1.0], [0.0, None, 0.0]])
    return scored, make_train_group(scored)


def test_each_log_call_is_one_line(tmp_path: Path) -> None:
    tracker = start(tmp_path)
    tracker.log(1, {"actor/loss": 0.5})
    tracker.log(2, {"actor/loss": np.float64(0.25), "actor/skipped": 0})
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["actor/loss"]) for line in lines] == [(1, 0.5), (2, 0.25)]
    assert all(line["time"] > 1e9 for line in lines)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
    tracker.close()
    tracker.close()


def test_values_that_are_not_finite_become_null_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(tmp_path)
    for step in (1, 2):
        tracker.log(step, {"actor/loss": float("nan"), "actor/kl": float("-inf"), "actor/lr": 1.0})
    tracker.close()
    line = read_metrics(tmp_path)[1]
    assert (line["actor/loss"], line["actor/kl"], line["actor/lr"], line[NON_FINITE_KEY]) == (None, None, 1.0, 2)
    assert tracker.num_non_finite == 4
    assert len([r for r in caplog.records if "not finite" in r.getMessage()]) == 1


def test_a_resume_cuts_metrics_and_rollouts_back_to_its_step(tmp_path: Path) -> None:
    tracker = start(tmp_path)
    scored, train = one_group()
    for step in range(4):
        tracker.log(step, {"a": step})
        tracker.store_rollouts(step, [scored], [train], terms=REWARDS)
        tracker.store_rollouts(step, [scored], split="val", mode="greedy")
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "time": 1.0, "a": 9')  # killed while it wrote
    (tmp_path / "rollouts" / ".step_000004.parquet.tmp").write_text("half")
    assert [line["a"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3]

    tracker = start(tmp_path, resume_step=1)
    tracker.log(2, {"a": 20})
    tracker.close()
    assert [line["a"] for line in read_metrics(tmp_path)] == [0, 1, 20]
    assert list(rollout_files(tmp_path)) == list(rollout_files(tmp_path, "val")) == [0, 1]
    assert not list((tmp_path / "rollouts").glob(".*"))


def test_a_fresh_run_removes_what_an_earlier_one_left(tmp_path: Path) -> None:
    tracker = start(tmp_path)
    tracker.log(0, {"a": 1})
    tracker.store_rollouts(0, [one_group()[0]], split="val", mode="greedy")
    tracker.close()
    start(tmp_path).close()
    assert read_metrics(tmp_path) == []
    assert rollout_files(tmp_path, "val") == {}


def test_advantage_runs_are_maximal_and_keep_zero_advantages_apart_from_no_scope() -> None:
    scope_T = np.array([0, 1, 1, 1, 0, 1, 1], dtype=bool)
    advantages_T = np.array([0, 0.5, 0.5, -1, 0, 0, 0], dtype=np.float32)
    assert advantage_runs(scope_T, advantages_T) == [TokenRun(1, 3, 0.5), TokenRun(3, 4, -1.0), TokenRun(5, 7, 0.0)]


def test_rollouts_read_back_as_they_were(tmp_path: Path) -> None:
    scored, train = one_group()
    path = write_rollouts(tmp_path, 12, [scored], [train], terms=REWARDS)
    assert path.name == "step_000012.parquet"
    rows = read_rollouts(path)
    assert len(rows) == 2
    for row, rollout, sample in zip(rows, scored.group.rollouts, train.samples, strict=True):
        np.testing.assert_array_equal(row.scope_KT(), sample.scope_KT)
        np.testing.assert_array_equal(row.advantages_KT(), sample.advantages_KT)
        assert (row.text, row.finish_reason, row.weights_version) == (rollout.text, "stop", 0)
        assert list(row.token_ids_T) == list(rollout.token_ids_T)
        assert list(row.token_spans_T) == list(rollout.token_spans_T)
        np.testing.assert_allclose(row.rollout_logprobs_T, rollout.logprobs_T, rtol=1e-6)
        assert row.num_tokens == len(rollout.token_ids_T)
        assert not row.truncated
    first, second = rows
    assert first.truth == {"answers": ["2"], "page": 1}
    assert (first.step, first.split, first.group, first.sample, first.prompt_id) == (12, "train", 0, 0, "p1")
    assert list(first.terms) == list(REWARDS)
    think = TEXT.index("<think>")
    assert first.rewards[1].credits == (Credit("", 0.5, Span(0, think)),)
    assert [(r.score, r.missed) for r in second.rewards] == [(0.0, True), (None, True), (0.0, False)]
    assert second.rewards[0].credits == (Credit("", 0.0, None),)


def test_monitors_are_stored_beside_the_rewards(tmp_path: Path) -> None:
    plain, _ = one_group()
    scored = ScoredGroup(
        plain.group, plain.reward_names_K, plain.scores_GK, plain.credits_GK, plain.missed_GK,
        monitor_names_M=("words",), monitors_GM=[[3.0], [None]],
    )  # fmt: skip
    rows = read_rollouts(write_rollouts(tmp_path, 1, [scored]))
    assert [row.monitors for row in rows] == [{"words": 3.0}, {"words": None}]
    assert rows[0].terms == {}


def test_image_bytes_are_stored_once_and_paths_become_absolute(
    tmp_path: Path, page_images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(page_images[0]).parent)
    page = page_bytes(3, 4)
    prompt = Prompt("p", "<image><image>", (page, Path(page_images[0]).name))
    scored = make_scored(prompt, [TEXT], [[1.0, 1.0, 1.0]])
    rows = [read_rollouts(write_rollouts(tmp_path, step, [scored]))[0] for step in (1, 2)]
    assert rows[0].images == rows[1].images
    assert [path.read_bytes() for path in (tmp_path / "rollouts" / "images").iterdir()] == [page]
    assert (tmp_path / rows[0].images[0]).read_bytes() == page
    assert rows[0].images[1] == page_images[0] == str(tmp_path / page_images[0])


def test_observations_read_back_with_their_images_and_older_files_have_none(
    tmp_path: Path, page_images: list[str]
) -> None:
    scored, train = one_group()
    page = page_bytes(3, 4)
    facts = {"opened": ["p3"], "cost": 0.5}
    observations = (
        Observation(2, 5, (7, 8, 8), "<image> and <image>", (page, page_images[0]), facts, "slow"),
        Observation(len(scored.group.rollouts[0].token_ids_T), 9, facts={"done": True}),
    )
    first, second = scored.group.rollouts
    group = replace(scored.group, rollouts=(replace(first, observations=observations, finish_reason="turns"), second))
    path = write_rollouts(tmp_path, 1, [replace(scored, group=group)], [train], terms=REWARDS)
    stored, plain = read_rollouts(path)
    assert stored.finish_reason == "turns"
    assert plain.observations == ()
    [seen, end] = stored.observations
    assert (tmp_path / str(seen.images[0])).read_bytes() == page
    assert seen == replace(observations[0], images=(seen.images[0], page_images[0]))
    assert end == observations[1]
    [again, _] = rollout_group(tmp_path, [stored, plain], "").rollouts  # as the laboratory reads it
    assert again.observations[0].images == (str(tmp_path / str(seen.images[0])), page_images[0])
    assert (again.observations[0].token_ids_S, again.finish_reason) == ((7, 8, 8), "turns")
    pq.write_table(pq.read_table(path).drop_columns(["observations"]), path)
    assert [row.observations for row in read_rollouts(path)] == [(), ()]


def test_both_validation_modes_share_a_file_and_a_mode_is_replaced(tmp_path: Path) -> None:
    groups = make_groups(1, num_groups=2, group_size=1)
    write_rollouts(tmp_path, 5, groups, split="val", mode="greedy")
    write_rollouts(tmp_path, 5, groups, split="val", mode="sampled")
    path = write_rollouts(tmp_path, 5, groups[:1], split="val", mode="greedy")
    assert [row.mode for row in read_rollouts(path)] == ["sampled", "sampled", "greedy"]


def test_train_groups_that_do_not_belong_to_the_scored_ones_are_refused(tmp_path: Path) -> None:
    first, second, third = make_groups(1, num_groups=3)
    with pytest.raises(RsgrpoError, match="2 scored groups but 1 train groups"):
        write_rollouts(tmp_path, 1, [first, second], [make_train_group(first)], terms=REWARDS)
    with pytest.raises(RsgrpoError, match="same order"):
        write_rollouts(tmp_path, 1, [first, second], [make_train_group(third), make_train_group(second)], terms=REWARDS)
    with pytest.raises(RsgrpoError, match="3 loss terms but `terms` names 1"):
        write_rollouts(tmp_path, 1, [first], [make_train_group(first)], terms=["grpo"])
    assert not rollout_files(tmp_path)


def test_store_rollouts_can_be_switched_off(tmp_path: Path) -> None:
    tracker = start(tmp_path, store_rollouts=False)
    tracker.store_rollouts(1, [one_group()[0]])
    tracker.close()
    assert not (tmp_path / "rollouts").exists()


@pytest.mark.parametrize(
    ("sizes", "num_rows", "rows"),
    [([2, 1], 3, [(0, 0), (1, 0), (0, 1)]), ([2, 2, 2], 2, [(0, 0), (1, 0)]), ([], 4, [])],
)
def test_table_rows_are_spread_over_the_groups(sizes, num_rows, rows) -> None:
    assert spread_rows(sizes, num_rows) == rows


def test_page_strip_sets_pages_side_by_side(page_images: list[str]) -> None:
    strip = page_strip([page_bytes(1, 2), page_images[0]], max_side=38)
    assert strip is not None
    assert strip.size == (30 + 4 + 38, 38)  # 300x380 -> 30x38, 84x56 -> 38x25
    assert page_strip([]) is None


def test_wandb_offline_writes_a_run_with_its_rollout_table(tmp_path: Path) -> None:
    before = {key: os.environ.get(key) for key in ("WANDB_DIR", "WANDB_DATA_DIR")}
    tracker = start(tmp_path, wandb="offline", rollout_table_rows=2)
    assert tracker.num_failures == 0
    tracker.log(1, {"actor/loss": 0.5, "actor/kl": float("nan")})
    tracker.store_rollouts(1, [one_group()[0]])
    state = tracker.state()
    tracker.close()
    assert tracker.num_failures == 0
    (run_folder,) = (tmp_path / "wandb").glob(f"offline-run-*-{state['wandb_run_id']}")
    assert (run_folder / f"run-{state['wandb_run_id']}.wandb").stat().st_size > 0
    (table,) = run_folder.glob("files/media/table/**/*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["step", "prompt", "pages", "question", "truth", "response", *REWARDS]
    assert [(row[1], row[5], row[6:]) for row in content["data"]] == [
        ("p1", TEXT, [1.0, 0.5, 1.0]),
        ("p1", "no tags at all", [0.0, None, 0.0]),
    ]
    staged = list((tmp_path / "wandb" / "artifacts" / "staging").iterdir())
    assert any(path.read_bytes().startswith(b"\xff\xd8\xff") for path in staged), "the table's thumbnails are jpegs"
    assert {key: os.environ.get(key) for key in before} == before

    resumed = start(tmp_path, resume_step=1, state=state, wandb="offline")
    assert resumed.state() == state
    resumed.close()


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """A wandb whose `init` can be told to fail."""
    fake = Mock()
    fake.init.side_effect = lambda **options: Mock(settings=Mock(sync_dir=options["dir"]), log=fake.log)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def unreachable(**options: Any) -> Mock:
    if options["mode"] == "online":
        raise TimeoutError("no route")
    return Mock(settings=Mock(sync_dir=options["dir"]))


def asked_of(fake: Mock) -> list[dict[str, Any]]:
    return [call.kwargs for call in fake.init.call_args_list]


def test_wandb_without_network_continues_offline_and_says_so(
    tmp_path: Path, fake_wandb: Mock, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb.init.side_effect = unreachable
    tracker = start(tmp_path, wandb="online")
    tracker.log(1, {"a": 1.0})
    tracker.close()
    asked = asked_of(fake_wandb)
    assert [options["mode"] for options in asked] == ["online", "offline"]
    assert asked[0]["id"] != asked[1]["id"]
    assert tracker.state()["wandb_run_id"] == asked[1]["id"]
    assert read_metrics(tmp_path)[0][FAILURES_KEY] == 1
    assert "no route" in caplog.text
    assert "wandb sync" in caplog.text


def test_an_online_run_keeps_its_id_while_it_is_offline(tmp_path: Path, fake_wandb: Mock) -> None:
    fake_wandb.init.side_effect = unreachable
    tracker = start(tmp_path, wandb="online", resume_step=0, state={"wandb_run_id": "abcd1234"})
    online = asked_of(fake_wandb)[0]
    assert (online["id"], online["resume"]) == ("abcd1234", "allow")
    assert tracker.state()["wandb_run_id"] == "abcd1234"
    tracker.close()


def test_a_tracker_that_fails_does_not_stop_training(
    tmp_path: Path, fake_wandb: Mock, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb.log.side_effect = ConnectionError("gone")
    tracker = start(tmp_path, wandb="offline")
    for step in (1, 2, 3):
        tracker.log(step, {"a": float(step)})
    tracker.close()
    lines = read_metrics(tmp_path)
    assert [line["a"] for line in lines] == [1.0, 2.0, 3.0]
    assert [line.get(FAILURES_KEY) for line in lines] == [None, 1, 2]
    assert len([record for record in caplog.records if "gone" in record.getMessage()]) == 1
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_tensorboard_gets_finite_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    tracker = start(tmp_path, tensorboard=True)
    tracker.log(3, {"actor/loss": 0.5, "actor/kl": float("inf")})
    tracker.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    seen = [(event.step, value.tag) for event in EventFileLoader(str(file)).Load() for value in event.summary.value]
    assert seen == [(3, "actor/loss"), (3, NON_FINITE_KEY)]


def test_readers_of_a_run_load_neither_torch_nor_trackers() -> None:
    code = "import sys, rsgrpo.report; print(sorted({'torch', 'wandb', 'tensorboard', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_metric_that_the_code_names_is_documented() -> None:
    quoted = re.findall(r"`([\w/<>]+)`", (ROOT / "docs" / "reference" / "metrics.md").read_text())
    documented = re.compile("|".join(re.sub(r"<\w+>", r"\\w+", name) for name in quoted))
    key = re.compile(r'f?"((?:actor|data|monitor|perf|reward|rollout|scope|time|tracking|val)/[\w{}/]*[\w}])"')
    readers = {"rsgrpo/report", "rsgrpo/records/console.py"}
    found = {
        name
        for folder in ("rsgrpo", "recipes")
        for path in (ROOT / folder).rglob("*.py")
        if not any(path.relative_to(ROOT).as_posix().startswith(reader) for reader in readers)
        for name in key.findall(path.read_text())
    }
    assert "actor/entropy" in found
    missing = [name for name in sorted(found) if not documented.fullmatch(re.sub(r"{[^}]*}", "x", name))]
    assert not missing, f"add these to docs/reference/metrics.md: {missing}"


def test_a_line_written_after_the_checkpoint_goes_even_when_its_step_stays(tmp_path):
    tracker = start(tmp_path)
    tracker.log(1, {"actor/loss": 0.5})
    state = tracker.state()  # a signal stopped the run here, before step 1 was validated
    tracker.log(1, {"val/sampled/accuracy": 0.25})
    tracker.close()
    start(tmp_path, resume_step=1, state=state).close()
    assert [row.get("actor/loss") for row in read_metrics(tmp_path)] == [0.5]
