"""The learning rate over steps, as a pure function."""

from __future__ import annotations

import math

from rsgrpo.errors import InputError

SCHEDULES = ("constant", "linear", "cosine")


def lr_factor(step: int, *, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """Return what the learning rate of step 0, 1, … is multiplied by: linear warm-up, then constant or decay to 0.

    >>> [lr_factor(step, schedule="linear", warmup_steps=2, total_steps=6) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if schedule not in SCHEDULES:
        raise InputError(f"learner.lr_schedule must be one of {SCHEDULES}, got {schedule!r}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
