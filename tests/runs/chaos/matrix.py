"""Every victim, stopped and killed, in every phase of a run: what the program does about it, and in which time."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from tests.runs.chaos.injector import RAYLET, Fault, Kind, Phase, Role, fail_at
from tests.runs.chaos.runs import (
    HEAD_CPUS,
    SECOND_CPUS,
    config_of,
    differences,
    export_hash,
    make_material,
    metrics_of,
    run_with,
    segments,
)

STEPS = 20
"""Of a run, in which its victim is hit in one phase after the other."""

AT_STEP: dict[Phase, int] = {
    "start-up": 1, "sampling": 2, "scoring": 3, "learning": 4, "sync": 5, "gate": 6, "checkpoint": 7, "validation": 8,
    "export": 9,
}  # fmt: skip
"""The first step in which a phase may be hit: one lies between two faults, in which whatever was lost is needed."""

MESSAGES: dict[str, str] = {
    "learner 0": r"learner 0 (died in|had not finished) ",
    "learner 1": r"learner 1 (died in|had not finished) ",
    "reference": r"reference 0 (died in|had not finished) ",
    "engine": r"rollout worker 0 (died in|had not finished) ",
    "reward": r"reward worker 0 (died in|had not finished) ",
    "raylet": r"rollout worker 1 died in |no node is left for worker 1",
    "gcs": r"The run ends here\.",
    "driver": r"a dead process says nothing",
}
SERVES = ("engine", "reward", "reference")
"""Victims that are replaced, or noticed, when they are next needed: never, after the last step.

