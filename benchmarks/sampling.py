"""Busy share of engines and steps per hour with a group filter: rounds with a barrier, beside streaming; in one run.

Scripted engines in Ray actors sleep instead of decoding: a group takes as long as the longest of 8 responses of
log-normal length, an engine samples `--slots` groups at once, and the filter keeps 60% of the groups.

    python -m benchmarks.sampling [--engines 4] [--slots 4] [--prompts 32] [--steps 8] [--unit 0.5]
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import math
import random
import time
from collections.abc import AsyncIterator, Generator, Sequence
from dataclasses import replace
from typing import Any

import ray

from rewards.api import Credit, Span
from rollout.engine import NextShare
from rollout.types import Prompt, Rollout, RolloutGroup, SamplingParams
from rollout.workers.pool import RolloutPool
from rollout.workers.worker import WorkerHandle
from rsgrpo.config.train import FilterConfig
from rsgrpo.running.batches import Collector, derive_seed
from rsgrpo.types import ScoredGroup

GROUP_SIZE, KEPT, SPREAD = 8, 0.6, 0.6


def seconds_of(prompt_id: str, seed: int, unit_s: float) -> float:
    """Return how long a group takes: about three units times the longest response's share, 1 unit on average."""
    rng = random.Random(f"{seed}/{prompt_id}")
    return unit_s * max(math.exp(rng.gauss(0, SPREAD)) for _ in range(GROUP_SIZE)) / 2.4


class SleepingEngine:
    """An engine that samples `slots` groups at once, by sleeping; the methods are those of `rollout.workers.worker`."""

    def __init__(self, slots: int, unit_s: float) -> None:
        self._room, self._unit_s = asyncio.Semaphore(slots), unit_s
        self._abandoned, self._busy_s = -1, 0.0
        self._told = asyncio.Condition()

    async def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams, ticket: int) -> AsyncIterator[Any]:
        """Yield groups of one token as they are done."""
        tasks = [asyncio.create_task(self._sample(prompt, sampling.seed, ticket)) for prompt in prompts]
        for task in asyncio.as_completed(tasks):
            group = await task
            if group is not None:
                yield group

    async def _sample(self, prompt: Prompt, seed: int, ticket: int) -> RolloutGroup | None:
        async with self._room:
            started = time.monotonic()
            is_over = False
            try:
                async with asyncio.timeout(seconds_of(prompt.id, seed, self._unit_s)), self._told:
                    await self._told.wait_for(lambda: ticket <= self._abandoned)
                is_over = True
            except TimeoutError:
                pass
            self._busy_s += time.monotonic() - started
        rollouts = (Rollout([1], [0.0], "x", [(0, 1)], "stop", 0),) * 2
        return None if is_over else RolloutGroup(replace(prompt, images=()), rollouts)

    async def abandon(self, ticket: int) -> None:
        """End the work of this ticket and of all smaller ones."""
        async with self._told:
            self._abandoned = ticket
            self._told.notify_all()

    async def busy_s(self) -> float:
        """Return the seconds that slots were in use since the last call."""
        busy_s, self._busy_s = self._busy_s, 0.0
        return busy_s


def score(group: RolloutGroup, seed: int) -> ScoredGroup:
    """Return the group with a spread of scores in 60% of the cases."""
    kept = random.Random(f"kept/{seed}/{group.prompt.id}").random() < KEPT
    scores = [1.0, 0.0] if kept else [1.0, 1.0]
    credits = [[(Credit("", score, Span(0, 1)),)] for score in scores]
    return ScoredGroup(group, ("accuracy",), [[score] for score in scores], credits, [[False], [False]])


def least_seconds(num_slots: int, num_groups: int, unit_s: float, *, by_arrival: bool, num_steps: int = 50) -> float:
    """Return the mean seconds of a step without any delay of ours: a prompt is always there for a slot that is free.

    A step has its groups once the first `num_groups` kept ones in the order of their prompts are done; `by_arrival`
    takes the first ones to arrive instead, which are the short ones.
    """
    total = 0.0
    for step in range(num_steps):
        free, kept = [0.0] * num_slots, []
        for number in range(4 * num_groups):
            end = heapq.heappop(free) + seconds_of(str(number), step, unit_s)
            heapq.heappush(free, end)
            if random.Random(f"kept/{step}/{number}").random() < KEPT:
                kept.append(end)
        total += max((sorted(kept) if by_arrival else kept)[:num_groups])
    return total / num_steps


