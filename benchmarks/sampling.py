"""Busy share of engines and steps per hour with a group filter, in one run: rounds, streaming, steps that overlap.

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
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import ray

from rewards.api import Credit, Span
from rollout.engine import NextShare
from rollout.types import Prompt, Rollout, RolloutGroup, SamplingParams
from rollout.workers.pool import RolloutPool
from rollout.workers.worker import WorkerHandle
from rsgrpo.config.train import FilterConfig
from rsgrpo.running.batches import Collector, SampleToLearn, derive_seed
from rsgrpo.running.continuous import Continuous
from rsgrpo.types import ScoredGroup

GROUP_SIZE, KEPT, SPREAD = 8, 0.6, 0.6
TOKEN = Rollout([1], [0.0], "x", [(0, 1)], "stop", 0)


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
        return None if is_over else RolloutGroup(replace(prompt, images=()), (TOKEN,) * 2)

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


class InstantEngines:
    """`num_slots` slots in virtual time, without any delay of ours: a prompt is there for every slot that is free.

    seconds: that have passed. work_s: what the groups of a step took, by the ids of their prompts.
    """

    def __init__(self, num_slots: int, unit_s: float) -> None:
        self._num_slots, self._unit_s = num_slots, unit_s
        self.seconds = 0.0
        self.work_s: dict[str, float] = {}

    def sample(
        self, expected: Sequence[Prompt], next_share: NextShare
    ) -> Generator[ScoredGroup | RolloutGroup, None, None]:
        """Yield groups as they are done."""
        running: list[tuple[float, str]] = []
        while True:
            while len(running) < self._num_slots and (share := next_share()) is not None:
                [prompt], sampling = share
                self.work_s[prompt.id] = seconds_of(prompt.id, sampling.seed, self._unit_s)
                heapq.heappush(running, (self.seconds + self.work_s[prompt.id], prompt.id))
            if not running:
                return
            self.seconds, prompt_id = heapq.heappop(running)
            yield score(RolloutGroup(Prompt(prompt_id, "?"), (TOKEN,) * 2), 0)


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


def collector_of(sample: SampleToLearn, stream: Stream, oversample: float) -> Collector:
    """Return the collector of a run, on these engines."""
    return Collector(
        sample,
        stream.next,
        lambda prompts: [[prompt] for prompt in prompts],
        SamplingParams(group_size=GROUP_SIZE),
        FilterConfig(enabled=True, low=0.01, high=0.99, oversample=oversample),
    )


def sample_on(pool: RolloutPool) -> SampleToLearn:
    """Return what samples and scores shares on these engines."""

    def sample(expected: Sequence[Prompt], next_share: NextShare) -> Generator[ScoredGroup | RolloutGroup, None, None]:
        with closing(pool.stream(next_share)) as groups:  # type: ignore[type-var]
            for group in groups:
                if group is not None:
                    yield score(group, 0)

    return sample


def in_flight(collector: Collector, num_groups: int, num_steps: int) -> None:
    """Collect steps as `rsgrpo.train` does with max_staleness=1 and weights that change in flight; learning is free."""
    batches = Continuous(collector, num_groups)
    for step in range(1, num_steps + 1):
        batches.take(step)
        batches.start(min(step + 1, num_steps))
        # Here the learner would take its step and send the weights.
        batches.start(min(step + 2, num_steps))


def least_seconds(num_slots: int, options: argparse.Namespace) -> tuple[float, float]:
    """Return the seconds of a step on instant engines, with a step's groups in order; and those of their work alone."""
    engines, stream = InstantEngines(num_slots, options.unit), Stream()
    collector = collector_of(engines.sample, stream, options.oversample)
    work_s = 0.0
    for step in range(1, options.steps + 1):
        collector.collect(options.prompts, step)
        used = stream.taken - len(collector.returned)
        work_s += sum(engines.work_s.pop(str(number)) for number in range(used) if str(number) in engines.work_s)
    return engines.seconds / options.steps, work_s / num_slots / options.steps


def measure(options: argparse.Namespace, actors: Sequence[Any]) -> Iterator[tuple[str, float]]:
    """Yield the name of each way to sample once its steps are done."""
    everything = 10**9
    shared = RolloutPool([WorkerHandle(index, actor, everything) for index, actor in enumerate(actors)])
    room = (options.slots + 1) * GROUP_SIZE
    single = RolloutPool([WorkerHandle(i, actor, GROUP_SIZE, max_sequences=room) for i, actor in enumerate(actors)])
    started, stream, surplus = time.monotonic(), Stream(), 0
    for step in range(1, options.steps + 1):
        surplus = rounds(shared, stream, options.prompts, step, surplus)
    yield "rounds", time.monotonic() - started
    started, collector = time.monotonic(), collector_of(sample_on(single), Stream(), options.oversample)
    for step in range(1, options.steps + 1):
        collector.collect(options.prompts, step)
    yield "streaming", time.monotonic() - started
    started, collector = time.monotonic(), collector_of(sample_on(single), Stream(), options.oversample)
    in_flight(collector, options.prompts, options.steps)
    yield "in flight, max_staleness=1", time.monotonic() - started


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
    print(f"{options.engines} engines of {options.slots} groups, {options.prompts} groups a step, 60% kept\n")
    print("| sampling | s per step | steps per hour | ratio | busy |\n|---|---|---|---|---|")
    first_s = 0.0
    for name, seconds in measure(options, actors):
        busy = sum(ray.get([actor.busy_s.remote() for actor in actors])) / (seconds * num_slots)
        per_step = seconds / options.steps
        first_s = first_s or per_step
        ratio = first_s / per_step
        print(f"| {name} | {per_step:.2f} | {3600 / per_step:,.0f} | {ratio:.2f} | {busy:.0%} |", flush=True)
    ray.shutdown()
    for name, seconds in zip(("least, streaming", "least, in flight"), least_seconds(num_slots, options), strict=True):
        print(f"| {name} | {seconds:.2f} | {3600 / seconds:,.0f} | {first_s / seconds:.2f} | |")


if __name__ == "__main__":
    main()
