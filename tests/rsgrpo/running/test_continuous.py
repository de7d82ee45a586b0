"""Steps that follow each other without a pause: order, age, what a checkpoint holds, and the end of the stream."""

from __future__ import annotations

import random
import threading
from collections.abc import Generator
from dataclasses import replace

import pytest

from rollout.types import Prompt, RolloutGroup, SamplingParams
from rsgrpo.config.train import FilterConfig
from rsgrpo.errors import RsgrpoError, SourceBroke
from rsgrpo.running.batches import Collector
from rsgrpo.running.continuous import Continuous, Stage
from rsgrpo.types import ScoredGroup
from tests.rsgrpo.running.test_batches import ODD, Stream, engine, ids, odd_pass, scored, singly


def collector_of(sample, stream: Stream, filter: FilterConfig = ODD) -> Collector:
    return Collector(sample, stream.next, singly, SamplingParams(), filter)


def test_steps_take_the_groups_that_pass_in_the_order_of_their_prompts_and_nothing_is_sampled_twice():
    for seed in range(10):
        calls: list = []
        steps = Continuous(collector_of(engine(odd_pass, calls, 5, seed), Stream()), 4)
        steps.start(6)
        batches = [steps.take(step) for step in range(1, 7)]
        steps.settle()
        assert [id for groups, _ in batches for id in ids(groups)] == [str(n) for n in range(1, 48, 2)]
        sent = [id for call_ids, _ in calls for id in call_ids]
        assert sent == [str(n) for n in range(len(sent))]
        assert sum(metrics["perf/groups_abandoned"] for _, metrics in batches[:-1]) == 0
        assert [metrics["rollout/groups_filtered"] for _, metrics in batches] == [4] * 6


def test_the_next_step_is_sampled_while_the_last_group_of_a_step_is_missing():
    stage = Stage(collector_of(None, Stream()), 4, step=1, last_step=2)
    stage.take(4)
    sent = sent_now(stage)
    for _ in range(8):  # all but prompt 1, whose responses are long
        prompt = next(prompt for prompt in sent if prompt.id != "1")
        sent.remove(prompt)
        stage.arrived(scored(prompt, odd_pass(prompt)))
        sent += sent_now(stage)
    assert not stage.is_full
    assert len(sent) >= 4 + 2, "a step's prompts and the spare ones are in flight beside it"
    stage.arrived(scored(Prompt("1", "q"), [1.0, 0.0]))
    assert stage.is_full
    following, num_too_old = stage.following()
    assert (ids(stage.kept), num_too_old) == (["1", "3", "5", "7"], 0)
    assert following.num_used == 1, "prompt 8 has arrived already"


def sent_now(stage: Stage) -> list[Prompt]:
    sent: list[Prompt] = []
    while share := stage.next_share():
        sent += share[0]
    return sent


def test_what_was_sent_before_a_step_was_allowed_is_too_old_for_it_and_sampled_again():
    stage = Stage(collector_of(None, Stream()), 4, step=1, last_step=1)
    stage.take(4)
    early = sent_now(stage)
    assert [prompt.id for prompt in early] == ["0", "1", "2", "3", "4", "5"]
    for prompt in early[:4]:
        stage.arrived(scored(prompt, [1.0, 0.0]))
        if prompt.id == "2":
            stage.last_step = 2
            late = sent_now(stage)
    following, num_too_old = stage.following()
    assert (ids(stage.kept), num_too_old) == (["0", "1", "2", "3"], 2)
    following.arrived(scored(early[4], [1.0, 0.0]))
    assert (following.kept, following.num_used) == ([], 0), "of the weights before"
    for prompt in late:
        following.arrived(scored(prompt, [1.0, 0.0]))
    assert ids(following.kept) == [prompt.id for prompt in late[:4]]
    again = Stage.following(following)[0]
    again.last_step = 3
    assert {"4"} <= {prompt.id for prompt in sent_now(again)}
    assert "5" not in {prompt.id for prompt in sent_now(again)}, "still in flight for nobody"