class Stream:
    """Prompts without end."""

    def __init__(self) -> None:
        self.taken = 0

    def next(self, count: int) -> list[Prompt]:
        """Return the next prompts."""
        self.taken += count
        return [Prompt(str(number), "?") for number in range(self.taken - count, self.taken)]


def rounds(pool: RolloutPool, stream: Stream, num_groups: int, step: int, surplus: int) -> int:
    """Fill one step by rounds: equal shares for all engines, and the next round when all have ended; return surplus."""
    kept, tries = surplus, 0
    while kept < num_groups:
        prompts = stream.next(max(num_groups - kept, math.ceil(num_groups / 4)))
        seed = derive_seed(step, tries)
        groups = pool.generate(prompts, SamplingParams(group_size=GROUP_SIZE, seed=seed))
        kept += sum(score(group, 0).scores_GK != [[1.0], [1.0]] for group in groups)
        tries += 1
    return kept - num_groups


def streaming(pool: RolloutPool, stream: Stream, num_groups: int, oversample: float) -> Collector:
    """Return the collector of a run, on these engines."""

    def sample(expected: Sequence[Prompt], next_share: NextShare) -> Generator[ScoredGroup | RolloutGroup]:
        for group in pool.stream(next_share):
            if group is not None:
                yield score(group, 0)

    return Collector(
        sample,
        stream.next,
        lambda prompts: [[prompt] for prompt in prompts],
        SamplingParams(group_size=GROUP_SIZE),
        FilterConfig(enabled=True, low=0.01, high=0.99, oversample=oversample),
    )


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--slots", type=int, default=4, help="groups that an engine samples at once")
    parser.add_argument("--prompts", type=int, default=32, help="groups of a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--unit", type=float, default=0.5, help="seconds of an average group")
    parser.add_argument("--oversample", type=float, default=0.5, help="algorithm.filter.oversample")
    options = parser.parse_args()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    engine: Any = ray.remote(num_cpus=0)(SleepingEngine)
    actors = [engine.remote(options.slots, options.unit) for _ in range(options.engines)]
    ray.get([actor.busy_s.remote() for actor in actors])
    num_slots = options.engines * options.slots
    everything = 10**9
    shared = RolloutPool([WorkerHandle(index, actor, everything) for index, actor in enumerate(actors)])
    room = (options.slots + 1) * GROUP_SIZE
    single = RolloutPool([WorkerHandle(i, actor, GROUP_SIZE, max_sequences=room) for i, actor in enumerate(actors)])
    print(f"{options.engines} engines of {options.slots} groups, {options.prompts} groups a step, 60% kept\n")
    print("| sampling | s per step | steps per hour | ratio | busy |\n|---|---|---|---|---|")
    per_step: list[float] = []
    for name in ("rounds", "streaming"):
        stream, surplus = Stream(), 0
        collector = streaming(single, stream, options.prompts, options.oversample)
        started = time.monotonic()
        for step in range(options.steps):
            if name == "rounds":
                surplus = rounds(shared, stream, options.prompts, step, surplus)
            else:
                collector.collect(options.prompts, step)
        seconds = time.monotonic() - started
        busy = sum(ray.get([actor.busy_s.remote() for actor in actors])) / (seconds * num_slots)
        per_step.append(seconds / options.steps)
        rate, ratio = 3600 / per_step[-1], per_step[0] / per_step[-1]
        print(f"| {name} | {per_step[-1]:.2f} | {rate:,.0f} | {ratio:.2f} | {busy:.0%} |", flush=True)
    ray.shutdown()
    for name, by_arrival in (("least, in order", False), ("least, by arrival", True)):
        seconds = least_seconds(num_slots, options.prompts, options.unit, by_arrival=by_arrival)
        print(f"| {name} | {seconds:.2f} | {3600 / seconds:,.0f} | {per_step[0] / seconds:.2f} | |")


if __name__ == "__main__":
    main()
