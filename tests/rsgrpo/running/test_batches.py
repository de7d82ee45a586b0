"""Collecting a step's groups: filter, replacement, order, and the error when nothing passes."""

from __future__ import annotations

import random
import threading
from collections.abc import Generator

import pytest

from rewards.api import Credit, Span
from rollout.types import Prompt, Rollout, RolloutGroup, SamplingParams
from rsgrpo.config.train import FilterConfig
from rsgrpo.errors import RsgrpoError, SourceBroke
from rsgrpo.running.batches import Collector, Lookahead, derive_seed, resumed
from rsgrpo.types import ScoredGroup


class Stream:
    """Prompts 0, 1, 2, … in order."""

    def __init__(self, period: int = 10**6) -> None:
        self.taken = 0
        self.period = period

    def next(self, count: int) -> list[Prompt]:
        ids = [str((self.taken + i) % self.period) for i in range(count)]
        self.taken += count
        return [Prompt(id, "q") for id in ids]


def scored(prompt: Prompt, scores: list[float]) -> ScoredGroup:
    rollouts = tuple(Rollout([1], [0.0], "x", [(0, 1)], "stop", 0) for _ in scores)
    return ScoredGroup(
        RolloutGroup(prompt, rollouts),
        ("accuracy",),
        [[score] for score in scores],
        [[(Credit("", score, Span(0, 1)),)] for score in scores],
        [[False] for _ in scores],
    )


def engine(score_of, calls: list | None = None, at_once: int = 10**6, seed: int = 0):
    """Answer in random order, `at_once` shares at a time; `score_of(prompt)` gives scores, or an error text."""

    def sample(expected, next_share) -> Generator[ScoredGroup | RolloutGroup]:
        rng = random.Random(seed)
        in_flight: list[Prompt] = []
        while True:
            while len(in_flight) < at_once and (share := next_share()):
                if calls is not None:
                    calls.append(([prompt.id for prompt in share[0]], share[1].seed))
                in_flight += share[0]
            if not in_flight:
                return
            prompt = in_flight.pop(rng.randrange(len(in_flight)))
            outcome = score_of(prompt)
            yield RolloutGroup(prompt, (), error=outcome) if isinstance(outcome, str) else scored(prompt, outcome)

    return sample


def whole(prompts):
    """One share for all."""
    return [prompts]


def singly(prompts):
    return [[prompt] for prompt in prompts]


def ids(groups: list[ScoredGroup]) -> list[str]:
    return [group.group.prompt.id for group in groups]


def test_without_a_filter_a_step_is_one_round_in_the_order_of_the_stream():
    calls: list = []
    collector = Collector(
        engine(lambda p: [1.0, 1.0], calls), Stream().next, whole, SamplingParams(seed=3), FilterConfig()
    )
    groups, metrics = collector.collect(4, step=1)
    assert ids(groups) == ["0", "1", "2", "3"]
    assert len(calls) == 1
    assert metrics["rollout/tries"] == 1
    assert ids(collector.collect(4, step=2)[0]) == ["4", "5", "6", "7"]
    assert calls[0][1] != calls[1][1]


def test_prompts_that_fail_are_counted_and_replaced():
    collector = Collector(
        engine(lambda p: "unreadable image" if p.id == "1" else [1.0, 0.0]),
        Stream().next,
        whole,
        SamplingParams(),
        FilterConfig(),
    )
    groups, metrics = collector.collect(3, step=1)
    assert ids(groups) == ["0", "2", "3"]
    assert metrics["rollout/prompt_errors"] == 1


def odd_pass(prompt: Prompt) -> list[float]:
    """Even prompts are perfect (mean 1) and filtered; odd ones pass."""
    return [1.0, 1.0] if int(prompt.id) % 2 == 0 else [1.0, 0.0]


ODD = FilterConfig(enabled=True, low=0.01, high=0.99)


