"""What a step is given and what it leaves: its device and scratch folder, its figures and tables.

A record is on disk after every entry, so that a step that is cut off leaves what it had measured.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rollout.files import write_text

if TYPE_CHECKING:
    import torch

Status = Literal["unfinished", "done", "failed", "skipped"]
Cell = str | float | None


@dataclass
class Table:
    """A table of a step's page: numbers stay numbers until it is rendered; None is an empty cell."""

    title: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)


@dataclass
class Record:
    """What one step leaves, as `<step>.json`.

    reason: why it was skipped or failed. machine: device and versions. figures: name -> number.
    """

    path: Path
    step: str
    status: Status = "unfinished"
    reason: str = ""
    rehearsal: bool = False
    seconds: float = 0.0
    machine: dict[str, str] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """Return what a step left, or None."""
        return cls.of(json.loads(path.read_text(encoding="utf-8")), path) if path.exists() else None

    @classmethod
    def of(cls, values: dict[str, Any], path: Path) -> Record:
        """Return the record with the content of its file."""
        tables = [Table(**table) for table in values["tables"]]
        return cls(**(values | {"path": path, "tables": tables}))

    def values(self) -> dict[str, Any]:
        """Return the content of its file."""
        values = asdict(self)
        del values["path"], values["_started"]
        return values

    def figure(self, name: str, value: float) -> float:
        """Keep and print one number; return it."""
        self.figures[name] = value
        print(f"  {name} = {shown(value)}", flush=True)
        self.write()
        return value

    def table(self, title: str, columns: Sequence[str]) -> Table:
        """Begin a table."""
        table = Table(title, list(columns))
        self.tables.append(table)
        print(f"  | {' | '.join(columns)} |", flush=True)
        return table

    def row(self, table: Table, *cells: Cell) -> None:
        """Add a row to a table."""
        assert len(cells) == len(table.columns), (table.columns, cells)
        table.rows.append(list(cells))
        print(f"  | {' | '.join(map(shown, cells))} |", flush=True)
        self.write()

    def note(self, text: str) -> None:
        """Keep and print a sentence."""
        self.notes.append(text)
        print(f"  {text}", flush=True)
        self.write()

    def end(self, status: Status, reason: str = "") -> None:
        """Write the record for the last time."""
        self.status, self.reason = status, reason
        self.write()

    def write(self) -> None:
        """Write the record."""
        self.seconds = round(time.monotonic() - self._started, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.values(), indent=1))


def shown(cell: Cell) -> str:
    """Return a number with about three significant digits, thousands with commas."""
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell
    if not math.isfinite(cell):
        return str(cell)
    if cell == int(cell) or abs(cell) >= 100:
        return f"{cell:,.0f}"
    return f"{cell:.3g}"


@dataclass(frozen=True)
class Day:
    """Where a step runs.

    rehearse: tiny shapes, on the CPU unless `device_name` says otherwise. work: a folder for models and runs, which
    later steps may use again.
    """

    record: Record
    work: Path
    rehearse: bool
    device_name: str

    @cached_property
    def device(self) -> torch.device:
        """The device of every step."""
        import torch

        return torch.device(self.device_name)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device_name == "cuda"

    def pick(self, real: Any, rehearsed: Any) -> Any:
        """Return a size: `real` on the day, `rehearsed` before it."""
        return rehearsed if self.rehearse else real

    def dtype(self) -> torch.dtype:
        """Return bfloat16 on a GPU and float32 on a CPU, where most rehearsals would wait for bfloat16."""
        import torch

        return torch.bfloat16 if self.on_gpu else torch.float32


@dataclass(frozen=True)
class Step:
    """One thing to measure.

    work: the function that measures, as "module:function" of this package. minutes: expected on one H200, start of
    Python included. packages: import names without which it is skipped.
    """

    name: str
    work: str
    minutes: float
    about: str
    packages: tuple[str, ...] = ()

    def load(self) -> Callable[[Day], None]:
        """Import the function."""
        import importlib

        module, _, name = self.work.partition(":")
        function: Callable[[Day], None] = getattr(importlib.import_module(f"{__package__}.{module}"), name)
        return function


def machine(device_name: str) -> dict[str, str]:
    """Return the device and the versions that a figure depends on."""
    import importlib.metadata

    import torch

    found = {"python": platform.python_version(), "platform": platform.machine()}
    if device_name == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": f"{torch.cuda.device_count()} x {properties.name}",
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "cuda": str(torch.version.cuda),
        }
    else:
        found["device"] = f"{torch.get_num_threads()} CPU thread(s)"
    for package in ("torch", "transformers", "peft", "flash-attn", "vllm", "ray"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Skipped(Exception):
    """What a step needs is not there; the text says what."""
