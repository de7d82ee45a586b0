"""Measure on the day a GPU is there: `python -m benchmarks.gpu_day`, or `make gpu-day`.

Steps run from the most to the least valuable, each in a process of its own with a time limit. A finished step is
skipped when the command is run again. Results are one json file per step in the folder of --out; tables are in
docs/gpu/.

    python -m benchmarks.gpu_day --list                # the steps, with expected minutes
    python -m benchmarks.gpu_day --only learner_3b     # one step
    python -m benchmarks.gpu_day --minutes 13          # begin no step that would not fit
    python -m benchmarks.gpu_day --rehearse            # all of it with tiny shapes on the CPU, minutes
    python -m benchmarks.gpu_day --pack wheels         # what a bare machine lacks, as wheels
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_day.day import Day, Record, Skipped, Step, machine
from benchmarks.gpu_day.pack import pack
from benchmarks.gpu_day.steps import STEPS
from benchmarks.gpu_day.tables import page
from rollout.files import write_text

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "docs" / "gpu"
LIMIT_S = 600.0
"""No step may take longer; it leaves what it had measured by then."""


def main() -> int:
    args = arguments().parse_args()
    if args.pack:
        pack(args.pack, args.python)
        return 0
    if args.list:
        for step in STEPS:
            needs = f" (needs {', '.join(step.packages)})" if step.packages else ""
            print(f"{step.name:<16} {step.minutes:>4g} min  {step.about}{needs}")
        print(f"{'all':<16} {sum(step.minutes for step in STEPS):>4g} min")
        return 0
    chosen = choose(args.only)
    device = args.device or ("cpu" if args.rehearse else "cuda")
    out = args.out or Path("runs") / ("gpu_day_rehearsal" if args.rehearse else "gpu_day")
    if args.child:
        return work(chosen[0], out, args.rehearse, device)
    if device == "cuda" and not has_cuda():
        print("error: torch finds no CUDA device. Rehearse on the CPU with --rehearse.", file=sys.stderr)
        return 2
    failed = run_all(chosen, out, args)
    tables = out if args.rehearse else TABLES
    write_page(out, tables)
    print(f"Tables: {tables / 'results.md'}. Results: {out}.")
    return 1 if failed else 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the steps")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps, in the order of the list")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--again", action="store_true", help="also run steps that are finished or failed")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no step that would not fit")
    parser.add_argument("--out", type=Path, help="folder of results; default runs/gpu_day, or runs/gpu_day_rehearsal")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda, in rehearsals cpu")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="download the wheels that a bare machine lacks")
    parser.add_argument("--python", default="3.12", help="with --pack: Python of that machine (default 3.12)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def choose(names: Sequence[str] | None) -> list[Step]:
    """Return the steps of these names, or all."""
    known = [step.name for step in STEPS]
    for name in names or ():
        if name not in known:
            raise SystemExit(f"error: there is no step {name}. Choose among {', '.join(known)}.")
    return [step for step in STEPS if not names or step.name in names]


def run_all(steps: Sequence[Step], out: Path, args: argparse.Namespace) -> list[str]:
    """Run the steps that are not finished; return the names of those that failed."""
    failed = []
    started = time.monotonic()
    for step in steps:
        record = Record.read(out / f"{step.name}.json")
        # A failed step would fail again: --again, once its cause is fixed.
        if record is not None and record.status in ("done", "failed") and not args.again:
            print(f"{step.name}: {record.status} before; --again runs it again")
            failed += [step.name] * (record.status == "failed")
            continue
        left = args.minutes - (time.monotonic() - started) / 60
        if step.minutes > left:
            print(f"{step.name}: not begun, {step.minutes:g} min > {left:.1f} min left")
            continue
        print(f"\n== {step.name} (about {step.minutes:g} min): {step.about}", flush=True)
        record = run_child(step, out, args, limit_s=min(LIMIT_S, left * 60))
        print(f"== {step.name}: {record.status} after {record.seconds:.0f} s {record.reason}", flush=True)
        failed += [step.name] * (record.status == "failed")
        write_page(out, out)  # whatever happens to the next step
    return failed


def run_child(step: Step, out: Path, args: argparse.Namespace, limit_s: float) -> Record:
    """Run one step in a process of its own, so that it starts with an empty device; return what it left."""
    path = out / f"{step.name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--child", "--only", step.name, "--out", str(out)]
    command += ["--rehearse"] * args.rehearse + (["--device", args.device] if args.device else [])
    reason = ""
    try:
        code = subprocess.run(command, timeout=limit_s, check=False).returncode
        reason = f"its process ended with code {code}"
    except subprocess.TimeoutExpired:
        reason = f"it took longer than {limit_s:.0f} s"
    record = Record.read(path) or Record(path, step.name)
    if record.status == "unfinished":
        record.end("failed", reason)
    return record


def work(step: Step, out: Path, rehearse: bool, device: str) -> int:
    """Run one step in this process."""
    record = Record(out / f"{step.name}.json", step.name, rehearsal=rehearse, machine=machine(device))
    record.write()
    lacking = [name for name in step.packages if importlib.util.find_spec(name) is None]
    if lacking:
        record.end("skipped", f"{', '.join(lacking)} not installed")
        return 0
    try:
        step.load()(Day(record, out / "work", rehearse, device))
    except Skipped as reason:
        record.end("skipped", str(reason))
    except Exception as error:  # whatever it is, the next step must run
        traceback.print_exc()
        record.end("failed", f"{type(error).__name__}: {error}")
        return 1
    else:
        record.end("done")
    return 0


def write_page(out: Path, tables: Path) -> None:
    """Write results.md, and all results as one results.json beside it; steps of an earlier day there are kept."""
    tables.mkdir(parents=True, exist_ok=True)
    merged = tables / "results.json"
    earlier = json.loads(merged.read_text(encoding="utf-8")) if merged.exists() else {}
    records = []
    for step in STEPS:
        path = out / f"{step.name}.json"
        record = Record.read(path)
        if record is None and step.name in earlier:
            record = Record.of(earlier[step.name], path)
        records.append(record)
    write_text(tables / "results.md", page(STEPS, records))
    found = {record.step: record.values() for record in records if record is not None}
    write_text(merged, json.dumps(found, indent=1) + "\n")


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