class Ageing:
    """Engines of seven slots whose responses are of the version that they were begun with."""

    def __init__(self, seed: int) -> None:
        self.version, self._rng = 0, random.Random(seed)

    def sample(self, expected, next_share) -> Generator[ScoredGroup | RolloutGroup]:
        in_flight: list[tuple[Prompt, int]] = []
        while True:
            while len(in_flight) < 7 and (share := next_share()):
                in_flight += [(prompt, self.version) for prompt in share[0]]
            if not in_flight:
                return
            prompt, born = in_flight.pop(self._rng.randrange(len(in_flight)))
            group = scored(prompt, odd_pass(prompt))
            rollouts = tuple(replace(rollout, weights_version=born) for rollout in group.group.rollouts)
            yield replace(group, group=replace(group.group, rollouts=rollouts))


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_no_group_is_of_older_weights_than_the_staleness_allows(staleness):
    last = 12
    for seed in range(10):
        engines = Ageing(seed)
        steps = Continuous(collector_of(engines.sample, Stream()), 4)
        for step in range(1, last + 1):
            groups, _ = steps.take(step)
            oldest = min(rollout.weights_version for group in groups for rollout in group.group.rollouts)
            assert oldest >= step - 1 - staleness
            steps.start(min(step + staleness, last))
            engines.version = step  # learned and sent to the engines
            steps.start(min(step + 1 + staleness, last))
        steps.settle()


def test_who_resumes_from_a_boundary_loses_no_prompt():
    stream, go_on, begun = Stream(), threading.Event(), threading.Event()
    inner = engine(odd_pass, None, 2)

    def waiting(*arguments):
        for number, group in enumerate(inner(*arguments)):
            if number == 13:
                begun.set()
                assert go_on.wait(30)
            yield group

    steps = Continuous(collector_of(waiting, stream), 4, position=lambda: stream.taken)
    steps.start(3)
    assert ids(steps.take(1)[0]) == ["1", "3", "5", "7"]
    assert begun.wait(30)
    state = steps.boundary()
    go_on.set()
    steps.settle()
    resumed_stream = Stream()
    resumed_stream.taken = state["stream"]
    collector = Collector(engine(odd_pass), resumed_stream.next, singly, SamplingParams(), ODD, state["returned"])
    resumed = Continuous(collector, 4, state["ready"], num_done=1)
    assert [id for step in (2, 3) for id in ids(resumed.take(step)[0])] == [str(n) for n in range(9, 24, 2)]


def test_steps_that_have_a_batch_are_finished_before_an_end_is_raised():
    stream = Stream()

    def next_prompts(count: int) -> list[Prompt]:
        if stream.taken >= 12:
            raise SourceBroke("no more rows")
        return stream.next(count)

    steps = Continuous(Collector(engine(odd_pass), next_prompts, singly, SamplingParams(), ODD), 4)
    steps.start(3)
    steps.settle()
    assert ids(steps.take(1)[0]) == ["1", "3", "5", "7"]
    with pytest.raises(SourceBroke, match="no more rows"):
        steps.take(2)
    assert [prompt.id for prompt in steps.boundary()["returned"]] == ["8", "9", "10", "11"]
    never = Continuous(collector_of(engine(lambda p: [1.0, 1.0]), Stream()), 4)
    with pytest.raises(RsgrpoError, match="only 0 of 4 groups passed the filter"):
        never.take(1)
    with pytest.raises(RsgrpoError, match="only 0 of 4"):
        never.settle()


def test_a_data_set_smaller_than_the_steps_ahead_never_samples_a_prompt_twice_with_one_seed():
    calls: list = []
    steps = Continuous(collector_of(engine(lambda p: [1.0, 0.0], calls), Stream(period=3), FilterConfig()), 4)
    steps.start(4)
    for step in range(1, 5):
        assert len(steps.take(step)[0]) == 4
    assert len({(call_ids[0], seed) for call_ids, seed in calls}) == len(calls) == 16
