"""Signals: before a run is under way, during it, and to the whole process group."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

from rsgrpo.cluster.connect import kept_handlers
from rsgrpo.running.checkpoint import CheckpointFolder
from rsgrpo.running.stopping import SIGNALS, StopRequested, StopSignals
from tests.material import ROOT
from tests.material.training import tiny_run, write_rewards, write_rows

# Locks a zeroed mutex twice: signals do not end that wait, and Python answers none meanwhile.
IN_FOREIGN_CODE = """
import ctypes
mutex = ctypes.create_string_buffer(64)
for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
IN_PYTHON = "import time\nwhile True: time.sleep(0.01)"


@pytest.fixture
def listening():
    stop = StopSignals()
    stop.listen()
    yield stop
    stop.close()


@pytest.mark.parametrize("waits", [IN_FOREIGN_CODE, IN_PYTHON])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_the_run_ends_the_program_at_once_with_one_line_and_0(number, waits):
    program = (
        f"from rsgrpo.running.stopping import leave_on_signals\nleave_on_signals()\nprint('ready', flush=True)\n{waits}"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert errors == f"Stopped by {number.name} before the first step. Run the same command to start again.\n"


def test_a_signal_during_a_run_is_remembered_until_it_may_be_left(listening):
    listening.check()
    signal.raise_signal(signal.SIGTERM)
    assert listening.requested is signal.SIGTERM
    with pytest.raises(StopRequested, match="SIGTERM"):
        listening.check()


def test_the_second_signal_interrupts(listening):
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_other_threads_finish_what_they_do(listening):
    signal.raise_signal(signal.SIGTERM)
    raised: list[Exception] = []

    def work() -> None:
        try:
            listening.check()
        except StopRequested as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert raised == []


def test_handlers_go_back_to_who_had_them():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = StopSignals()
    stop.listen()
    assert all(signal.getsignal(number) != before[number] for number in SIGNALS)
    stop.close()
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
    with kept_handlers():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def start_run(folder: Path, page_images: list[str], model_path: str) -> tuple[subprocess.Popen, str]:
    """Start a long run as a user would, in a process group of its own; return it and what marks its processes."""
    write_rewards(folder)
    plain = json.loads(
        json.dumps(
            dataclasses.asdict(
                tiny_run(folder, write_rows(folder / "rows.jsonl", page_images), model_path, total_steps=500)
            )
        )
    )
    recipe = folder / "conf" / "recipe" / "mine.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("# @package _global_\n" + yaml.safe_dump(plain))
    names = ("accuracy", "evidence", "well_formed", "no_early_index", "think_differs")
    command = [sys.executable, "-m", "rsgrpo.train", "--config-dir", str(folder / "conf"), "recipe=mine"]
    mark = f"RSGRPO_TEST_MARK={folder}"
    process = subprocess.Popen(
        [*command, *(f"~rewards.{name}" for name in names)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "RSGRPO_TEST_MARK": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return process, mark


def processes_with(mark: str) -> list[str]:
    """Command lines of live processes that inherited a variable."""
    name, _, value = mark.partition("=")
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:80])
        except psutil.Error:
            continue
    return found


def wait_until_gone(mark: str, timeout_s: float = 15) -> list[str]:
    end = time.monotonic() + timeout_s
    while (left := processes_with(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    return left


def read_until(process: subprocess.Popen, text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the run ended before it said {text!r}; exit code {process.wait()}")


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "wait_s"), [("starting the workers", 3.0), (" 1/500", 0.0)])
def test_sigterm_to_the_whole_group_ends_with_0_and_leaves_nothing_running(
    tmp_path, page_images, tiny_model_path, moment, wait_s
):
    process, mark = start_run(tmp_path, page_images, tiny_model_path)
    with process:
        read_until(process, moment)
        time.sleep(wait_s)
        os.killpg(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert output.count("Stopped by SIGTERM") == 1
    assert "Traceback" not in output
    assert wait_until_gone(mark) == []
    newest = CheckpointFolder(tmp_path / "run" / "checkpoints", keep_last=2, keep_best=0).newest()
    if moment == " 1/500":
        assert newest is not None
        assert f"after step {newest.step}" in output
    else:
        assert newest is None
