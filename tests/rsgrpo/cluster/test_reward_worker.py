"""The process that runs reward functions: calls that arrive while others wait are scored beside them."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import pytest

from rewards.api import Response, reward
from rollout.types import Prompt, Rollout, RolloutGroup
from rsgrpo.cluster.workers import RewardWorker
from rsgrpo.config.train import TrainConfig
from rsgrpo.records.run_log import stop_logging

BEGUN: list[str] = []
BOTH: dict[str, asyncio.Event] = {}


@reward
async def waits_for_another(response: Response) -> float:
    """End only when the responses of two calls are being judged."""
    BEGUN.append(response.text)
    if len(BEGUN) == 2:
        BOTH["begun"].set()
    await asyncio.wait_for(BOTH["begun"].wait(), timeout=20)
    return float(response.text)


@pytest.fixture(autouse=True)
def no_log_is_left_behind():
    """A reward worker logs to the run's folder as long as its process lives; this one goes on."""
    before = list(logging.getLogger().handlers)
    yield
    for handler in set(logging.getLogger().handlers) - set(before):
        stop_logging(handler)


def test_calls_are_scored_side_by_side_by_the_configured_rewards(tmp_path):
    worker: Any = RewardWorker()

    async def two_calls() -> list:
        BOTH["begun"] = asyncio.Event()
        rewards = {"judge": f"{__name__}:waits_for_another"}
        worker.build(TrainConfig(rewards=rewards, output_dir=str(tmp_path)), os.getcwd(), [])
        groups = [
            RolloutGroup(Prompt(text, "?"), (Rollout([1], [0.0], text, [(0, 1)], "stop", 0),)) for text in ("3", "4")
        ]
        return await asyncio.gather(*(worker.score([group]) for group in groups))

    scored = asyncio.run(two_calls())
    assert [[one.scores_GK for one in groups] for groups in scored] == [[[[3.0]]], [[[4.0]]]]
    assert asyncio.iscoroutinefunction(RewardWorker.score), "Ray runs the calls of an async method on one loop"
