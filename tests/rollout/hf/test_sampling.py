"""The one random draw behind each sampled token: fixed by its place, right in distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout.hf.sampling import rollout_uniforms, sample_tokens


def test_draws_are_fixed_by_seed_prompt_and_index():
    draws = rollout_uniforms(3, "a", 1, 50)
    assert draws.dtype == np.float64
    assert ((draws >= 0) & (draws < 1)).all()
    np.testing.assert_array_equal(rollout_uniforms(3, "a", 1, 20), draws[:20])
    others = [
        rollout_uniforms(*key, 50) for key in [(4, "a", 1), (3, "b", 1), (3, "a", 2), (3, "1\0a", 1), (31, "a", 1)]
    ]
    assert all(abs(np.corrcoef(draws, other)[0, 1]) < 0.6 for other in others)


def test_a_draw_falls_where_the_distribution_function_says():
    logits = torch.tensor([[0.5, 0.25, 0.0, 0.25]]).log()
    tokens = {}
    for draw in (0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2**-53):
        token, logprob = sample_tokens(logits, torch.tensor([draw], dtype=torch.float64), temperature=1.0)
        tokens[draw] = int(token)
        assert logprob.item() == pytest.approx(np.log([0.5, 0.25, 0, 0.25][int(token)]))
    assert list(tokens.values()) == [0, 0, 1, 1, 3, 3]


def test_frequencies_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")])
    draws = torch.from_numpy(rollout_uniforms(0, "p", 0, 40_000))
    tokens, logprobs = sample_tokens(logits.expand(40_000, -1), draws, temperature=0.5)
    expected = torch.softmax(logits / 0.5, dim=-1)
    frequencies = torch.bincount(tokens, minlength=5) / 40_000
    torch.testing.assert_close(frequencies, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_top_p_and_top_k_cut_the_choice_but_not_the_logprob():
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    draws = torch.from_numpy(rollout_uniforms(0, "p", 0, 2_000))
    logits = probabilities.log().expand(2_000, -1)
    for top_p, top_k, kept in [(0.6, 0, {1, 3}), (1.0, 3, {1, 3, 4}), (0.39, 0, {1}), (1.0, 1, {1})]:
        tokens, logprobs = sample_tokens(logits, draws, temperature=1.0, top_p=top_p, top_k=top_k)
        assert set(tokens.tolist()) == kept, (top_p, top_k)
        torch.testing.assert_close(logprobs, probabilities.log()[tokens])
    # The nucleus is taken of what top-k left: .4 / .7 already reaches .5.
    tokens, _ = sample_tokens(logits, draws, temperature=1.0, top_k=2, top_p=0.5)
    assert set(tokens.tolist()) == {1}
