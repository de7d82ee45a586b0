"""Downloads what a bare machine with torch and transformers may lack, as small wheels that travel with the code.

All of them are pure Python or small; torch, transformers, numpy, pillow, pyarrow and scikit-learn must be there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

MAX_MIB = 60
WHEELS = (
    "hydra-core>=1.3.2,<1.4",
    "omegaconf>=2.3,<2.4",
    "rich>=13.7,<16",
    "markdown-it-py>=3",
    "mdurl",
    "pygments",
    "jinja2>=3.1,<4",
    "markupsafe",
    "psutil>=6",
    "pyyaml>=6",
    "packaging>=24",
    "pytest>=8.3,<10",
    "iniconfig",
    "pluggy",
)
SOURCES = ("antlr4-python3-runtime==4.9.3",)
"""Published without a wheel; pure Python, so that a wheel made here runs anywhere."""
PLATFORMS = tuple(f"manylinux{version}_x86_64" for version in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "1"))


def pack(folder: Path, python: str) -> None:
    """Fill `folder` with wheels for Linux x86-64 and that version of Python; print how to install them there."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    for platform in PLATFORMS:
        target += ["--platform", platform]
    subprocess.run([*pip, "download", "-q", "--no-deps", *target, "-d", str(folder), *WHEELS], check=True)
    with tempfile.TemporaryDirectory() as sources:
        subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", sources, *SOURCES], check=True)
        for wheel in Path(sources).glob("*.whl"):
            wheel.replace(folder / wheel.name)
    wheels = sorted(folder.glob("*.whl"))
    mib = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    assert mib < MAX_MIB, f"{mib:.1f} MiB of wheels in {folder}"
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1024:8.0f} KiB  {wheel.name}")
    print(f"{len(wheels)} wheels, {mib:.1f} MiB, for Python {python}. There, in the repository's root:")
    print(f"  python3 -m pip install -q --no-index --no-deps --target /tmp/site {folder}/*.whl")
    print("  export PYTHONPATH=$PWD:/tmp/site")
