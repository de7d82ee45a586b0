"""Collects the groups of one training step: sample, score, filter, refill."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from rollout.types import Prompt, RolloutGroup, SamplingParams
from rsgrpo.algorithm.scoring import group_mean, has_signal
from rsgrpo.config.train import FilterConfig
from rsgrpo.errors import RsgrpoError, SourceBroke
from rsgrpo.types import ScoredGroup

log = logging.getLogger(__name__)

SampleAndScore = Callable[[Sequence[Prompt], SamplingParams], Iterator[ScoredGroup | RolloutGroup]]
"""Yields a ScoredGroup per prompt in any order, or the RolloutGroup itself where it has an error."""


def derive_seed(seed: int, *parts: object) -> int:
    """Return a 63-bit seed that depends on the run's seed and on what it is for."""
    digest = hashlib.sha256(repr((seed, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass
class Collector:
    """Fills steps with groups worth training on; keeps the surplus for the next step.

    sample_and_score: samples prompts and scores them.
    next_prompts: takes the given number of prompts from the training stream.
    filter: which groups are kept.
    surplus: kept groups that the last step had no room for; part of a checkpoint.
    """

    sample_and_score: SampleAndScore
    next_prompts: Callable[[int], list[Prompt]]
    sampling: SamplingParams
    filter: FilterConfig
    surplus: list[ScoredGroup] = field(default_factory=list)

    def collect(self, num_groups: int, step: int) -> tuple[list[ScoredGroup], dict[str, float]]:
        """Return `num_groups` groups for this step, and what was dropped on the way (`rollout/*`).

        Raises:
            SourceBroke: the stream has no more prompts; what was kept is in `surplus`.
            RsgrpoError: `filter.max_tries` rounds did not fill the step; shows the histogram of what was sampled.
        """
        kept, self.surplus = self.surplus, []
        seen: list[ScoredGroup] = []
        errors: Counter[str] = Counter()
        num_reused, tries = len(kept), 0
        while len(kept) < num_groups:
            if tries == self.filter.max_tries:
                raise RsgrpoError(self._explain(num_groups, kept, seen, errors))
            try:
                prompts = self.next_prompts(self._round_size(num_groups, num_groups - len(kept)))
            except SourceBroke:
                self.surplus = kept
                raise
            for group in self._in_order(prompts, derive_seed(self.sampling.seed, "train", step, tries)):
                if isinstance(group, RolloutGroup):
                    log.warning("step %d: prompt %s could not be sampled: %s", step, group.prompt.id, group.error)
                    errors[group.error or "no rollouts"] += 1
                    continue
                seen.append(group)
                if self._is_kept(group):
                    kept.append(group)
            tries += 1
        kept, self.surplus = kept[:num_groups], kept[num_groups:]
        return kept, {
            "rollout/tries": float(tries),
            "rollout/groups_sampled": float(len(seen)),
            "rollout/groups_filtered": float(len(seen) + num_reused - len(kept) - len(self.surplus)),
            "rollout/groups_reused": float(num_reused),
            "rollout/prompt_errors": float(sum(errors.values())),
        }

    def _round_size(self, num_groups: int, num_missing: int) -> int:
        # Without a filter a round is exact; with one, small rounds would multiply, and surplus is not lost.
        return max(num_missing, math.ceil(num_groups / 4)) if self.filter.enabled else num_missing

    def _in_order(self, prompts: Sequence[Prompt], seed: int) -> list[ScoredGroup | RolloutGroup]:
        """Groups arrive in any order; a run must not depend on which came first."""
        ordered = []
        for part, distinct in enumerate(_split_repeats(prompts)):
            arrived: dict[str, ScoredGroup | RolloutGroup] = {}
            sampling = replace(self.sampling, seed=derive_seed(seed, part))
            for group in self.sample_and_score(distinct, sampling):
                arrived[(group.group if isinstance(group, ScoredGroup) else group).prompt.id] = group
            ordered += [arrived[prompt.id] for prompt in distinct]
        return ordered

    def _is_kept(self, group: ScoredGroup) -> bool:
        if not self.filter.enabled:
            return True
        if self.filter.drop_without_signal and not has_signal(group):
            return False
        return self.filter.low < group_mean(group, self.filter.weights) < self.filter.high

    def _explain(self, num_groups: int, kept: list[ScoredGroup], seen: list[ScoredGroup], errors: Counter[str]) -> str:
        means = sorted(group_mean(group, self.filter.weights) for group in seen)
        lines = [
            f"after algorithm.filter.max_tries={self.filter.max_tries} rounds only {len(kept)} of {num_groups} groups "
            f"passed the filter ({self.filter.low:g}, {self.filter.high:g}); {len(seen)} groups were sampled.",
            *_histogram(means),
        ]
        lines += [f"{count} prompts failed: {reason}" for reason, count in errors.most_common(3)]
        lines.append("Widen algorithm.filter.low/high, raise max_tries, or look at the rewards: they may be constant.")
        return "\n".join(lines)


@dataclass
class Lookahead:
    """Collects the groups of a step when they are needed, or ahead of time, while something else runs.

    ready: a batch that was collected ahead of time and not yet taken, with its step; part of a checkpoint.
    """

    collector: Collector
    num_groups: int
    ready: tuple[int, tuple[list[ScoredGroup], dict[str, float]]] | None = None
    _running: tuple[int, Future[tuple[list[ScoredGroup], dict[str, float]]]] | None = None
    _broke: SourceBroke | None = None
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="sampling"))

    def take(self, step: int) -> tuple[list[ScoredGroup], dict[str, float]]:
        """Return the batch of `step`: what `start` collected, else it is collected now.

        Raises:
            SourceBroke: as `Collector.collect`, now or while `start` collected.
        """
        if self._broke is not None:
            raise self._broke
        if self.ready is not None and self.ready[0] == step:
            batch = self.ready[1]
            self.ready = None
            return batch
        return self.collector.collect(self.num_groups, step)

    def start(self, step: int) -> None:
        """Begin to collect a later step's batch; `settle` must follow."""
        self._running = (step, self._thread.submit(self.collector.collect, self.num_groups, step))

    def settle(self) -> None:
        """Wait until what was started is there; raise what it raised.

        The end of the stream is raised by `take`, so that the step in progress can be finished and saved first.
        """
        if self._running is not None:
            step, batch = self._running
            self._running = None
            error = batch.exception()
            if isinstance(error, SourceBroke):
                self._broke = error
            else:
                self.ready = (step, batch.result())


def _split_repeats(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Split a round so that no part holds a prompt twice (a data set smaller than a step wraps around)."""
    parts: list[list[Prompt]] = []
    for prompt in prompts:
        if not parts or any(prompt.id == other.id for other in parts[-1]):
            parts.append([])
        parts[-1].append(prompt)
    return parts


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
