"""From scores to per-token advantages: worked by hand, against reference numbers, and what must not change them."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from rewards.api import Credit, Span
from rollout.types import Prompt, Rollout, RolloutGroup
from rsgrpo.algorithm.advantages import credit_group, term_names, term_weights
from rsgrpo.algorithm.baselines import centre, leave_one_out, standardise
from rsgrpo.types import ScoredGroup
from tests.material import DATA

REFERENCE = json.loads((DATA / "rsgrpo_loss.json").read_text())
ROOT_HALF = 0.5**0.5


def rollout(num_tokens: int) -> Rollout:
    """Tokens of one character each."""
    spans_T = [(t, t + 1) for t in range(num_tokens)]
    return Rollout([7] * num_tokens, [-0.5] * num_tokens, "x" * num_tokens, spans_T, "stop", 0)


def scored(credits_GK: Sequence[Sequence[Sequence[Credit]]], num_tokens: list[int]) -> ScoredGroup:
    names = tuple(f"r{k}" for k in range(len(credits_GK[0])))
    means = [[float(np.mean([c.score for c in cs])) if cs else None for cs in row] for row in credits_GK]
    group = RolloutGroup(Prompt("p", "q"), tuple(rollout(n) for n in num_tokens))
    credits = [[tuple(cs) for cs in row] for row in credits_GK]
    return ScoredGroup(group, names, means, credits, [[False] * len(names) for _ in num_tokens])


def one(score: float, start: int, end: int) -> list[Credit]:
    return [Credit("", score, Span(start, end))]


def test_standardising_uses_the_unbiased_std():
    assert standardise(np.array([0.0, 1.0])) == pytest.approx([-ROOT_HALF, ROOT_HALF], rel=1e-5)
    assert standardise(np.array([1.0, 2.0, 3.0])) == pytest.approx([-1.0, 0.0, 1.0], rel=1e-5)


def test_constant_groups_single_scores_and_missing_scores_teach_nothing():
    assert standardise(np.array([0.3, 0.3, 0.3])).tolist() == [0.0, 0.0, 0.0]
    assert standardise(np.array([0.7, np.nan, np.nan])).tolist() == [0.0, 0.0, 0.0]
    assert standardise(np.array([np.nan, np.nan])).tolist() == [0.0, 0.0]
    assert standardise(np.array([0.0, np.nan, 1.0]))[1] == 0.0


def test_dr_grpo_and_rloo_do_not_divide_by_the_std():
    assert centre(np.array([0.0, 4.0])).tolist() == [-2.0, 2.0]
    assert leave_one_out(np.array([0.0, 4.0])).tolist() == [-4.0, 4.0]
    assert leave_one_out(np.array([0.0, 3.0, 6.0])) == pytest.approx([-4.5, 0.0, 4.5])
    assert leave_one_out(np.array([0.0, np.nan, 4.0])).tolist() == [-4.0, 0.0, 4.0]


@pytest.mark.parametrize("case", range(len(REFERENCE)))
def test_per_reward_advantages_equal_the_reference(case):
    data = REFERENCE[case]
    scores_BK, group_B = np.array(data["rewards"]), np.array(data["group"])
    for group in set(data["group"]):
        rows = np.flatnonzero(group_B == group)
        credits_GK = [[one(score, 0, 1) for score in scores_BK[row]] for row in rows]
        result = credit_group(scored(credits_GK, [1] * len(rows)), "per_reward", [1.0] * scores_BK.shape[1])
        mine_GK = np.array([sample.advantages_KT[:, 0] for sample in result.samples])
        np.testing.assert_allclose(mine_GK, np.array(data["advantages"])[rows], rtol=1e-5, atol=1e-6)


def test_each_reward_teaches_only_its_own_tokens():
    group = scored([[one(0, 0, 2), one(1, 2, 4)], [one(1, 0, 1), one(0, 1, 4)]], [4, 4])
    first, second = credit_group(group, "per_reward", [1, 1]).samples
    assert first.scope_KT.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert first.advantages_KT[0] == pytest.approx([-ROOT_HALF, -ROOT_HALF, 0, 0], rel=1e-5)
    assert first.advantages_KT[1] == pytest.approx([0, 0, ROOT_HALF, ROOT_HALF], rel=1e-5)
    assert second.advantages_KT[0] == pytest.approx([ROOT_HALF, 0, 0, 0], rel=1e-5)
    assert second.advantages_KT[1] == pytest.approx([0, -ROOT_HALF, -ROOT_HALF, -ROOT_HALF], rel=1e-5)


def test_a_reward_that_does_not_apply_has_no_scope_and_stays_out_of_the_mean():
    group = scored([[one(0, 0, 2)], [[]], [one(1, 0, 2)]], [2, 2, 2])
    samples = credit_group(group, "per_reward", [1]).samples
    assert not samples[1].scope_KT.any()
    assert samples[0].advantages_KT[0, 0] == pytest.approx(-ROOT_HALF, rel=1e-5)


def test_a_voided_scope_counts_in_the_mean_but_teaches_nothing():
    group = scored([[one(1, 0, 2)], [[Credit("", 0.0, None)]]], [2, 2])
    samples = credit_group(group, "per_reward", [1]).samples
    assert samples[0].advantages_KT[0].tolist() == pytest.approx([ROOT_HALF] * 2, rel=1e-5)
    assert not samples[1].scope_KT.any()


def test_several_credits_are_standardised_per_key_on_their_own_spans():
    def slots(first: float, second: float) -> list[Credit]:
        return [Credit("slot1", first, Span(0, 2)), Credit("slot2", second, Span(2, 4))]

    group = scored([[slots(0, 5)], [slots(1, 5)], [[Credit("slot2", 8, Span(0, 4))]]], [4, 4, 4])
    first, second, third = credit_group(group, "per_reward", [1]).samples
    slot2 = standardise(np.array([5.0, 5.0, 8.0]))
    assert first.advantages_KT[0] == pytest.approx([-ROOT_HALF, -ROOT_HALF, slot2[0], slot2[0]], rel=1e-5)
    assert second.advantages_KT[0, 0] == pytest.approx(ROOT_HALF, rel=1e-5)
    assert third.advantages_KT[0] == pytest.approx([slot2[2]] * 4, rel=1e-5)


def test_a_token_shared_by_two_spans_of_one_reward_takes_their_mean():
    def slots(first: float, second: float) -> list[Credit]:
        return [Credit("a", first, Span(0, 2)), Credit("b", second, Span(1, 3))]

    first, _ = credit_group(scored([[slots(0, 1)], [slots(1, 0)]], [3, 3]), "per_reward", [1]).samples
    assert first.advantages_KT[0] == pytest.approx([-ROOT_HALF, 0.0, ROOT_HALF], rel=1e-5, abs=1e-7)


def test_per_scope_standardises_the_mean_score_of_tokens_with_the_same_rewards():
    # Weights 1 and 3; tokens 0-1 have reward 0 alone, 2 has both, 3 has reward 1 alone.
    group = scored([[one(0, 0, 3), one(1, 2, 4)], [one(1, 0, 3), one(1, 2, 4)]], [4, 4])
    first, second = credit_group(group, "per_scope", [1, 3]).samples
    assert first.scope_KT.tolist() == [[True] * 4]
    # Set {0}: 0 and 1. Set {0,1}: (0 + 3) / 4 and 1. Set {1}: 1 and 1, constant.
    assert first.advantages_KT[0] == pytest.approx([-ROOT_HALF, -ROOT_HALF, -ROOT_HALF, 0], rel=1e-4)
    assert second.advantages_KT[0] == pytest.approx([ROOT_HALF, ROOT_HALF, ROOT_HALF, 0], rel=1e-4)


def test_per_scope_gives_nothing_to_a_set_that_only_one_rollout_has():
    group = scored([[one(0, 0, 1), one(1, 1, 2)], [one(1, 0, 2), one(0, 1, 2)]], [2, 2])
    first, second = credit_group(group, "per_scope", [1, 1]).samples
    assert first.advantages_KT[0, 1] == 0.0
    assert first.scope_KT[0, 1]
    assert second.advantages_KT[0, 1] == 0.0


def test_grpo_puts_the_weighted_sum_on_the_whole_response():
    group = scored([[one(0, 0, 1), one(1, 1, 2)], [one(1, 0, 1), one(1, 1, 2)], [one(1, 0, 1), []]], [2, 3, 1])
    samples = credit_group(group, "grpo", [2, 1]).samples
    expected = standardise(np.array([1.0, 3.0, 2.0]))
    for sample, advantage, num_tokens in zip(samples, expected, [2, 3, 1], strict=True):
        assert sample.scope_KT.all()
        assert sample.advantages_KT.shape == (1, num_tokens)
        assert sample.advantages_KT[0] == pytest.approx([advantage] * num_tokens, rel=1e-5, abs=1e-7)


def test_loss_terms_follow_the_kind_of_advantage():
    assert term_names("per_reward", ["a", "b"]) == ("a", "b")
    assert term_weights("per_reward", [1.0, 3.0]) == (1.0, 3.0)
    assert term_names("grpo", ["a", "b"]) == ("grpo",)
    assert term_weights("per_scope", [1.0, 3.0]) == (1.0,)
