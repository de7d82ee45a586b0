"""Run the matrix of faults: `python -m tests.runs.chaos [--folder FOLDER] [--only engine] [--table]`; it resumes."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from pathlib import Path
from typing import get_args

from tests.material import ROOT
from tests.runs.chaos.injector import Kind, Role
from tests.runs.chaos.matrix import load, rows, run_row, store, table

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"


def write_table(text: str) -> None:
    """Put the table into its page."""
    page = PAGE.read_text()
    found = re.sub(f"(?<={BEGIN}\n).*(?={END})", lambda _: f"\n{text}\n\n", page, flags=re.DOTALL)
    PAGE.write_text(found)


def main() -> int:
    """Run the command line."""
    top = argparse.ArgumentParser(prog="python -m tests.runs.chaos", description=__doc__)
    top.add_argument("--folder", type=Path, default=Path("outputs/chaos"), help="where runs and results are kept")
    top.add_argument("--only", nargs="*", choices=get_args(Role), help="victims; default: all")
    top.add_argument("--kind", nargs="*", choices=get_args(Kind), help="signals; default: both")
    top.add_argument("--seconds", type=float, default=float("inf"), help="begin no further run after this time")
    top.add_argument("--table", action="store_true", help=f"write the table into {PAGE.relative_to(ROOT)}")
    options = top.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # what has been started is ended on the way out
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.json"
    begin = time.monotonic()
    while time.monotonic() - begin < options.seconds:
        row = next(rows(load(results), options.only or get_args(Role), options.kind or get_args(Kind)), None)
        if row is None:
            break
        cells = run_row(row, folder)
        store(results, [*load(results), *cells])
        for cell in cells:
            print(cell.role, cell.kind, cell.phase, f"{cell.seconds:.0f} s", cell.outcome, *cell.wrong, sep="; ")
        sys.stdout.flush()
    done = load(results)
    print(table(done))
    if options.table:
        write_table(table(done))
    return int(any(cell.wrong for cell in done))


if __name__ == "__main__":
    sys.exit(main())
