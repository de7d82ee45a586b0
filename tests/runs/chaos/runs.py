"""Small runs with faults: what they train on, how they are started again, and what is left of them afterwards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image

from rsgrpo.config.learner import AlgorithmConfig
from rsgrpo.config.train import CheckpointConfig, ClusterConfig, GateConfig, TrainConfig, ValidationConfig
from rsgrpo.records.tracking import read_metrics
from tests.material import ROOT
from tests.material.training import tiny_run, write_rewards, write_rows
from tests.runs.chaos.injector import PLAN, Fault, read_events, write_event, write_plan

SILENCE_S, RAY_SILENCE_S = 8.0, 10.0
"""Limits of the runs here; a user's are 300 and 45 seconds."""

LEARNER_CPUS, HEAD_CPUS, SECOND_CPUS = 1.4, 2, 1
"""Of two nodes the head has room for a learner, an engine and the rewards; so the other engine is on the second one."""

STOPPED_S = 12.0
"""How long a stopped driver stays so: longer than its workers may be silent."""

ORPHAN_S = 75.0
"""Ray's agents notice after about a minute that the process they belong to is gone."""

OF_A_RUN = ("ray::RolloutWorker", "ray::LearnerWorker", "ray::RewardWorker", "tests.runs.chaos.program")
"""What a run has started in a cluster that it has joined; Ray's own processes there are the cluster's."""

STARTUP_S = 150.0
START_S = 400.0
"""The longest that workers may take to start, and that one start of the program may take to its end or next fault."""

RESTARTS = ("rollout/engine_restarts", "rollout/reward_restarts", "rollout/engines", "rollout/tokens_per_s")
RESAMPLED = ("actor/mismatch_",)
"""Rounding of responses that were sampled again beside fewer others."""


def make_material(folder: Path) -> Path:
    """Write rows, pages, rewards and a tiny model, unless they are there; return the folder."""
    from recipes.demo.model import build_model, save_model_folder, train_tokenizer
    from tests.conftest import CORPUS

    if (folder / "model" / "preprocessor_config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng, pages = np.random.default_rng(0), []
    for index, (height, width) in enumerate([(56, 84), (112, 56), (84, 84)]):
        pages.append(str(folder / f"page{index}.png"))
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(pages[-1])
    write_rows(folder / "rows.jsonl", pages)
    write_rewards(folder)
    tokenizer = train_tokenizer(CORPUS, vocab_size=400)
    model = build_model(tokenizer, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, vision_hidden_size=64)
    save_model_folder(model, tokenizer, folder / "model")
    return folder


def config_of(material: Path, output_dir: Path, *, steps: int, role: str = "", address: str = "") -> TrainConfig:
    """Return a run whose every phase exists; it has the ranks, the reference or the node that `role` belongs to."""
    config = tiny_run(
        output_dir,
        material / "rows.jsonl",
        str(material / "model"),
        total_steps=steps,
        gate=GateConfig(every=2),
        validation=ValidationConfig(every=2, at_start=False, max_prompts=2, temperature=1.0, top_p=1.0),
        checkpoint=CheckpointConfig(every=1, keep_last=2, keep_best=0, export=True),
        cluster=ClusterConfig(
            address=address,
            num_cpus=0 if address else 3,
            cpus={"rollout": 0.5, "learner": LEARNER_CPUS if role == "raylet" else 0.4, "reward": 0.1},
            silence_timeout_s=SILENCE_S,
            startup_timeout_s=STARTUP_S,
        ),
    )
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, val=str(material / "rows.jsonl")), algorithm=_algorithm(role)
    )
    if role == "learner 1":
        config = dataclasses.replace(config, learner=dataclasses.replace(config.learner, num_ranks=2))
    if role == "raylet":
        config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, num_workers=2))
    return config


def _algorithm(role: str) -> AlgorithmConfig:
    return AlgorithmConfig(prompts_per_step=2, kl_coef=0.1 if role == "reference" else 0.0)


def command_of(config: TrainConfig, folder: Path, program: str = "tests.runs.chaos.program") -> list[str]:
    """Return the run as a command line, its recipe a yaml file of the user's own."""
    recipe = folder / "conf" / "recipe" / "mine.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    recipe.write_text("# @package _global_\n" + yaml.safe_dump(plain))
    others = ("accuracy", "evidence", "well_formed", "no_early_index", "think_differs")
    only = [f"~rewards.{name}" for name in others]
    return [sys.executable, "-m", program, "--config-dir", str(recipe.parent.parent), "recipe=mine", *only]


@dataclass
class Outcome:
    """What became of a run with faults.

    codes: exit code of every start. console: all output, with a line "CHAOS n: ..." before what fault n caused.
    seconds: of each fault, until the run passed the same point again, or the program ended; -1 where the tests were cut
    off meanwhile. ended: whether it ended.
    orphans: names of the processes that were left `ORPHAN_S` after the last end, and orphan_s: when the last one ended.
    """

    codes: list[int] = field(default_factory=list)
    console: str = ""
    seconds: list[float] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    orphan_s: float = 0.0


