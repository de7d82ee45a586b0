"""Nobody without the token of a run's own Ray can use it, and the token is in no file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rsgrpo.cluster.connect import GCS_WAIT, patient

VICTIM = """
import sys
from rsgrpo.cluster.connect import connect_ray
connect_ray("", num_cpus=1, object_store_bytes=100 << 20)
import ray
assert ray.get(ray.remote(num_cpus=0)(lambda: 42).remote(), timeout=60) == 42
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
INTRUDER = """
import sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="CRITICAL")
print("ran", ray.get(ray.remote(num_cpus=0)(lambda: 42).remote(), timeout=30))
"""


def test_a_process_without_the_token_runs_nothing_in_the_ray_of_a_run(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    own = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment}
    with subprocess.Popen([sys.executable, "-c", VICTIM], text=True, **own) as victim:  # type: ignore[call-overload]
        try:
            address = victim.stdout.readline().strip()
            assert address, victim.stderr.read()
            intruder = subprocess.run(
                [sys.executable, "-c", INTRUDER, address], env=environment, capture_output=True, text=True, timeout=120
            )
        finally:
            victim.stdin.close()
    assert intruder.returncode
    assert "ran" not in intruder.stdout
    assert not list(Path(tmp_path).glob(".ray/*"))


BUSY = """
import sys
import psutil
import ray
from ray._private import services
from rsgrpo.cluster.connect import connect_ray

real, failures = services.get_node, int(sys.argv[1])

def get_node(*arguments):
    global failures
    failures -= 1
    if failures >= 0:
        raise Exception("The current node timed out during startup.")
    return real(*arguments)

services.get_node = get_node
connect_ray("", num_cpus=1, object_store_bytes=100 << 20, startup_timeout_s=float(sys.argv[2]))
services.get_node = real
assert ray.get(ray.remote(num_cpus=0)(lambda: 42).remote(), timeout=60) == 42
print([process.name() for process in psutil.Process().children()].count("gcs_server"), "head")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failures", "limit_s", "says"), [(4, 600, "1 head"), (9, 0, "Ray failed to start (Exception: The current node")]
)
def test_a_ray_that_a_busy_machine_starts_too_slowly_is_started_again(failures, limit_s, says):
    command = [sys.executable, "-c", BUSY, str(failures), str(limit_s)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert says in done.stdout + done.stderr, done.stderr
    assert (done.returncode == 0) is (failures == 4)


def test_the_head_of_a_ray_may_take_as_long_as_a_run_may_take_to_start(monkeypatch):
    monkeypatch.delenv(GCS_WAIT, raising=False)
    with patient(1800.0):
        assert os.environ[GCS_WAIT] == "1800"
    assert GCS_WAIT not in os.environ
    with patient(0):  # to join one that is there, no wait
        assert GCS_WAIT not in os.environ
