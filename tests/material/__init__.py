"""Material that tests share; `ROOT` is the repository, `DATA` the reference numbers."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "data"
