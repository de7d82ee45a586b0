"""Collects the groups of one training step: sample, score, filter, and replace what is dropped at once.

What a step learns from is decided by the order of the prompts, never by the order in which their groups arrive.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from rollout.engine import NextShare, Share
from rollout.types import Prompt, RolloutGroup, SamplingParams
from rsgrpo.algorithm.scoring import group_mean, has_signal
from rsgrpo.config.train import FilterConfig
from rsgrpo.errors import RsgrpoError, SourceBroke
from rsgrpo.types import ScoredGroup

log = logging.getLogger(__name__)

SampleAndScore = Callable[[Sequence[Prompt], SamplingParams], Iterator[ScoredGroup | RolloutGroup]]
"""Yields a ScoredGroup per prompt in any order, or the RolloutGroup itself where it has an error."""

SampleToLearn = Callable[[Sequence[Prompt], NextShare], Generator[ScoredGroup | RolloutGroup]]
"""The same for every share that there is, until there is none; takes the prompts to expect, too."""

CutPrompts = Callable[[Sequence[Prompt]], Sequence[Sequence[Prompt]]]
"""Cuts prompts into shares, each of which one engine samples together; always in the same way."""


def derive_seed(seed: int, *parts: object) -> int:
    """Return a 63-bit seed that depends on the run's seed and on what it is for."""
    digest = hashlib.sha256(repr((seed, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass
class Collector:
    """Fills steps with groups worth training on.

    A step takes the first `num_groups` groups that pass the filter, in the order of their prompts. Which prompts were
    sampled beyond these is a matter of time: they are dropped, and their prompts begin the next step, whose weights are
    newer. So every group of a step is sampled with the weights of that step.

    sample: samples and scores shares of prompts.
    next_prompts: takes the given number of prompts from the training stream.
    cut: cuts prompts into shares.
    filter: which groups are kept.
    returned: prompts that the last step did not use; the next one begins with them. Part of a checkpoint.
    """

    sample: SampleToLearn
    next_prompts: Callable[[int], list[Prompt]]
    cut: CutPrompts
    sampling: SamplingParams
    filter: FilterConfig
    returned: list[Prompt] = field(default_factory=list)

    def collect(self, num_groups: int, step: int) -> tuple[list[ScoredGroup], dict[str, float]]:
        """Return `num_groups` groups for this step, and what was dropped on the way (`rollout/*`).

        Raises:
            SourceBroke: the stream has no more prompts.
            RsgrpoError: `filter.max_tries` times as many prompts did not fill the step; shows the histogram of scores.
        """
        filling = Filling(self, num_groups, step)
        filling.take(num_groups)
        with closing(self.sample(list(filling.prompts), filling.next_share)) as groups:
            for group in groups:
                filling.arrived(group)
                if filling.is_full:
                    break
        self.returned = filling.unused
        if not filling.is_full:
            raise filling.broke or RsgrpoError(filling.explain())
        return filling.kept, filling.metrics()

    def is_kept(self, group: ScoredGroup) -> bool:
        """Whether a group is worth training on."""
        if not self.filter.enabled:
            return True
        if self.filter.drop_without_signal and not has_signal(group):
            return False
        return self.filter.low < group_mean(group, self.filter.weights) < self.filter.high


class Filling:
    """One step while it is filled: its prompts in order, what became of them, and what is to be sampled next.

    prompts: taken so far. num_used: the first prompts, all of which have an outcome that counts. kept: groups of these.
    broke: why no more prompts can be taken.
    """

    def __init__(self, collector: Collector, num_groups: int, step: int) -> None:
        self._collector, self._num_groups = collector, num_groups
        self._seed = derive_seed(collector.sampling.seed, "train", step, 0)
        self._returned = deque(collector.returned)
        self.prompts: list[Prompt] = []
        self.num_used = 0
        self.kept: list[ScoredGroup] = []
        self.broke: SourceBroke | None = None
        self._seen: list[ScoredGroup] = []
        self._errors: Counter[str] = Counter()
        self._part, self._ids_of_part = 0, set[str]()
        self._planned: deque[tuple[Sequence[Prompt], int]] = deque()
        self._num_sent = 0
        self._in_flight: dict[str, int] = {}
        self._outcomes: dict[int, ScoredGroup | RolloutGroup] = {}  # of prompts behind one that is still in flight
        self._num_kept = 0

    @property
    def _num_wanted(self) -> int:
        """Groups to sample for."""
        return self._num_groups

    @property
    def unused(self) -> list[Prompt]:
        """Return the prompts, sampled or not, that the step has not used, in their order; all, where it is not full."""
        return self.prompts[self.num_used if self.is_full else 0 :] + list(self._returned)

    @property
    def is_full(self) -> bool:
        """Whether the step has all its groups."""
        return len(self.kept) == self._num_groups

    def next_share(self) -> Share | None:
        """Return the prompts to be sampled next; None while enough are in flight."""
        if not self._planned and self._num_missing() > 0 and self.broke is None:
            # Always as many: what is sampled together must not depend on what has arrived.
            num_prompts = math.ceil(self._num_groups / 4) if self._collector.filter.enabled else 1
            limit = self._num_wanted * self._collector.filter.max_tries
            try:
                self.take(min(num_prompts, limit - len(self.prompts)))
            except SourceBroke as error:
                self.broke = error
        if not self._planned or self._num_missing() <= 0:
            return None
        prompts, part = self._planned[0]
        if any(prompt.id in self._in_flight for prompt in prompts):  # a data set smaller than a step
            return None
        self._planned.popleft()
        for prompt in prompts:
            self._in_flight[prompt.id] = self._num_sent
            self._num_sent += 1
        return prompts, replace(self._collector.sampling, seed=derive_seed(self._seed, part))

    def arrived(self, group: ScoredGroup | RolloutGroup) -> None:
        """Take the group of a prompt in flight."""
        prompt = group.group.prompt if isinstance(group, ScoredGroup) else group.prompt
        self._outcomes[self._in_flight.pop(prompt.id)] = group
        self._num_kept += isinstance(group, ScoredGroup) and self._collector.is_kept(group)
        self._use()

    def _use(self) -> None:
        """Go on to the first prompt that is still in flight."""
        while not self.is_full and self.num_used in self._outcomes:
            outcome = self._outcomes.pop(self.num_used)
            self.num_used += 1
            if isinstance(outcome, RolloutGroup):
                log.warning("prompt %s could not be sampled: %s", outcome.prompt.id, outcome.error)
                self._errors[outcome.error or "no rollouts"] += 1
                continue
            self._seen.append(outcome)
            if self._collector.is_kept(outcome):
                self.kept.append(outcome)

    def metrics(self) -> dict[str, float]:
        """Return what the step took, without what was sampled beyond it and depends on time (`perf/`)."""
        return {
            "rollout/tries": float(math.ceil(self.num_used / self._num_groups)),
            "rollout/groups_sampled": float(len(self._seen)),
            "rollout/groups_filtered": float(len(self._seen) - len(self.kept)),
            "rollout/prompt_errors": float(sum(self._errors.values())),
            "perf/groups_abandoned": float(self._num_sent - self.num_used),
        }

    def explain(self) -> str:
        """Say why the step could not be filled."""
        filter, means = self._collector.filter, sorted(self._mean(group) for group in self._seen)
        lines = [
            f"after algorithm.filter.max_tries={filter.max_tries} times as many prompts only {len(self.kept)} of "
            f"{self._num_groups} groups passed the filter ({filter.low:g}, {filter.high:g}); {len(self._seen)} groups "
            "were sampled.",
            *_histogram(means),
        ]
        lines += [f"{count} prompts failed: {reason}" for reason, count in self._errors.most_common(3)]
        lines.append("Widen algorithm.filter.low/high, raise max_tries, or look at the rewards: they may be constant.")
        return "\n".join(lines)

    def _mean(self, group: ScoredGroup) -> float:
        return group_mean(group, self._collector.filter.weights)

    def _num_missing(self) -> int:
        """Return the prompts to be sampled beside those in flight: what the step lacks, and with a filter some more."""
        spare = math.ceil(self._collector.filter.oversample * self._num_groups) if self._collector.filter.enabled else 0
        return self._num_wanted - self._num_kept + spare - len(self._in_flight)

    def take(self, num_prompts: int) -> None:
        """Take prompts and plan their shares, so that none holds a prompt twice.

        A prompt that comes again (a data set smaller than a step wraps around) begins a part with another seed.
        """
        num_new = max(0, num_prompts - len(self._returned))
        new = self._collector.next_prompts(num_new) if num_new else []
        prompts = [self._returned.popleft() for _ in range(num_prompts - num_new)] + new
        self.prompts += prompts
        pieces: list[list[Prompt]] = [[]]
        parts = [self._part]
        for prompt in prompts:
            if prompt.id in self._ids_of_part:
                self._part, self._ids_of_part = self._part + 1, set()
                pieces.append([])
                parts.append(self._part)
            self._ids_of_part.add(prompt.id)
            pieces[-1].append(prompt)
        for piece, part in zip(pieces, parts, strict=True):
            self._planned += [(share, part) for share in self._collector.cut(piece) if share]


Batch = tuple[list[ScoredGroup], dict[str, float]]
"""The groups of a step and what `Collector.collect` tells about them."""

Before = tuple[list[Prompt], Any]
"""What a batch begins with: `Collector.returned` and the position of the stream."""


def resumed(state: Mapping[str, Any]) -> tuple[list[Prompt], dict[int, Batch]]:
    """Return `Collector.returned` and `Lookahead.ready` from a checkpoint's state, or from one of an older release.

    That one held groups of older weights as the surplus of a step: their prompts are sampled again.
    """
    returned = [*state.get("returned", ()), *(scored.group.prompt for scored in state.get("surplus", ()))]
    ready = state.get("ready") or {}
    return returned, dict(ready) if isinstance(ready, Mapping) else {ready[0]: ready[1]}


@dataclass
class Lookahead:
    """Collects the groups of a step when they are needed, or steps ahead, while something else runs.

    ready: by step, batches that were collected ahead of time and not yet taken; part of a checkpoint.
    position: where the stream of prompts is.
    """

    collector: Collector
    num_groups: int
    ready: dict[int, Batch] = field(default_factory=dict)
    position: Callable[[], Any] = lambda: None
    _running: list[tuple[int, Future[tuple[Batch, Before]]]] = field(default_factory=list)
    _before: Before | None = None  # the batch that is being collected
    _last: int = 0
    _broke: SourceBroke | None = None
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="sampling"))

    def take(self, step: int) -> Batch:
        """Return the batch of `step`: what `start` collected, else it is collected now.

        Raises:
            SourceBroke: as `Collector.collect`, now or while `start` collected.
        """
        self._last = max(self._last, step)
        while self._running and self._running[0][0] <= step and self._broke is None:
            self._settle_first()
        if step in self.ready:
            return self.ready.pop(step)
        if self._broke is not None:
            raise self._broke
        return self.collector.collect(self.num_groups, step)

    def start(self, last_step: int) -> None:
        """Begin to collect, in order, the batches up to that of `last_step`; `settle` or `take` must follow."""
        first = max([self._last, *self.ready]) + 1
        if not self._running:
            self._before = self._now()
        for step in range(first, last_step + 1):
            self._running.append((step, self._thread.submit(self._collect, step)))
        self._last = max(self._last, last_step)

    def settle(self) -> None:
        """Wait until what was started is there; raise what it raised.

        The end of the stream is raised by `take`, so that the steps that have a batch can be finished and saved first.
        """
        while self._running:
            self._settle_first()

    def boundary(self) -> dict[str, Any]:
        """Return what a checkpoint must hold now. A batch that is being collected is collected again by who resumes."""
        while self._running and self._running[0][1].done():
            self._settle_first()
        before = self._before if self._running and self._before is not None else self._now()
        return {"stream": before[1], "returned": before[0], "ready": dict(self.ready)}

    def _collect(self, step: int) -> tuple[Batch, Before]:
        return self.collector.collect(self.num_groups, step), self._now()

    def _now(self) -> Before:
        return list(self.collector.returned), self.position()

    def _settle_first(self) -> None:
        step, batch = self._running.pop(0)
        error = batch.exception()
        if isinstance(error, SourceBroke):
            self._broke, self._running = error, []
            return
        self.ready[step], self._before = batch.result()


def _histogram(values: Sequence[float], num_bins: int = 8, width: int = 40) -> list[str]:
    if not values:
        return []
    low, high = values[0], values[-1]
    step = (high - low) / num_bins or 1.0
    counts = Counter(min(int((value - low) / step), num_bins - 1) for value in values)
    peak = max(counts.values())
    return [
        f"  group mean {low + b * step:7.2f} … {low + (b + 1) * step:7.2f}  {counts[b]:5d}  "
        + "#" * round(width * counts[b] / peak)
        for b in range(num_bins)
        if counts[b] or low != high
    ]
