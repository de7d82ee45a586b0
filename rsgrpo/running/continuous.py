"""Collects steps without a pause between them, from engines whose weights change while they sample.

The tail of a step leaves no engine idle: the next step's prompts fill its slots.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from rollout.engine import Share
from rollout.types import RolloutGroup
from rsgrpo.config.train import TrainConfig
from rsgrpo.errors import RsgrpoError, SourceBroke
from rsgrpo.running.batches import Batch, Collector, Filling, Lookahead
from rsgrpo.types import ScoredGroup

_TOO_OLD = -1
"""In place of the number of a prompt in flight whose group no step will take."""


class Stage(Filling):
    """A step that is filled while steps after it may be sampled already.

    last_step: the last step that may learn from what is sampled from now on.
    """

    def __init__(self, collector: Collector, num_groups: int, step: int, last_step: int) -> None:
        super().__init__(collector, num_groups, step)
        self.step, self.last_step = step, last_step
        self._fit_for: list[int] = []  # by number of a prompt that was sent: the last step that may learn from it

    @property
    def _num_wanted(self) -> int:
        return self._num_groups * (1 + self.last_step - self.step)

    def next_share(self) -> Share | None:
        """Return the prompts to be sampled next, for this step or one after it; None while enough are in flight."""
        share = super().next_share()
        if share is not None:
            self._fit_for += [self.last_step] * len(share[0])
        return share

    def arrived(self, group: ScoredGroup | RolloutGroup) -> None:
        """Take the group of a prompt in flight; one that is too old is dropped."""
        prompt_id = (group.group if isinstance(group, ScoredGroup) else group).prompt.id
        if self._in_flight[prompt_id] == _TOO_OLD:
            del self._in_flight[prompt_id]
        else:
            super().arrived(group)

    def following(self) -> tuple[Stage, int]:
        """Return the next step, which goes on with what this one has not used, and how many groups it cannot take.

        These were sampled before that step might be; their prompts are sampled again.
        """
        stage = Stage(self._collector, self._num_groups, self.step + 1, self.last_step)
        stage.broke = self.broke
        prompt_id_of = {number: prompt_id for prompt_id, number in self._in_flight.items()}
        stage._in_flight = {prompt_id: _TOO_OLD for prompt_id, number in self._in_flight.items() if number == _TOO_OLD}
        again = []
        for number in range(self.num_used, self._num_sent):
            is_fit = self._fit_for[number] > self.step
            if number in prompt_id_of:
                stage._in_flight[prompt_id_of[number]] = stage._num_sent if is_fit else _TOO_OLD
            elif is_fit:
                stage._outcomes[stage._num_sent] = self._outcomes[number]
            if is_fit:
                stage.prompts.append(self.prompts[number])
                stage._fit_for.append(self._fit_for[number])
                stage._num_sent += 1
            else:
                again.append(self.prompts[number])
        stage._num_kept = sum(
            isinstance(group, ScoredGroup) and self._collector.is_kept(group) for group in stage._outcomes.values()
        )
        stage._planned = self._planned
        stage.prompts += [prompt for share, _ in self._planned for prompt in share]
        stage._returned = deque([*again, *self._returned])
        stage._part = self._part + 1  # what is planned keeps its part, and with it a seed of its own
        stage._use()
        return stage, len(again)


class Continuous:
    """A `rsgrpo.running.batches.Lookahead` for engines that change their weights while they sample.

    A step learns from prompts that were sent to the engines after it was started (`start`), so that no token is of
    older weights than the caller had given the engines then. Which groups fall to which step is a matter of time.

    ready: by step, batches that were collected ahead of time and not yet taken; part of a checkpoint.
    position: where the stream of prompts is.
    """

    def __init__(
        self,
        collector: Collector,
        num_groups: int,
        ready: Mapping[int, Batch] | None = None,
        position: Callable[[], Any] = lambda: None,
        *,
        num_done: int = 0,
    ) -> None:
        """Begin after `num_done` steps, where `ready` has no later ones."""
        self.collector, self.num_groups, self.position = collector, num_groups, position
        self.ready: dict[int, Batch] = dict(ready or {})
        self._changed = threading.Condition()
        self._stage: Stage | None = None
        self._next = max([num_done, *self.ready]) + 1  # the step that is being collected, or the next one to be
        self._last = 0
        self._is_sampling = False
        self._failure: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling")

    def take(self, step: int) -> Batch:
        """Return the batch of `step`, which is started if it has not been.

        Raises:
            SourceBroke: the stream has no more prompts.
            RsgrpoError: as `Collector.collect`.
        """
        with self._changed:
            self.start(step)
            self._changed.wait_for(lambda: step in self.ready or self._failure is not None)
            if step in self.ready:
                return self.ready.pop(step)
            assert self._failure is not None
            raise self._failure

    def start(self, last_step: int) -> None:
        """Let the steps up to `last_step` be sampled."""
        with self._changed:
            self._last = max(self._last, last_step)
            if self._stage is not None:
                self._stage.last_step = self._last
            if not self._is_sampling and self._failure is None and self._next <= self._last:
                self._is_sampling = True
                self._thread.submit(self._sample)

    def settle(self) -> None:
        """Wait until what was started is there; raise what it raised, but for the end of the stream (see `take`)."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_sampling)
            if self._failure is not None and not isinstance(self._failure, SourceBroke):
                raise self._failure

    def boundary(self) -> dict[str, Any]:
        """Return what a checkpoint must hold now. What is being sampled is sampled again by who resumes."""
        with self._changed:
            returned = self.collector.returned if self._stage is None else self._stage.unused
            return {"stream": self.position(), "returned": list(returned), "ready": dict(self.ready)}

    def _sample(self) -> None:
        """Sample until nothing is left that was started."""
        try:
            while (stage := self._begin()) is not None:
                with closing(self.collector.sample(list(stage.prompts), self._next_share)) as groups:
                    for group in groups:
                        self._arrived(group)
                        if self._stage is None:
                            break
                if self._stage is not None:
                    raise self._stage.broke or RsgrpoError(self._stage.explain())
        except BaseException as error:
            with self._changed:
                self._failure, self._is_sampling = error, False
                self._changed.notify_all()

    def _begin(self) -> Stage | None:
        with self._changed:
            if self._next > self._last:
                self._is_sampling = False
                self._changed.notify_all()
                return None
            stage = Stage(self.collector, self.num_groups, self._next, self._last)
            stage.take(self.num_groups)
            self._stage = stage
            return stage

    def _next_share(self) -> Share | None:
        with self._changed:
            return None if self._stage is None else self._stage.next_share()

    def _arrived(self, group: ScoredGroup | RolloutGroup) -> None:
        with self._changed:
            assert self._stage is not None
            self._stage.arrived(group)
            while self._stage is not None and self._stage.is_full:
                self._end_step(self._stage)

    def _end_step(self, stage: Stage) -> None:
        """Put a full step's batch among those that are ready; go on with the next one if it may be sampled."""
        metrics = stage.metrics()
        self._next += 1
        if self._next <= self._last:
            self._stage, num_too_old = stage.following()
            metrics["perf/groups_abandoned"] = float(num_too_old)
        else:
            self._stage, self.collector.returned = None, stage.unused
        self.ready[stage.step] = (stage.kept, metrics)
        self._changed.notify_all()


def batches_for(
    config: TrainConfig,
    collector: Collector,
    ready: Mapping[int, Batch],
    position: Callable[[], Any],
    *,
    num_done: int,
) -> Lookahead | Continuous:
    """Return what collects the batches of a run that has done `num_done` steps."""
    num_groups = config.algorithm.prompts_per_step
    if config.changes_weights_in_flight:
        return Continuous(collector, num_groups, ready, position, num_done=num_done)
    return Lookahead(collector, num_groups, dict(ready), position)
