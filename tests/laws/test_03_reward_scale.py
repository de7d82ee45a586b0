"""Law 3: in `per_reward`, the scale of a reward does not change the update; its weight does."""

from __future__ import annotations

import numpy as np
import pytest

from rsgrpo.algorithm.advantages import credit_group, term_weights
from tests.rsgrpo.algorithm.test_advantages import one, scored


def test_scaling_a_reward_does_not_change_per_reward_advantages():
    rng = np.random.default_rng(0)
    scores_GK = rng.random((8, 2))
    for scale in (1.0, 3.0, 1000.0):
        credits = [[one(a, 0, 3), one(b * scale, 1, 4)] for a, b in scores_GK]
        result = credit_group(scored(credits, [4] * 8), "per_reward", [1, 1])
        advantages = np.array([sample.advantages_KT for sample in result.samples])
        if scale == 1.0:
            reference = advantages
        np.testing.assert_allclose(advantages, reference, rtol=2e-5)


def test_the_weight_of_a_reward_is_that_of_its_loss_term():
    credits = [[one(0.0, 0, 3), one(1.0, 1, 4)], [one(1.0, 0, 3), one(0.0, 1, 4)]]
    plain, weighted = (credit_group(scored(credits, [4, 4]), "per_reward", weights) for weights in ([1, 1], [1, 3]))
    for mine, other in zip(plain.samples, weighted.samples, strict=True):
        np.testing.assert_array_equal(mine.advantages_KT, other.advantages_KT)
    assert term_weights("per_reward", [1, 3]) == (1, 3)
    baseline = credit_group(scored(credits, [4, 4]), "grpo", [1, 3]).samples[0].advantages_KT
    assert baseline[0, 0] == pytest.approx(0.5**0.5, rel=1e-5)  # 0 + 3 against 1 + 0: the weights are in the sum