def run_with(
    faults: Sequence[Fault],
    folder: Path,
    config: TrainConfig,
    material: Path,
    *,
    environment: dict[str, str] | None = None,
    on_fault: Callable[[int], None] = lambda index: None,
    max_starts: int = 1,
) -> Outcome:
    """Run the command with faults; start it again, as a user does, until it ends well or `max_starts` is reached.

    A stopped driver is continued. on_fault: called when fault n has happened; may block.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / PLAN).exists():
        write_plan(folder, faults)
    command = command_of(config, folder)
    variables = {
        **os.environ,
        **(environment or {}),
        "RSGRPO_CHAOS": str(folder),
        "RSGRPO_CHAOS_RAY_SILENCE_S": str(RAY_SILENCE_S),
        "PYTHONPATH": f"{material}{os.pathsep}{ROOT}",
    }
    console = folder / "console.log"
    seen = len(_times(folder, "fault"))
    for _ in range(max_starts):
        with open(console, "a") as output:
            process = subprocess.Popen(command, cwd=folder, env=variables, stdout=output, stderr=subprocess.STDOUT)
            try:
                late_at = time.monotonic() + START_S
                while process.poll() is None and time.monotonic() < late_at:
                    for index in range(seen, len(_times(folder, "fault"))):
                        seen += 1
                        late_at = time.monotonic() + START_S
                        if faults[index].role == "driver" and faults[index].kind == "SIGSTOP":
                            time.sleep(STOPPED_S)
                            process.send_signal(signal.SIGCONT)
                        on_fault(index)
                    time.sleep(0.1)
                if process.poll() is None:
                    output.write(f"\nHANGS after {START_S:g} s\n")
            except SystemExit:
                write_event(folder, cut=0)
                raise
            finally:
                if process.poll() is None:
                    process.kill()
        write_event(folder, end=process.wait())
        if process.returncode == 0:
            break
    outcome = outcome_of(folder)
    outcome.console = console.read_text()
    outcome.orphan_s, outcome.orphans = wait_for_orphans(str(folder), OF_A_RUN if config.cluster.address else ("",))
    return outcome


def outcome_of(folder: Path) -> Outcome:
    """Return what the events of a folder say; a fault has no seconds if the tests themselves were cut off after it."""
    outcome, never = Outcome(), float("inf")
    events = read_events(folder)
    ends, cuts = ([event["at"] for event in events if kind in event] for kind in ("end", "cut"))
    code_at = {event["at"]: event["end"] for event in events if "end" in event}
    outcome.codes = [int(event["end"]) for event in events if "end" in event]
    again = _times(folder, "again")
    for index, at in enumerate(_times(folder, "fault")):
        passed = again[index] if index < len(again) else never
        end = min((end for end in ends if end >= at), default=never)
        cut = min((cut for cut in cuts if cut >= at), default=never)
        first = min(passed, end)
        outcome.seconds.append(round(first - at, 1) if first < min(cut, never) else -1.0)
        outcome.ended.append(end < passed and code_at[end] != 0)
    return outcome


def _times(folder: Path, kind: str) -> list[float]:
    return [float(event["at"]) for event in read_events(folder) if kind in event]


def wait_for_orphans(mark: str, titles: Sequence[str] = ("",)) -> tuple[float, list[str]]:
    """Wait until no process is left whose environment holds `mark`, and its command line one of `titles`.

    Returns:
        For how long it waited, and who is left in the end.
    """
    start = time.monotonic()
    while (left := processes_with(mark, titles)) and time.monotonic() - start < ORPHAN_S:
        time.sleep(0.3)
    names = [process.name() for process in left]
    for process in left:
        process.kill()
    return round(time.monotonic() - start, 1), names


def processes_with(mark: str, titles: Sequence[str] = ("",)) -> list[psutil.Process]:
    """Return the living processes that a run in folder `mark` has started, at whatever distance, with these titles."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RSGRPO_CHAOS") != mark or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if any(title in " ".join(process.cmdline()) for title in titles):
                found.append(process)
        except psutil.Error:
            continue
    return found


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Return all rows without what depends on the clock, on the machine, or on what was restarted."""
    left_out = ("time/", "perf/", *RESTARTS)
    return [
        {key: value for key, value in row.items() if key != "time" and not key.startswith(left_out)}
        for row in read_metrics(run)
    ]


def differences(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> list[str]:
    """Return the metrics that differ; of `RESAMPLED` ones by more than rounding."""
    if [row["step"] for row in found] != [row["step"] for row in wanted]:
        return ["steps"]
    wrong = []
    for ours, theirs in zip(found, wanted, strict=True):
        for key in sorted(ours.keys() | theirs.keys()):
            a, b = ours.get(key), theirs.get(key)
            rounding = key.startswith(RESAMPLED) and a is not None and b is not None and abs(a - b) < 1e-5
            if a != b and not rounding:
                wrong.append(f"step {ours['step']} {key}: {a} != {b}")
    return wrong


def export_hash(run: Path) -> str:
    """Return the digest of the exported weights, "" where there are none."""
    path = run / "export" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else ""


def segments(console: str) -> list[str]:
    """Return what each fault has caused on the console."""
    return re.split(r"^CHAOS \d+:.*$", console, flags=re.MULTILINE)[1:]
