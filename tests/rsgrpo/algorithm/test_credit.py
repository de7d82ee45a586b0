"""Which tokens a reward teaches, and what its score is compared with: worked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rewards.api import Credit, Response, Span, closed
from rewards.evisrag import accuracy, evidence, evidence_slots, no_early_index, think_differs, well_formed
from rollout.errors import ConfigError
from rsgrpo.algorithm.advantages import Rule, credit_group, credit_groups
from rsgrpo.config.learner import AlgorithmConfig
from tests.rsgrpo.algorithm.test_advantages import scored

TEXT = "<observe>a</observe><evidence>[1]: x</evidence><think>t</think><answer>7</answer> and more"


def upto(tag: str) -> int:
    return TEXT.index(tag) + len(tag)


@pytest.mark.parametrize(
    ("reward", "where"),
    [
        (accuracy, upto("</answer>")),
        (evidence, upto("</evidence>")),
        (no_early_index, upto("</observe>")),
        (think_differs, upto("</answer>")),
        (well_formed, None),
    ],
)
def test_shipped_rewards_are_determined_where_their_last_block_closes(reward, where):
    assert (reward.determined and reward.determined(Response(TEXT))) == where


def test_a_block_that_never_closes_leaves_its_reward_undetermined():
    assert closed(("<answer>", "</answer>"))(Response("</answer><answer>7")) is None
    (credit,) = evidence_slots(Response("<evidence>[1]: x", {"evidence": ["x"]}))
    assert (credit.span, credit.determined) == (None, None)


def early_and_late(first: float, second: float) -> list[list[Credit]]:
    """A reward on tokens 0 and 1, decided behind token 1; and one on tokens 2 and 3, decided behind token 3."""
    return [[Credit("", first, Span(0, 2), 2)], [Credit("", second, Span(2, 4), 4)]]


def group():
    return scored([early_and_late(0.0, 1.0), early_and_late(1.0, 0.0)], [5, 5])


@pytest.mark.parametrize(
    ("credit", "first", "second"),
    [
        ("own", [1, 1, 0, 0, 0], [0, 0, 1, 1, 0]),
        ("causal", [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]),
        ("whole", [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
    ],
)
def test_credit_decides_the_tokens_and_not_the_advantages(credit, first, second):
    for sample in credit_group(group(), Rule(credit=credit), [1, 1]).samples:
        np.testing.assert_array_equal(sample.scope_KT, np.array([first, second], bool))
        np.testing.assert_allclose(np.abs(sample.advantages_KT[sample.scope_KT]), 0.5**0.5, rtol=1e-5)


def test_several_credits_of_one_reward_add_up_where_both_teach():
    slots = [[Credit("a", 0.0, Span(0, 2), 2), Credit("b", 0.0, Span(2, 4), 4)]]
    others = [[Credit("a", 1.0, Span(0, 2), 2), Credit("b", 3.0, Span(2, 4), 4)]]
    sample = credit_group(scored([slots, others], [4, 4]), Rule(credit="causal", scale="none"), [1]).samples[1]
    assert sample.advantages_KT[0].tolist() == [2.0, 2.0, 1.5, 1.5]


def test_a_credit_that_a_rollout_did_not_write_counts_as_zero_unless_credit_is_own():
    writes = [[Credit("a", 0.0, Span(0, 1), 1), Credit("b", 4.0, Span(1, 2), 2)]]
    writes_less = [[Credit("a", 0.0, Span(0, 1), 1)]]
    both = scored([writes, writes_less], [3, 3])
    causal = credit_group(both, Rule(credit="causal", scale="none"), [1]).samples
    assert [sample.advantages_KT[0].tolist() for sample in causal] == [[2.0, 2.0, 0.0], [-2.0, -2.0, -2.0]]
    own = credit_group(both, Rule(credit="own", scale="none"), [1]).samples
    assert not any(sample.advantages_KT.any() for sample in own)


def test_strata_compare_with_rollouts_whose_earlier_scores_are_equal():
    credits = [early_and_late(0.0, 0.0), early_and_late(0.0, 1.0), early_and_late(1.0, 1.0), early_and_late(1.0, 3.0)]
    strata = credit_group(scored(credits, [4] * 4), Rule(baseline="strata", scale="none"), [1, 1]).samples
    assert [sample.advantages_KT[1, 2] for sample in strata] == [-0.5, 0.5, -1.0, 1.0]
    shrunken = credit_group(scored(credits, [4] * 4), Rule(baseline="shrunken", scale="none"), [1, 1]).samples
    assert shrunken[0].advantages_KT[1, 2] == pytest.approx(-1.25 + 0.75 * 2 / 4)


def test_gdpo_standardises_each_reward_and_whitens_their_sum_over_the_step():
    groups = [group(), scored([early_and_late(0.0, 0.0), early_and_late(1.0, 9.0)], [5, 5])]
    trained = credit_groups(groups, "gdpo", [1, 1])
    advantages = np.array([sample.advantages_KT[0, 0] for g in trained for sample in g.samples])
    assert advantages[:2] == pytest.approx([0.0, 0.0], abs=1e-6)  # two rewards that contradict each other
    assert advantages.mean() == pytest.approx(0.0, abs=1e-6)
    assert advantages.std(ddof=1) == pytest.approx(1.0, rel=1e-4)
    assert all(sample.scope_KT.all() for g in trained for sample in g.samples)


def test_per_scope_takes_causal_scopes():
    sample = credit_group(group(), Rule("per_scope", credit="causal"), [1, 1]).samples[0]
    assert sample.scope_KT[0].tolist() == [True, True, True, True, False]
    assert sample.advantages_KT[0, 0] == 0.0  # the mean of both rewards is the same for both rollouts
    assert sample.advantages_KT[0, 2] == pytest.approx(0.5**0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantage": "grpo", "credit": "causal"}, "algorithm.credit=causal needs terms with scopes"),
        ({"advantage": "gdpo", "baseline": "leave_one_out"}, "read by per_reward alone"),
        ({"advantage": "per_scope", "scale": "none"}, "read by per_reward alone"),
        ({"credit": "late"}, "algorithm.credit must be one of own, causal, whole"),
    ],
)
def test_rules_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        replace(AlgorithmConfig(), **options)