A node may be lost while its engine is on its way back, which nobody notices, and it may take the engine along again
that was placed there before Ray counted the node as gone.
"""

HEALTH = {
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
RAYLET_S = 15.0
"""Time in which Ray, with these settings, counts a node as gone; then it is brought back."""


@dataclass(frozen=True)
class Cell:
    """One fault. wrong: what should not be so, nothing where the cell holds."""

    role: Role
    kind: Kind
    phase: Phase
    outcome: str
    seconds: float
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """Faults of one victim in one run, one after the other."""

    role: Role
    kind: Kind
    phases: tuple[Phase, ...]

    @property
    def name(self) -> str:
        """Name of its folder."""
        rest = "" if self.phases == get_args(Phase) else f"_{self.phases[0]}_{len(self.phases)}"
        return f"{self.role.replace(' ', '')}_{self.kind}{rest}"


def rows(
    done: Sequence[Cell], roles: Sequence[Role] = get_args(Role), kinds: Sequence[Kind] = get_args(Kind)
) -> Iterator[Row]:
    """Yield what is missing in the matrix."""
    have = {(cell.role, cell.kind, cell.phase) for cell in done}
    for role in roles:
        for kind in kinds:
            missing: tuple[Phase, ...] = tuple(phase for phase in get_args(Phase) if (role, kind, phase) not in have)
            if missing:
                yield Row(role, kind, missing)


def undisturbed(role: Role, steps: int, folder: Path) -> Path:
    """Make, once, the run that those with faults of `role` must equal; return its folder."""
    kind = role.replace(" ", "") if role in ("learner 1", "reference", "raylet") else "one"
    place = folder / f"undisturbed_{kind}_{steps}"
    run = place / "runs" / "run"
    if not export_hash(run):
        shutil.rmtree(place, ignore_errors=True)
        material = make_material(folder / "material")
        outcome = run_with([], place, config_of(material, place / "runs", steps=steps, role=role), material)
        assert outcome.codes == [0], outcome.console
    return run


def run_row(row: Row, folder: Path) -> list[Cell]:
    """Run one row, or the rest of it, and judge every fault."""
    material, wanted = make_material(folder / "material"), undisturbed(row.role, STEPS, folder)
    place = folder / row.name
    place.mkdir(parents=True, exist_ok=True)
    faults = [fail_at(row.role, AT_STEP[phase], phase, row.kind) for phase in row.phases]
    with second_node(place) if row.role == "raylet" else _nothing() as (address, on_fault):
        config = config_of(material, place / "runs", steps=STEPS, role=row.role, address=address)
        outcome = run_with(faults, place, config, material, on_fault=on_fault, max_starts=len(faults) + 2)
    run = place / "runs" / "run"
    told = segments(outcome.console)
    everywhere = [f"left {name} for {outcome.orphan_s:g} s" for name in outcome.orphans]
    if outcome.codes[-1] != 0:
        everywhere.append(f"exit codes {outcome.codes}")
    elif different := differences(metrics_of(run), metrics_of(wanted)):
        everywhere.append(f"{len(different)} metrics differ: {different[0]}")
    if export_hash(run) != export_hash(wanted):
        everywhere.append("export differs")
    cells = []
    for index, fault in enumerate(faults):
        if index >= len(told):
            cells.append(Cell(fault.role, fault.kind, fault.phase, "did not happen", 0.0, ("did not happen",)))
            continue
        if outcome.seconds[index] < 0:  # the tests were cut off meanwhile: another run will tell
            continue
        wrong = [*everywhere, *wrong_messages(fault, told[index])]
        cells.append(
            Cell(
                *(fault.role, fault.kind, fault.phase),
                "ended, resumed by the same command" if outcome.ended[index] else "went on by itself",
                outcome.seconds[index],
                tuple(wrong),
            )
        )
    return cells


def wrong_messages(fault: Fault, text: str) -> list[str]:
    """Return what is wrong with what the console says after a fault."""
    lines = [line for line in text.splitlines() if re.search(MESSAGES[fault.role], line)]
    least = 0 if fault.role in ("driver", "raylet") or (fault.phase == "export" and fault.role in SERVES) else 1
    most = {"driver": 0, "raylet": 2}.get(fault.role, 1)
    wrong = [] if least <= len(lines) <= most else [f"{len(lines)} messages"]
    return wrong + [f"console has {word}" for word in ("Traceback", "HANGS") if word in text]


@contextmanager
def _nothing() -> Iterator[tuple[str, Callable[[int], None]]]:
    yield "", lambda index: None


@contextmanager
def second_node(place: Path) -> Iterator[tuple[str, Callable[[int], None]]]:
    """Start a cluster of two nodes; give its address, and what brings the second one back after each fault."""
    from ray.cluster_utils import Cluster

    store: dict[str, Any] = {"object_store_memory": 150 << 20}
    before = os.environ.get("RSGRPO_CHAOS")
    os.environ["RSGRPO_CHAOS"] = str(place)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": HEAD_CPUS, "include_dashboard": False, "_system_config": HEALTH, **store},
    )
    nodes = []

    def join() -> None:
        nodes.append(cluster.add_node(num_cpus=SECOND_CPUS, **store))
        (place / RAYLET).write_text(str(nodes[-1].all_processes["raylet"][0].process.pid))

    def on_fault(index: int) -> None:
        time.sleep(RAYLET_S)
        cluster.remove_node(nodes[-1], allow_graceful=False)
        join()

    try:
        join()
        yield cluster.address, on_fault
    finally:
        cluster.shutdown()
        os.environ.pop("RSGRPO_CHAOS")
        if before is not None:
            os.environ["RSGRPO_CHAOS"] = before


def load(path: Path) -> list[Cell]:
    """Return the cells that have been run."""
    found = json.loads(path.read_text()) if path.exists() else []
    return [Cell(**{**cell, "wrong": tuple(cell["wrong"])}) for cell in found]


def store(path: Path, done: Sequence[Cell]) -> None:
    """Write the cells that have been run."""
    path.with_suffix(".new").write_text(json.dumps([asdict(cell) for cell in done], indent=1))
    path.with_suffix(".new").replace(path)


def table(done: Sequence[Cell]) -> str:
    """Return the matrix in Markdown: seconds of each cell, and what does not hold."""
    cells = {(cell.role, cell.kind, cell.phase): cell for cell in done}
    phases = get_args(Phase)
    lines = [f"| victim | signal | {' | '.join(phases)} |", "|---|---|" + "---|" * len(phases)]
    for role in get_args(Role):
        for kind in get_args(Kind):
            row = [_shown(cells.get((role, kind, phase))) for phase in phases]
            lines.append(f"| {role} | {kind[3:]} | {' | '.join(row)} |")
    return "\n".join(lines)


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    mark = "✗ " if cell.wrong else ""
    return f"{mark}{cell.seconds:.0f}{'' if cell.outcome.startswith('went') else ' E'}"
