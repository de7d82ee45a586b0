"""An advantage of the user's own, named as module:function."""

from __future__ import annotations

import numpy as np
import pytest

from rewards.api import Credit, Response, Span, reward
from rollout.types import Prompt, Rollout, RolloutGroup
from rsgrpo import cli
from rsgrpo.algorithm.advantages import Rule, credit_group, term_names, term_weights
from rsgrpo.algorithm.scoring import NamedReward, RewardSet
from rsgrpo.config.learner import AlgorithmConfig
from rsgrpo.config.own_advantage import load_advantage
from rsgrpo.config.train import TrainConfig
from rsgrpo.errors import ConfigError, InputError
from rsgrpo.types import ScoredGroup

FUNCTIONS = """
import numpy as np

def centred(scores_GK):
    return scores_GK - np.nanmean(scores_GK, axis=0)

def first(scores_GK):
    return np.arange(len(scores_GK)) - 0.5

def narrow(scores_GK):
    return scores_GK[:, :1]

def broken(scores_GK):
    return 1 / 0

def infinite(scores_GK):
    return scores_GK / 0.0
"""


@pytest.fixture(autouse=True)
def functions(tmp_path, monkeypatch):
    (tmp_path / "own_advantages_of_a_test.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))


def target(name: str) -> str:
    return f"own_advantages_of_a_test:{name}"


@reward
def length(response: Response) -> float:
    return float(len(response.text))


@reward
def first_is_a(response: Response) -> float | None:
    return 1.0 if response.text[0] == "a" else None


@reward
def per_letter(response: Response) -> list[Credit]:
    return [Credit(letter, 1.0 + i, Span(i, i + 1)) for i, letter in enumerate(response.text[:2])]


def scored(*rewards) -> ScoredGroup:
    rollouts = tuple(
        Rollout([1] * len(text), [0.0] * len(text), text, [(i, i + 1) for i in range(len(text))], "stop", 0)
        for text in ("abcd", "ba")
    )
    rewarded = RewardSet(tuple(NamedReward(one.name, one) for one in rewards))
    return rewarded.score([RolloutGroup(Prompt("p", "q"), rollouts)])[0]


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_each_reward_gets_the_advantage_that_the_function_returns():
    samples = credit_group(scored(length, first_is_a), Rule(target("centred")), [1.0, 2.0]).samples
    assert samples[0].advantages_KT.tolist() == [[1.0] * 4, [0.0] * 4]
    assert samples[1].advantages_KT.tolist() == [[-1.0] * 2, [0.0] * 2]
    assert samples[1].scope_KT.tolist() == [[True] * 2, [False] * 2]  # the second reward did not apply there
    assert term_names(target("centred"), ["length", "first_is_a"]) == ("length", "first_is_a")
    assert term_weights(target("centred"), [1.0, 2.0]) == (1.0, 2.0)


def test_one_advantage_per_rollout_counts_for_every_reward_and_key():
    samples = credit_group(scored(length, per_letter), Rule(target("first")), [1.0, 1.0]).samples
    assert samples[0].advantages_KT.tolist() == [[-0.5] * 4, [-0.5, -0.5, 0.0, 0.0]]
    assert samples[1].advantages_KT.tolist() == [[0.5] * 2, [0.5, 0.5]]


def test_it_agrees_with_per_reward_where_it_computes_the_same():
    group = scored(length, per_letter)
    own = credit_group(group, Rule(target("centred"), credit="causal"), [1.0, 1.0])
    ours = credit_group(group, Rule("per_reward", credit="causal", scale="none"), [1.0, 1.0])
    for mine, theirs in zip(own.samples, ours.samples, strict=True):
        np.testing.assert_allclose(mine.advantages_KT, theirs.advantages_KT, atol=1e-7)
        np.testing.assert_array_equal(mine.scope_KT, theirs.scope_KT)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("narrow", r"returned the shape \(2, 1\) for scores of shape \(2, 2\)"),
        ("broken", r"failed on scores of shape \(2, 2\): ZeroDivisionError"),
        ("infinite", "returned NaN or infinity where there is a score"),
        ("gone", "has no function 'gone'"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_what_it_returns_is_checked(name, message):
    with pytest.raises(InputError, match=message):
        credit_group(scored(length, first_is_a), Rule(target(name)), [1.0, 1.0])


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"algorithm\.advantage: no module 'gone' for 'gone:f'"):
        load_advantage("gone:f")


def test_the_command_line_takes_it_and_refuses_other_words():
    config = cli.compose(
        TrainConfig, overrides=["recipe=demo", "algorithm.advantage=mine:f", "algorithm.credit=causal"]
    )
    assert Rule.of(config.algorithm) == Rule("mine:f", credit="causal")
    with pytest.raises(ConfigError, match=r"module:function of your own; got 'per_rewards'; did you mean per_reward"):
        AlgorithmConfig(advantage="per_rewards")
