"""Nothing of a step is left on another device than the policy's: seen on a device whose tensors refuse to mix."""

from __future__ import annotations

import json
import subprocess
import sys


def test_a_whole_step_stays_on_the_device_and_a_forgotten_tensor_is_refused():
    command = [sys.executable, "-m", "tests.rsgrpo.learning.on_fake_gpu"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    *steps, refused = (json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{"))
    assert len(steps) == 3
    for step in steps:
        name = step.pop("algorithm")
        assert {part: devices for part, devices in step.items() if devices != ["fakegpu:0"]} == {}, name
    assert refused == {"forgotten on the CPU": "FakeTensorDeviceMismatchError"}
