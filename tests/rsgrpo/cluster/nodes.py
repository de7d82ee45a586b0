"""Ray nodes and whole runs in processes of their own, on a machine that may be busy."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from rsgrpo.cluster.connect import STARTS, patient
from rsgrpo.records.tracking import read_metrics
from tests.material import ROOT

NODE_WAIT_S = 600.0
"""How long a Ray node may take to start on a busy machine."""
QUIET_RAY = {
    "RAY_worker_niceness": "0",  # Ray's 15 leaves workers next to nothing beside other tests
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}
"""Settings of nodes in tests."""


class RayNodes(Cluster):
    """Ray nodes on this machine, which may be busy: a node that Ray gives too little time to start is started again."""

    def __init__(self, **head: Any) -> None:
        os.environ.update(QUIET_RAY)
        super().__init__(initialize_head=True, head_node_args={**head, "include_dashboard": False})

    def add_node(self, wait: bool = True, **node: Any) -> Any:
        """Start a node with these resources and wait until the head knows it."""
        for tries_left in reversed(range(STARTS)):
            try:
                with patient(NODE_WAIT_S):
                    started = super().add_node(wait=False, **node)
                break
            except Exception as error:  # Ray has no class of its own for this
                if not tries_left or "timed out" not in str(error).lower():
                    raise
        self._wait_for_node(started, timeout=NODE_WAIT_S)
        return started


@contextmanager
def program(command: list[str], folder: Path, address: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Start a program in a folder, beside which `console.log` has its output; it is killed at the end if it still runs.

    address: of the Ray cluster to join.
    """
    joined = {"RAY_ADDRESS": address} if address else {}
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", **joined}
    with (
        open(folder / "console.log", "a") as output,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT) as run,
    ):
        try:
            yield run
        finally:
            if run.poll() is None:
                run.kill()


def wait_for_row(
    run_folder: Path, run: subprocess.Popen[bytes], holds: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Return the newest line of a run's metrics once it fulfils a condition; fail if the run ends before."""
    while run.poll() is None:
        rows = read_metrics(run_folder) if (run_folder / "metrics.jsonl").exists() else []
        if rows and holds(rows[-1]):
            return rows[-1]
        time.sleep(0.2)
    raise AssertionError(
        f"the run did not get there; it wrote {(run_folder.parent.parent / 'console.log').read_text()}"
    )
