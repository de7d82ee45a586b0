"""A long run in which something is killed or stopped at random again and again: `python -m tests.runs.chaos.soak`.

It must end with the metrics and the export of an undisturbed run. Seeds are printed; a soak that was cut off resumes.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from rsgrpo.records.tracking import read_metrics
from tests.material import ROOT
from tests.runs.chaos.injector import TITLES, write_plan
from tests.runs.chaos.matrix import undisturbed
from tests.runs.chaos.runs import (
    command_of,
    config_of,
    differences,
    export_hash,
    make_material,
    metrics_of,
    processes_with,
    wait_for_orphans,
)

MOVES_S = 5.0
"""Mean seconds of steps after a recovery."""

VICTIMS = {"learner": "ray::LearnerWorker", **TITLES, "gcs": "gcs_server", "driver": ""}


def num_steps(run: Path) -> int:
    """Return how many steps a run has recorded."""
    return len([row for row in read_metrics(run) if "actor/loss" in row]) if (run / "metrics.jsonl").exists() else 0


def strike(role: str, kind: signal.Signals, driver: psutil.Process, mark: str) -> bool:
    """Send a signal to the process of a role; return whether there is one."""
    title = VICTIMS[role]
    found = [process for process in processes_with(mark) if title and " ".join(process.cmdline()).find(title) >= 0]
    if role == "driver":
        found = [driver]
    if not found:
        return False
    found[0].send_signal(kind)
    return True


def soak(folder: Path, steps: int, every_s: float, seed: int) -> int:
    """Run it; return the number of signals."""
    material, place = make_material(folder / "material"), folder / f"soak_{steps}_{seed}"
    place.mkdir(parents=True, exist_ok=True)
    diary = place / "signals.txt"
    struck = diary.read_text().splitlines() if diary.exists() else []  # by an earlier part of this soak
    draw = random.Random(f"{seed} {len(struck)}")
    write_plan(place, [])
    run = place / "runs" / "run"
    command = command_of(config_of(material, place / "runs", steps=steps), place)
    variables = {**os.environ, "RSGRPO_CHAOS": str(place), "PYTHONPATH": f"{material}{os.pathsep}{ROOT}"}
    verdict = place / "equal.txt"
    if verdict.exists():
        print(f"{place} is a soak that has ended; nothing was tried. --fresh repeats it")
        return 0
    while not export_hash(run):
        with open(place / "console.log", "a") as output:
            process = subprocess.Popen(command, cwd=place, env=variables, stdout=output, stderr=subprocess.STDOUT)
        try:
            next_at, done, moves = time.monotonic() + draw.uniform(0.5, 1.5) * every_s, num_steps(run), False
            while process.poll() is None:
                time.sleep(0.2)
                done = min(done, num_steps(run))  # a resume takes back what was not in a checkpoint yet
                if not moves and num_steps(run) > done:
                    # Recovered. Without a few seconds of steps a slow machine would never get anywhere.
                    next_at, moves = max(next_at, time.monotonic() + draw.uniform(0.5, 1.5) * MOVES_S), True
                if time.monotonic() < next_at or not moves:
                    continue
                role, kind = draw.choice(list(VICTIMS)), draw.choice((signal.SIGKILL, signal.SIGSTOP))
                kind = signal.SIGKILL if role == "driver" else kind  # nobody would continue it
                if strike(role, kind, psutil.Process(process.pid), str(place)):
                    struck.append(f"{kind.name} {role}")
                    with diary.open("a") as file:
                        file.write(f"{struck[-1]}\n")
                    print(f"step {num_steps(run)}: {kind.name} to {role}", flush=True)
                next_at, done, moves = time.monotonic() + draw.uniform(0.5, 1.5) * every_s, num_steps(run), False
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    seconds, left = wait_for_orphans(str(place))
    wanted = undisturbed("engine", steps, folder)
    different = differences(metrics_of(run), metrics_of(wanted))
    print(f"seed {seed}: {len(struck)} signals ({dict(Counter(struck))}), {seconds:g} s to the last end")
    assert struck, "nothing was struck: the run was over too soon"
    assert left == [], left
    assert different == [], different[:5]
    assert export_hash(run) == export_hash(wanted)
    verdict.write_text(f"equal to the undisturbed run: {steps} steps, export {export_hash(run)}\n")
    print(verdict.read_text(), end="")
    return len(struck)


def main() -> int:
    """Run the command line."""
    top = argparse.ArgumentParser(prog="python -m tests.runs.chaos.soak", description=__doc__)
    top.add_argument("--folder", type=Path, default=Path("outputs/chaos"), help="where runs are kept")
    top.add_argument("--steps", type=int, default=200)
    top.add_argument("--every-s", type=float, default=20.0, help="mean seconds between two signals")
    top.add_argument("--seed", type=int, default=0)
    top.add_argument("--fresh", action="store_true", help="forget an earlier soak of these settings")
    options = top.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    if options.fresh:
        shutil.rmtree(options.folder.resolve() / f"soak_{options.steps}_{options.seed}", ignore_errors=True)
    return int(soak(options.folder.resolve(), options.steps, options.every_s, options.seed) == 0)


if __name__ == "__main__":
    sys.exit(main())
