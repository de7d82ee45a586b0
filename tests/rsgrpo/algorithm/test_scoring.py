"""From rollouts to scored groups: policies for missing markers and failing rewards, async rewards, time limits."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rewards.api import Credit, Response, Span, between, reward
from rewards.calls import Lanes
from rollout.errors import InputError
from rollout.types import Observation, Prompt, Rollout, RolloutGroup
from rsgrpo.algorithm.scoring import NamedReward, RewardFailed, RewardSet, group_mean, has_signal, to_response

TEXTS = ("<think>so</think><answer>7</answer>", "no tags at all")


@reward(scope=between("<think>", None))
def length(response: Response) -> float:
    return len(response.text) / 100


IN_FLIGHT = {"now": 0, "peak": 0}


@reward
async def slow_judge(response: Response) -> float:
    IN_FLIGHT["now"] += 1
    IN_FLIGHT["peak"] = max(IN_FLIGHT.values())
    await asyncio.sleep(0.05)
    IN_FLIGHT["now"] -= 1
    return 1.0


@reward
def gold_only(response: Response) -> float | None:
    return None if "page" not in response.truth else 1.0


@reward
def broken(response: Response) -> float:
    return 1.0 if "think" in response.text else 1 / 0


@reward
def not_a_number(response: Response) -> float:
    return float("nan")


@reward
def sleepy(response: Response) -> float:
    time.sleep(5)
    return 1.0


@reward
def two_spans(response: Response) -> list[Credit]:
    return [Credit("a", 0.0, Span(0, 3)), Credit("b", 1.0, Span(3, 6))]


def group(prompt: Prompt | None = None) -> RolloutGroup:
    rollouts = tuple(
        Rollout([1] * len(text), [0.0] * len(text), text, [(i, i + 1) for i in range(len(text))], "stop", 0)
        for text in TEXTS
    )
    return RolloutGroup(prompt or Prompt("row7", "q", question="how many?"), rollouts)


def reward_set(*functions, **options) -> RewardSet:
    timeout_s = options.pop("timeout_s", 0.0)
    return RewardSet(tuple(NamedReward(f.name, f, timeout_s) for f in functions), **options)


def test_scores_and_scopes_of_every_reward_and_rollout():
    scored = reward_set(length, gold_only).score([group()])[0]
    assert scored.reward_names_K == ("length", "gold_only")
    assert scored.scores_GK == [[0.35, None], [0.14, None]]
    assert scored.credits_GK[0][0] == (Credit("", 0.35, Span(0, 35), 35),)


def test_a_failing_reward_names_itself_the_sample_and_the_response():
    with pytest.raises(RewardFailed) as caught:
        reward_set(broken).score([group()])
    message = str(caught.value)
    assert "reward 'broken' failed on sample row7#1: ZeroDivisionError" in message
    assert "no tags at all" in message
    assert "on_reward_error=skip" in message
    assert re.search(r"at .*test_scoring\.py:\d+, in broken: return 1\.0 if", message)
    copied = pickle.loads(pickle.dumps(caught.value))  # as on its way from a worker
    assert "in broken" in copied.trace
    assert "ZeroDivisionError" in copied.trace


@reward
def leaves(response: Response) -> float:
    sys.exit("enough")


@pytest.mark.parametrize("timeout_s", [0.0, 5.0])
def test_a_reward_that_calls_sys_exit_is_named(timeout_s):
    with pytest.raises(RewardFailed, match=r"reward 'leaves' failed on sample row7#0: called sys.exit\('enough'\)"):
        reward_set(leaves, timeout_s=timeout_s).score([group()])


def test_a_wrong_value_points_to_the_function_that_returned_it():
    line = inspect.unwrap(not_a_number).__code__.co_firstlineno
    with pytest.raises(RewardFailed, match=rf"test_scoring.py:{line}, in not_a_number"):
        reward_set(not_a_number).score([group()])


def test_failures_are_skipped_and_counted_on_request():
    scored = reward_set(broken, skip_errors=True).score([group()])[0]
    assert scored.scores_GK == [[1.0], [None]]
    assert scored.num_errors_K == (1,)


def test_a_score_that_is_not_finite_is_a_failure():
    with pytest.raises(RewardFailed, match="not_a_number"):
        reward_set(not_a_number).score([group()])


def test_async_rewards_of_many_rollouts_run_side_by_side():
    scored = reward_set(slow_judge).score([group() for _ in range(10)])
    assert IN_FLIGHT["peak"] == 20
    assert all(row == [1.0] for one in scored for row in one.scores_GK)


def test_a_reward_that_never_returns_is_cut_off():
    with pytest.raises(RewardFailed, match=r"'sleepy' took longer than reward_timeouts_s.sleepy=0.1 s"):
        reward_set(sleepy, timeout_s=0.1).score([group()])


def test_several_credits_keep_their_spans_and_show_their_mean():
    scored = reward_set(two_spans).score([group()])[0]
    assert scored.scores_GK == [[0.5], [0.5]]
    assert [credit.span for credit in scored.credits_GK[0][0]] == [Span(0, 3), Span(3, 6)]


def test_monitors_are_scored_but_are_no_rewards():
    monitors = (NamedReward("gold", gold_only),)
    scored = reward_set(length, monitors=monitors).score([group(Prompt("p", "q", truth={"page": 2}))])[0]
    assert scored.reward_names_K == ("length",)
    assert scored.monitor_names_M == ("gold",)
    assert scored.monitors_GM == [[1.0], [1.0]]


def test_the_filter_sum_is_weighted_and_signal_is_any_spread():
    scored = reward_set(length, slow_judge).score([group()])[0]
    assert group_mean(scored, {"length": 10.0}) == pytest.approx((3.5 + 1 + 1.4 + 1) / 2)
    assert has_signal(scored)
    assert not has_signal(reward_set(slow_judge, two_spans).score([group()])[0])


def test_a_scope_where_the_time_limit_belongs_is_refused():
    with pytest.raises(InputError, match="timeout_s in seconds, got a function"):
        NamedReward("length", length, length.scope)  # type: ignore[arg-type]


MEETING: dict[str, asyncio.Event] = {}


def meets(name: str, other: str, score: float):
    """An async reward that ends only when the other one has begun."""

    @reward
    async def judge(response: Response) -> float:
        MEETING.setdefault(name, asyncio.Event()).set()
        await asyncio.wait_for(MEETING.setdefault(other, asyncio.Event()).wait(), timeout=20)
        return score

    judge.name = name
    return judge


def test_async_rewards_of_one_response_run_side_by_side_and_keep_their_order():
    MEETING.clear()
    judges = reward_set(meets("first", "second", 1.0), length, meets("second", "first", 2.0))
    assert judges.score([group()])[0].scores_GK == [[1.0, 0.35, 2.0], [1.0, 0.14, 2.0]]


def test_calls_on_one_loop_share_it_and_a_slow_plain_reward_holds_up_no_judge():
    """Two groups come in two calls, as a reward worker gets them; only the judge's end lets the plain reward end."""
    judged = threading.Event()
    order: list[str] = []

    @reward
    def plain(response: Response) -> float:
        assert judged.wait(20), "the judge was held up"
        order.append(response.text)
        return 0.5

    @reward
    async def judge(response: Response) -> float:
        judged.set()
        return 1.0

    async def two_calls() -> tuple:
        lanes = Lanes(thread=ThreadPoolExecutor(1))
        rewards = reward_set(plain, judge)
        return await asyncio.gather(rewards.score_group(group(), lanes), rewards.score_group(group(), lanes))

    for scored in asyncio.run(two_calls()):
        assert scored.scores_GK == [[0.5, 1.0], [0.5, 1.0]]
    assert order == list(TEXTS) * 2, "plain rewards are called one after another, in order"


def test_images_that_lie_elsewhere_are_read_when_a_reward_looks_at_them():
    read = []

    class Elsewhere:
        name = "elsewhere"

        def read(self) -> bytes:
            read.append(self.name)
            return b"page"

    seen = Observation(1, 1, (7,), "<image><image>", ("a.png", Elsewhere()))
    rollout = Rollout((1,), (0.0,), "a", ((0, 1),), "stop", 0, (seen,))
    response = to_response(RolloutGroup(Prompt("p", "<image>", (Elsewhere(),)), (rollout,)), 0)
    images = response.turns[0].images
    assert (len(images), len(response.images), images[0], read) == (2, 1, "a.png", [])
    assert (images[-1], list(response.images), read) == (b"page", [b"page"], ["elsewhere"] * 2)
    assert images[:1] == ("a.png",)
