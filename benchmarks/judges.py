"""A slow async judge behind one reward worker: all groups at once, beside one group after the other; equal scores.

python -m benchmarks.judges [--groups 32] [--group 8] [--seconds 1]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from typing import Any

import ray

from rewards.api import Response, reward
from rollout.types import Prompt, Rollout, RolloutGroup
from rsgrpo.cluster.workers import RewardWorker
from rsgrpo.config.train import TrainConfig


@reward
async def judge(response: Response, *, seconds: float) -> float:
    """The share of even digits, after `seconds`: what a call to a judge model takes."""
    await asyncio.sleep(seconds)
    return sum(character in "02468" for character in response.text) / len(response.text)


def make_groups(num_groups: int, group_size: int) -> list[RolloutGroup]:
    """Return groups whose responses all differ."""
    texts = [[f"{1000 + group * group_size + sample}" for sample in range(group_size)] for group in range(num_groups)]
    return [
        RolloutGroup(
            Prompt(f"prompt{index}", "?"),
            tuple(Rollout([1], [0.0], text, [(0, len(text))], "stop", 0) for text in group),
        )
        for index, group in enumerate(texts)
    ]


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--group", type=int, default=8, help="responses per group")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one call of the judge")
    options = parser.parse_args()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    worker: Any = ray.remote(RewardWorker).remote()
    config = TrainConfig(
        rewards={"judge": "benchmarks.judges:judge"}, reward_args={"judge": {"seconds": options.seconds}}
    )
    ray.get(worker.build.remote(config, os.getcwd(), [os.getcwd()]))
    groups = make_groups(options.groups, options.group)
    started = time.perf_counter()
    one_by_one = [scored for group in groups for scored in ray.get(worker.score.remote([group]))]
    before_s = time.perf_counter() - started
    started = time.perf_counter()
    together = [scored for ref in [worker.score.remote([group]) for group in groups] for scored in ray.get(ref)]
    after_s = time.perf_counter() - started
    assert [one.scores_GK for one in one_by_one] == [one.scores_GK for one in together]
    ray.shutdown()
    print(f"{options.groups} groups of {options.group}, a judge of {options.seconds:g} s, one reward worker\n")
    print("| groups | seconds | ratio |\n|---|---|---|")
    print(f"| one after the other | {before_s:.1f} | 1.0 |")
    print(f"| all at once | {after_s:.1f} | {before_s / after_s:.1f} |")


if __name__ == "__main__":
    main()
