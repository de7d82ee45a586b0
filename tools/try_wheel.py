"""Build the wheel, install it into an empty environment, and run the programs in an empty folder: `make wheel-check`.

What a user gets who installs the package without a clone: no docs, no tests, no tools. Everything is made in a
temporary folder, which is removed at the end (`--keep FOLDER` uses that one and leaves it). pip's settings apply.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
SHIM = ROOT / "tools" / "torchvision_cpu_shim.py"

COMMANDS = (
    "rsgrpo.train --help",
    "rsgrpo.train recipe=evisrag_7b --cfg job",
    "rsgrpo.doctor",
    "recipes.prepare demo --sft-items 8 --train-items 8 --val-items 2 --vision-steps 2",
    "rsgrpo.train recipe=demo rollout=fake model.path=demo/model total_steps=2 algorithm.prompts_per_step=2 "
    "algorithm.filter.enabled=false guards.rules={}",
    "rsgrpo.report runs/demo",
    "rewards rewards.evisrag:evidence runs/demo --limit 2 --summary",
)
"""Modules and arguments; each must exit with 0."""

EXPECTED = ("runs/demo/report.html", "runs/demo/metrics.jsonl", "runs/demo/export/config.json")


def run(command: list[str], folder: Path) -> str:
    """Run a command in `folder`, outside this repository, and return what it printed.

    Raises:
        SystemExit: it failed; shows its output.
    """
    hidden = {"PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode:
        sys.exit(f"{output}\nexit code {done.returncode}: {' '.join(command)}")
    print(f"{time.monotonic() - start:6.1f} s  {' '.join(Path(word).name for word in command)}", flush=True)
    return output


def build_wheel(folder: Path) -> Path:
    """Return the wheel of this working tree, built from a copy so that nothing of an earlier build gets into it."""
    source = folder / "source"
    names = ("rsgrpo", "recipes", "rewards", "rollout", "conf")
    for name in names:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*build, "--wheel-dir", str(folder), str(source)], folder)
    (wheel,) = folder.glob("rsgrpo-*.whl")
    return wheel


def make_environment(folder: Path, wheel: Path) -> str:
    """Return the python of a new environment with the wheel, and nothing else, installed."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS)]
    run([*install, "torch"], folder)  # first and alone: where pip finds a CPU build, the rest resolves against it
    run([*install, f"{wheel}[demo]"], folder)
    run([python, str(SHIM)], folder)
    return python


def check(folder: Path) -> None:
    """Build, install and run in `folder`."""
    python = make_environment(folder / "environment", build_wheel(folder))
    empty = folder / "empty"
    empty.mkdir()
    where = run([python, "-c", "import rsgrpo; print(rsgrpo.__file__)"], empty)
    if "site-packages" not in where:
        sys.exit(f"rsgrpo was imported from {where.strip()}, not from the wheel")
    for command in COMMANDS:
        run([python, "-m", *command.split()], empty)
    if missing := [name for name in EXPECTED if not (empty / name).is_file()]:
        sys.exit(f"the run did not write {', '.join(missing)}")
    print("The wheel works in an empty environment.")


def main() -> None:
    """Check in a temporary folder, or in the one that was named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder to work in and to leave as it is")
    kept = parser.parse_args().keep
    if kept:
        kept.mkdir(parents=True)
        check(kept.resolve())
        return
    with tempfile.TemporaryDirectory(prefix="rsgrpo-wheel-") as folder:
        check(Path(folder))


if __name__ == "__main__":
    main()