def test_a_dropped_group_is_replaced_at_once_and_what_is_not_used_begins_the_next_step():
    stream = Stream()
    collector = Collector(engine(odd_pass), stream.next, whole, SamplingParams(), ODD)
    groups, metrics = collector.collect(4, step=1)
    assert ids(groups) == ["1", "3", "5", "7"]
    assert metrics["rollout/groups_sampled"] == 8
    assert metrics["rollout/groups_filtered"] == 4
    assert [prompt.id for prompt in collector.returned] == [str(n) for n in range(8, stream.taken)]
    calls: list = []
    collector.sample = engine(odd_pass, calls)
    assert ids(collector.collect(4, step=2)[0]) == ["9", "11", "13", "15"]
    assert calls[0][0][0] == "8", "what step 1 did not use is sampled again, with the new weights"


def test_what_a_step_learns_from_does_not_depend_on_which_group_arrives_first():
    def two_steps(seed: int) -> list:
        collector = Collector(engine(odd_pass, None, 5, seed), Stream().next, singly, SamplingParams(), ODD)
        steps = [collector.collect(4, step) for step in (1, 2)]
        return [(ids(groups), {k: v for k, v in metrics.items() if k[:5] != "perf/"}) for groups, metrics in steps]

    assert all(two_steps(seed) == two_steps(0) for seed in range(1, 20))


def test_a_lost_group_is_replaced_before_the_others_have_arrived_and_no_more_than_needed_is_in_flight():
    most = []

    def sample(expected, next_share):
        in_flight: list[Prompt] = []
        while True:
            while share := next_share():
                in_flight += share[0]
            most.append(len(in_flight))
            prompt = in_flight.pop()  # the newest first: the oldest is still missing when all others are there
            yield scored(prompt, odd_pass(prompt))

    exact = FilterConfig(enabled=True, low=0.01, high=0.99, oversample=0)
    collector = Collector(sample, Stream().next, singly, SamplingParams(), exact)
    groups, metrics = collector.collect(4, step=1)
    assert ids(groups) == ["1", "3", "5", "7"]
    assert max(most) == 4
    assert metrics["perf/groups_abandoned"] == 0
    spare = FilterConfig(enabled=True, low=0.01, high=0.99, oversample=0.5)
    most.clear()
    Collector(sample, Stream().next, singly, SamplingParams(), spare).collect(4, step=1)
    assert max(most) == 6


def test_the_filter_compares_the_weighted_sum():
    # Mean accuracy 0.5 counts three times: 1.5 is outside (0, 1).
    config = FilterConfig(enabled=True, low=0.0, high=1.0, weights={"accuracy": 3.0}, max_tries=2)
    collector = Collector(engine(lambda p: [1.0, 0.0]), Stream().next, whole, SamplingParams(), config)
    with pytest.raises(RsgrpoError, match=r"max_tries=2 times as many prompts only 0 of 2 groups passed"):
        collector.collect(2, step=1)


def test_groups_without_signal_can_be_dropped():
    config = FilterConfig(enabled=True, low=-1, high=2, drop_without_signal=True)
    scores = {"0": [0.5, 0.5], "1": [0.0, 1.0]}
    collector = Collector(
        engine(lambda p: scores.get(p.id, [0.2, 0.3])), Stream().next, whole, SamplingParams(), config
    )
    assert ids(collector.collect(2, step=1)[0]) == ["1", "2"]


def test_giving_up_shows_the_histogram_and_the_reasons():
    config = FilterConfig(enabled=True, max_tries=3)
    collector = Collector(
        engine(lambda p: "too long" if p.id == "0" else [1.0 * (int(p.id) % 2) * 8] * 2),
        Stream().next,
        whole,
        SamplingParams(),
        config,
    )
    with pytest.raises(RsgrpoError) as caught:
        collector.collect(4, step=1)
    message = str(caught.value)
    assert "group mean    0.00" in message
    assert "####" in message
    assert "1 prompts failed: too long" in message


def test_a_data_set_smaller_than_a_step_never_samples_a_prompt_twice_with_one_seed():
    calls: list = []
    collector = Collector(
        engine(lambda p: [1.0, 0.0], calls), Stream(period=3).next, whole, SamplingParams(), FilterConfig()
    )
    groups, _ = collector.collect(7, step=1)
    assert ids(groups) == ["0", "1", "2", "0", "1", "2", "0"]
    assert [call_ids for call_ids, _ in calls] == [["0", "1", "2"], ["0", "1", "2"], ["0"]]
    assert len({seed for _, seed in calls}) == 3


