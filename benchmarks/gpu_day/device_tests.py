"""Everything that is marked gpu, as `make test-gpu` runs it; each test's outcome becomes a row."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.gpu_day.day import Day

ROOT = Path(__file__).parents[2]


def run(day: Day) -> None:
    """Run the tests.

    Raises:
        AssertionError: some failed; their last lines are in the notes.
    """
    day.work.mkdir(parents=True, exist_ok=True)
    report = (day.work / "device_tests.xml").resolve()
    # A warning of another version of torch or transformers is not a failure of the device.
    options = ["-p", "no:cacheprovider", "-W", "default", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", *options]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    assert report.exists(), f"pytest ended with code {code} and wrote no report"
    table = day.record.table("Tests marked gpu", ["test", "outcome", "seconds"])
    failed = []
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        outcome = "passed"
        for kind in ("failure", "error", "skipped"):
            found = case.find(kind)
            if found is not None:
                outcome = (
                    f"{kind}: {(found.get('message') or '').splitlines()[0][:100]}" if found.get("message") else kind
                )
        if outcome.startswith(("failure", "error")):
            failed.append(name)
        day.record.row(table, name, outcome, float(case.get("time", 0)))
    day.record.figure("tests", len(table.rows))
    day.record.figure("failed", len(failed))
    assert not failed, f"{len(failed)} tests failed: {', '.join(failed)}"
