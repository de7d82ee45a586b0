"""Files of a run, torn or changed at any byte, give a report and a resume: never a traceback."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from rollout.files import WriteError
from rsgrpo.config.train import TrackingConfig
from rsgrpo.records.rollouts import read_rollouts, rollout_files
from rsgrpo.records.tracking import METRICS_FILE, Tracker, cut_metrics_after, read_metrics
from rsgrpo.report.page import write_report
from rsgrpo.running.settings import SETTINGS_FILE, changed_settings, write_settings
from tests.material.synthetic_run import make_groups, write_run

QUIET = TrackingConfig(wandb="disabled", tensorboard=False)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "sound", num_steps=3, val_every=3)


def test_any_damage_of_metrics_settings_or_rollouts_leaves_a_report(sound, tmp_path, caplog):
    draw = random.Random(0)
    files = [
        Path(METRICS_FILE),
        Path("config.yaml"),
        *(path.relative_to(sound) for path in (sound / "rollouts").glob("*.parquet")),
    ]
    for trial in range(24):
        run = shutil.copytree(sound, tmp_path / f"run{trial}")
        path = run / files[trial % len(files)]
        content = bytearray(path.read_bytes())
        place = draw.randrange(len(content))
        if trial % 3 == 0:
            content = content[:place]
        elif trial % 3 == 1:
            content[place : place + 64] = bytes(64)
        else:
            content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        assert write_report(run).stat().st_size > 10_000
        Tracker(run, QUIET, {}, name="x", resume_step=2).close()
        assert all(row["step"] <= 2 for row in read_metrics(run))
        changed_settings(run, {"seed": 1})


def test_a_line_of_zeros_is_dropped_and_named(tmp_path, caplog):
    path = tmp_path / METRICS_FILE
    path.write_bytes(b'{"step": 1, "a": 1}\n' + bytes(30) + b'\n{"step": 3}\n{"step": 4}\n')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3, 4]
    assert "damaged and left out: line 2" in caplog.text
    assert cut_metrics_after(path, 3, max_lines=3) == 2
    assert path.read_text() == '{"step": 1, "a": 1}\n{"step": 3}\n'


def test_a_run_whose_folder_was_deleted_ends_at_the_next_step(tmp_path):
    tracker = Tracker(tmp_path / "run", QUIET, {}, name="x", resume_step=None)
    tracker.log(1, {"a": 1.0})
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(WriteError, match=r"metrics\.jsonl was deleted while the run was writing it"):
        tracker.log(2, {"a": 1.0})
    tracker.close()


@pytest.mark.parametrize("content", [None, b"", b"\0" * 50, b"a: [", b"just text", b"\xff\xfe"])
def test_a_run_without_readable_settings_is_resumed_and_says_so(tmp_path, content, caplog):
    if content is not None:
        (tmp_path / SETTINGS_FILE).write_bytes(content)
    assert changed_settings(tmp_path, {"seed": 1}) == {}
    assert "what the run in" in caplog.text
    write_settings(tmp_path, {"seed": 1, "betas": (1, 2)})
    assert changed_settings(tmp_path, {"seed": 2, "betas": (1, 2)}) == {"seed": (1, 2)}


def test_an_image_emptied_by_a_power_cut_is_written_again(sound, tmp_path):
    run = shutil.copytree(sound, tmp_path / "run")
    tracker = Tracker(run, QUIET, {}, name="x", resume_step=3)
    stored = read_rollouts(rollout_files(run)[1])
    image = run / stored[0].images[0]
    content = image.read_bytes()
    image.write_bytes(b"")
    tracker.store_rollouts(1, make_groups(1))
    tracker.close()
    assert image.read_bytes() == content
