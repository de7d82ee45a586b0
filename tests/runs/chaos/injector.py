"""Faults at named points of a run: `fail_at(role, step, phase)`. The points are wrapped from here, for tests alone."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import psutil

Role = Literal["driver", "learner 0", "learner 1", "engine", "reward", "reference", "raylet", "gcs"]
Phase = Literal[
    "start-up", "sampling", "scoring", "learning", "sync", "gate", "checkpoint", "validation", "export"
]  # fmt: skip
Kind = Literal["SIGKILL", "SIGSTOP"]

PLAN, EVENTS, RAYLET = "plan.json", "events.jsonl", "raylet.pid"
"""Files in the folder that RSGRPO_CHAOS names: the faults, what has happened, and the second node's raylet."""

HOLD_S = 90.0
"""The longest that a run waits in its phase for the end of Ray's head to be noticed."""

TITLES = {"engine": "ray::RolloutWorker", "reward": "ray::RewardWorker"}


@dataclass(frozen=True)
class Fault:
    """A signal to a process as soon as the run is in a phase at `step` or later."""

    role: Role
    step: int
    phase: Phase
    kind: Kind = "SIGKILL"


def fail_at(role: Role, step: int, phase: Phase, kind: Kind = "SIGKILL") -> Fault:
    """Describe a fault; `Injector` makes it happen, `write_plan` hands several to a program."""
    return Fault(role, step, phase, kind)


def write_plan(folder: Path, faults: Sequence[Fault]) -> None:
    """Write faults that happen one after the other, each once however often the program is started."""
    (folder / PLAN).write_text(json.dumps([asdict(fault) for fault in faults]))


def write_event(folder: Path, **event: int) -> None:
    """Append one event, with its time."""
    with open(folder / EVENTS, "a") as file:
        file.write(json.dumps({**event, "at": time.time()}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return what has happened: {kind: number, "at": seconds}.

    Kinds: "fault" n; "again" n, the run has passed the same point after it; "end", the program's exit code; "cut".
    """
    path = folder / EVENTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Injector:
    """Wraps the points of this process, the driver, and sends each fault's signal as its phase begins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults = [Fault(**fault) for fault in json.loads((folder / PLAN).read_text())]
        self.fired = sum("fault" in event for event in read_events(folder))
        self.again = sum("again" in event for event in read_events(folder))
        self.fired_before = self.fired
        self.cluster: Any = None
        self.training = False
        self.hit_at = 0  # step of the last fault, if it was in this process

    def install(self) -> None:
        """Wrap the points."""
        from rollout.workers.pool import RolloutPool
        from rsgrpo.cluster.ranks import RayLearner
        from rsgrpo.cluster.ray_cluster import RayCluster
        from rsgrpo.cluster.reward_pool import RewardPool

        def remember(cluster: Any) -> None:
            self.cluster = cluster

        def in_training(yes: bool) -> Callable[[Any], None]:
            return lambda _: setattr(self, "training", yes)

        def arrives(phase: Phase) -> Callable[[Any], None]:
            return lambda _: self.reached(phase)

        _before(RayCluster, "_start", remember)
        _before(RayCluster, "sample_to_learn", in_training(True))
        _before(RayCluster, "sample_and_score", in_training(False))
        points: list[tuple[type, str, Phase]] = [
            (RayCluster, "_build", "start-up"),
            (RewardPool, "submit", "scoring"),
            (RayLearner, "update", "learning"),
            (RayCluster, "_send_weights", "sync"),
            (RayCluster, "check_engines", "gate"),
            (RayLearner, "begin_save", "checkpoint"),
            (RayCluster, "sample_and_score", "validation"),
            (RayLearner, "export", "export"),
        ]
        for owner, method, phase in points:
            _before(owner, method, arrives(phase))
        _after(RolloutPool, "_start", lambda: self.reached("sampling"))  # the engine has its share

    def reached(self, phase: Phase) -> None:
        """The run is in `phase`: send the next fault's signal if it belongs here."""
        if phase in ("sampling", "scoring") and not self.training:
            return
        if self.again < self.fired and self._is_over(self.faults[self.again], phase):
            write_event(self.folder, again=self.again)
            self.again += 1
        if self.fired == len(self.faults) or self.again < self.fired:
            return
        fault = self.faults[self.fired]
        if fault.phase != phase or self._step() < fault.step:
            return
        self.fired += 1
        self.hit_at = self._step()
        process = self._victim(fault.role)
        print(f"CHAOS {self.fired - 1}: {fault.kind} to {fault.role} in {phase}", file=sys.stderr, flush=True)
        write_event(self.folder, fault=self.fired - 1)
        process.send_signal(signal.Signals[fault.kind])
        if fault.role == "gcs":  # such a short run would be at its end before it is noticed
            time.sleep(HOLD_S)

    def _is_over(self, fault: Fault, phase: Phase) -> bool:
        """Whether the run has come past `fault` where it is in `phase`; without Ray's head it goes on for a while."""
        if fault.role == "gcs" and self.fired > self.fired_before:
            return False
        if phase in ("sampling", "scoring") and self._step() == self.hit_at:  # they begin several times in a step
            return False
        return phase == fault.phase or (fault.phase == "start-up" and phase == "sync")

    def _step(self) -> int:
        learner = getattr(self.cluster, "learner", None)
        return learner.version + 1 if learner else 1

    def _victim(self, role: Role) -> psutil.Process:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            found = self._found(role)
            if found is not None:
                return found
            time.sleep(0.1)
        raise AssertionError(f"there is no process of {role}")

    def _found(self, role: Role) -> psutil.Process | None:
        import ray._private.state

        if role == "driver":
            return psutil.Process()
        if role == "raylet":
            pid = int((self.folder / RAYLET).read_text())
            return psutil.Process(pid) if psutil.pid_exists(pid) else None
        if role in ("learner 0", "learner 1", "reference"):
            ranks = self.cluster.reference if role == "reference" else self.cluster.learner
            actor = ranks.actors[int(role == "learner 1")]
            pid = ray._private.state.state.actor_table(actor._actor_id.hex()).get("Pid")
            return psutil.Process(pid) if pid else None
        processes = psutil.Process().children(recursive=True)
        if role == "gcs":
            return next((process for process in processes if process.name() == "gcs_server"), None)
        return next((process for process in processes if " ".join(process.cmdline()).startswith(TITLES[role])), None)


def _before(owner: type, method: str, do: Callable[[Any], None]) -> None:
    real = getattr(owner, method)

    @wraps(real)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        do(self)
        return real(self, *args, **kwargs)

    setattr(owner, method, wrapped)


def _after(owner: type, method: str, do: Callable[[], None]) -> None:
    real = getattr(owner, method)

    @wraps(real)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        do()
        return result

    setattr(owner, method, wrapped)