def test_seeds_depend_on_every_part():
    assert derive_seed(0, "train", 1, 0) == derive_seed(0, "train", 1, 0)
    assert len({derive_seed(0, "train", 1, 0), derive_seed(1, "train", 1, 0), derive_seed(0, "train", 2, 0)}) == 3
    assert 0 <= derive_seed(0, "val") < 2**63


def plain_collector(stream: Stream) -> Collector:
    return Collector(engine(lambda p: [1.0, 0.0]), stream.next, whole, SamplingParams(), FilterConfig())


@pytest.mark.parametrize("staleness", [1, 2, 3, 4])
def test_batches_are_collected_the_given_number_of_steps_ahead_and_in_order(staleness):
    stream, last = Stream(), 6
    ahead = Lookahead(plain_collector(stream), 2)
    learned = []
    for step in range(1, last + 1):
        learned += ids(ahead.take(step)[0])
        ahead.start(min(step + staleness, last))
        ahead.settle()
        assert sorted(ahead.ready) == list(range(step + 1, min(step + staleness, last) + 1))
        if step == 2:  # a resumed run goes on from what a checkpoint holds
            ahead = Lookahead(plain_collector(stream), 2, dict(ahead.ready))
    assert learned == [str(n) for n in range(2 * last)]
    assert stream.taken == 2 * last


def test_a_batch_that_is_being_collected_is_collected_again_by_who_resumes():
    stream, go_on, begun = Stream(), threading.Event(), threading.Event()
    sample = engine(lambda p: [1.0, 0.0])

    def waiting(*arguments):
        for group in sample(*arguments):
            begun.set()
            assert go_on.wait(30)
            yield group

    go_on.set()
    collector = Collector(waiting, stream.next, whole, SamplingParams(), FilterConfig())
    ahead = Lookahead(collector, 2, position=lambda: stream.taken)
    assert ids(ahead.take(1)[0]) == ["0", "1"]
    go_on.clear()
    begun.clear()
    ahead.start(3)
    assert begun.wait(30)
    assert ahead.boundary() == {"stream": 2, "returned": [], "ready": {}}
    go_on.set()
    assert ids(ahead.take(2)[0]) == ["2", "3"]  # waits for it, and for no other
    ahead.settle()
    boundary = ahead.boundary()
    assert (boundary["stream"], list(boundary["ready"])) == (6, [3])


def test_steps_that_have_a_batch_are_finished_before_the_end_of_the_stream_is_raised():
    stream = Stream()

    def next_prompts(count: int) -> list[Prompt]:
        if stream.taken == 4:
            raise SourceBroke("no more rows")
        return stream.next(count)

    ahead = Lookahead(Collector(engine(lambda p: [1.0]), next_prompts, whole, SamplingParams(), FilterConfig()), 2)
    ahead.take(1)
    ahead.start(4)
    ahead.settle()
    assert ids(ahead.take(2)[0]) == ["2", "3"]
    with pytest.raises(SourceBroke, match="no more rows"):
        ahead.take(3)


def test_prompts_of_a_step_that_the_end_of_the_stream_cut_short_are_not_lost():
    stream = Stream()

    def next_prompts(count: int) -> list[Prompt]:
        if stream.taken >= 4:
            raise SourceBroke("no more rows")
        return stream.next(count)

    collector = Collector(engine(odd_pass), next_prompts, whole, SamplingParams(), ODD)
    with pytest.raises(SourceBroke):
        collector.collect(4, step=1)
    assert [prompt.id for prompt in collector.returned] == ["0", "1", "2", "3"]


def test_a_checkpoint_of_an_older_release_gives_its_surplus_back_as_prompts():
    batch = ([scored(Prompt("5", "q"), [1.0])], {"rollout/tries": 1.0})
    returned, ready = resumed({"surplus": [scored(Prompt("4", "q"), [1.0])], "ready": (3, batch)})
    assert [prompt.id for prompt in returned] == ["4"]
    assert ready == {3: batch}
    assert resumed({"returned": [Prompt("7", "q")], "ready": None}) == ([Prompt("7", "q")], {})
