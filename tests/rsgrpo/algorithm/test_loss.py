"""The scoped loss: worked by hand, against reference numbers, and what must not change it."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from rsgrpo.algorithm.loss import (
    SurrogateConfig,
    cispo_surrogate,
    clipped_surrogate,
    importance_weights,
    kl_estimate,
    mismatch,
    policy_loss,
    sequence_log_ratio,
    step_totals,
    supervised_loss,
    token_log_ratio,
    token_metrics,
)
from rsgrpo.types import LossOutput, MicroBatch, RsgrpoError, Sample, StepTotals, TokenScores
from tests.material import DATA

REFERENCE = json.loads((DATA / "rsgrpo_loss.json").read_text())


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "clipped"),
    [
        (1.0, 2.0, 3.0, -2.0, False),
        (1.5, 1.0, 3.0, -1.28, True),  # a good token is pushed up no further than 1.28
        (0.5, 1.0, 3.0, -0.5, False),
        (0.5, -1.0, 3.0, 0.8, True),  # a bad token is pushed down no further than 0.8
        (1.5, -1.0, 3.0, 1.5, False),
        (5.0, -2.0, 3.0, 6.0, True),  # and costs no more than three times its advantage
        (5.0, -2.0, 0.0, 10.0, False),  # unless the dual clip is off
    ],
)
def test_the_clipped_surrogate_by_hand(ratio, advantage, dual_clip, loss, clipped):
    found_KN, clipped_KN = clipped_surrogate(
        torch.tensor([ratio]).log(), torch.tensor([[advantage]]), clip_low=0.2, clip_high=0.28, dual_clip=dual_clip
    )
    assert found_KN.item() == pytest.approx(loss, rel=1e-6)
    assert clipped_KN.item() == clipped


def test_log_ratios_are_clamped_at_twenty():
    assert token_log_ratio(torch.tensor([0.0, -90.0]), torch.tensor([-50.0, 0.0])).tolist() == [20.0, -20.0]


def test_gspo_gives_every_token_its_response_mean():
    new, old = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 0.0, 4.0])
    assert sequence_log_ratio(new, old, torch.tensor([0, 0, 1])).tolist() == [2.0, 2.0, 1.0]


def test_cispo_weighs_logprobs_by_a_clipped_ratio_without_gradient():
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss, clipped = cispo_surrogate(
        torch.tensor([2.0, 0.1]).log(), logprobs, torch.tensor([[3.0, 3.0]]), clip_high=0.28
    )
    loss.sum().backward()
    assert clipped.tolist() == [[True, False]]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-1.28 * 3, -0.1 * 3])


def test_importance_weights_are_capped_and_detached():
    old = torch.tensor([-1.0, -1.0], requires_grad=True)
    weights = importance_weights(old, torch.tensor([-1.0, -9.0]), cap=2.0)
    assert weights.tolist() == [1.0, 2.0]
    assert not weights.requires_grad


def test_kl_estimators_by_hand():
    new, ref = torch.tensor([-1.0]), torch.tensor([-3.0])
    assert kl_estimate(new, ref, "k1").item() == 2.0
    assert kl_estimate(new, ref, "k2").item() == 2.0
    assert kl_estimate(new, ref, "k3").item() == pytest.approx(math.exp(-2) + 1)


@pytest.mark.parametrize(("key", "value"), [("ratio", "ppo"), ("kl_estimator", "k4")])
def test_kinds_that_the_loss_does_not_know_are_refused(key, value):
    with pytest.raises(RsgrpoError, match=rf"algorithm\.{key} must be one of .*, got '{value}'"):
        SurrogateConfig(**{key: value})


def test_mismatch_reports_shares_and_a_maximum():
    metrics = mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.5]), response_tokens=4)
    assert metrics["actor/mismatch_mean"].item() == pytest.approx(0.125)
    assert metrics["actor/mismatch_max"].item() == pytest.approx(0.5)
    assert metrics["actor/mismatch_k3"].item() == pytest.approx((math.exp(0.5) - 0.5 - 1) / 4)


def scores_of(logprobs_N: torch.Tensor, entropy: float = 0.0) -> TokenScores:
    entropy_N = torch.full_like(logprobs_N, entropy)
    return TokenScores(logprobs_N, entropy_N, logprobs_N.detach().exp(), torch.zeros_like(logprobs_N, dtype=torch.bool))


def test_supervised_loss_divides_by_the_whole_step():
    output = supervised_loss(scores_of(torch.tensor([-1.0, -3.0]), 0.5), response_tokens=8)
    assert output.loss.item() == output.metrics["actor/loss"].item() == 0.5
    assert output.metrics["actor/entropy"].item() == 0.125


def test_token_metrics_are_shares_of_means_over_the_whole_step():
    scores = TokenScores(
        torch.tensor([-1.0, -3.0]), torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75]), torch.tensor([True, False])
    )
    metrics = token_metrics(scores, response_tokens=8)
    assert {key: value.item() for key, value in metrics.items()} == {
        "actor/entropy": 0.125,
        "actor/top1_prob": 0.125,
        "actor/top1_frac": 0.125,
    }


def sample(scope_KT: list[list[int]], advantages_K: list[float]) -> Sample:
    scope = np.array(scope_KT, dtype=bool)
    advantages = np.where(scope, np.array(advantages_K)[:, None], 0.0).astype(np.float32)
    return Sample(np.arange(scope.shape[1]), scope, advantages)


def test_totals_count_scopes_and_name_the_active_terms():
    totals = step_totals([sample([[1, 1, 0], [0, 0, 1]], [0.0, 2.0]), sample([[1, 0], [0, 0]], [0.0, 1.0])], [1, 3])
    assert totals.loss_weights_K.tolist() == [1.0, 3.0]
    assert totals.scope_tokens_K.tolist() == [3.0, 1.0]
    assert totals.active_K.tolist() == [False, True]
    assert totals.response_tokens == 5


ADVANTAGES = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, -2.0, -2.0, 4.0]], dtype=torch.float64)
SCOPE = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
TOTALS = StepTotals(
    loss_weights_K=torch.tensor([1.0, 3.0], dtype=torch.float64),
    scope_tokens_K=torch.tensor([2.0, 3.0], dtype=torch.float64),
    active_K=torch.tensor([True, True]),
    response_tokens=4,
)


def batch_of(**tensors: Any) -> MicroBatch:
    return MicroBatch(**{**dict.fromkeys(MicroBatch.__dataclass_fields__), **tensors})


def losses(
    logprobs: torch.Tensor, tensors: dict[str, Any] | None = None, totals: StepTotals = TOTALS, **config: Any
) -> LossOutput:
    """Loss of four tokens of two responses under two terms, but for what is given."""
    batch = {"advantages_KN": ADVANTAGES, "scope_KN": SCOPE, "sample_index_N": torch.tensor([0, 0, 1, 1])}
    return policy_loss(
        scores_of(logprobs), batch_of(**batch | (tensors or {})), totals=totals, config=SurrogateConfig(**config)
    )


def test_an_on_policy_loss_by_hand():
    logprobs = torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True)
    output = losses(logprobs)
    output.loss.backward()
    # Term 0: -(1 + 1)/2 = -1; term 1: -(-2 - 2 + 4)/3 = 0; weighted mean (1·-1 + 3·0)/4.
    assert output.loss.item() == pytest.approx(-0.25, abs=1e-8)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-1 / 8, -1 / 8 + 2 / 4, 2 / 4, -4 / 4], abs=1e-8)


def test_a_term_that_is_not_active_leaves_the_weighted_mean():
    logprobs = torch.full((4,), -1.0, dtype=torch.float64)
    advantages = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0] * 4], dtype=torch.float64)
    totals = dataclasses.replace(TOTALS, active_K=torch.tensor([True, False]))
    assert losses(logprobs, {"advantages_KN": advantages}, totals).loss.item() == pytest.approx(-1.0, abs=1e-8)


def test_kl_and_entropy_are_means_over_response_tokens():
    logprobs = torch.full((4,), -1.0, dtype=torch.float64)
    plain = losses(logprobs).loss
    with_kl = losses(logprobs, {"ref_logprobs_N": logprobs - 2}, kl_coef=0.5, kl_estimator="k1")
    assert (with_kl.loss - plain).item() == pytest.approx(0.5 * 2)
    assert with_kl.metrics["actor/kl"].item() == pytest.approx(2.0)
    config = SurrogateConfig(entropy_coef=0.1)
    batch = batch_of(advantages_KN=ADVANTAGES, scope_KN=SCOPE, sample_index_N=torch.tensor([0, 0, 1, 1]))
    with_bonus = policy_loss(scores_of(logprobs, 2.0), batch, totals=TOTALS, config=config)
    assert (with_bonus.loss - plain).item() == pytest.approx(-0.1 * 2.0)


def test_missing_logprobs_are_named():
    logprobs = torch.full((4,), -1.0, dtype=torch.float64)
    with pytest.raises(RsgrpoError, match="kl_coef > 0 needs reference logprobs"):
        losses(logprobs, kl_coef=0.1)
    with pytest.raises(RsgrpoError, match="importance_cap > 0 needs the engine's logprobs"):
        losses(logprobs, importance_cap=2.0)


@pytest.mark.parametrize("ratio", ["token", "gspo", "cispo"])
def test_shares_of_a_split_add_up_to_the_whole(ratio):
    generator = torch.Generator().manual_seed(0)
    names = ("old_logprobs_N", "rollout_logprobs_N", "ref_logprobs_N")
    new, *others = (torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(4))
    tensors = dict(zip(names, others, strict=True))
    config: dict[str, Any] = {"ratio": ratio, "kl_coef": 0.1, "importance_cap": 2.0}
    whole = losses(new, tensors, **config)
    parts = [
        losses(
            new[part],
            {
                **{name: tensor[part] for name, tensor in tensors.items()},
                "advantages_KN": ADVANTAGES[:, part],
                "scope_KN": SCOPE[:, part],
                "sample_index_N": torch.zeros(2, dtype=torch.int64),
            },
            **config,
        )
        for part in (slice(0, 2), slice(2, 4))
    ]
    for key, value in whole.metrics.items():
        shares = torch.stack([part.metrics[key] for part in parts])
        total = shares.max() if key.endswith("_max") else shares.sum()
        assert total.item() == pytest.approx(value.item(), rel=1e-12, abs=1e-12), key


@pytest.mark.parametrize("case", REFERENCE, ids=range(len(REFERENCE)))
def test_loss_and_gradient_equal_the_published_code(case):
    kept_BT = torch.tensor(case["response_mask"]).bool()
    scope_KN = torch.tensor(case["scope_masks"]).bool().permute(1, 0, 2)[:, kept_BT]
    advantages_KB = torch.tensor(case["advantages"], dtype=torch.float64).T
    advantages_KN = advantages_KB[:, :, None].expand(-1, -1, kept_BT.shape[1])[:, kept_BT]
    logprobs_BT = torch.tensor(case["log_probs"], dtype=torch.float64, requires_grad=True)
    totals = StepTotals(
        loss_weights_K=torch.ones(len(scope_KN), dtype=torch.float64),
        scope_tokens_K=scope_KN.sum(1).double(),
        active_K=((advantages_KN != 0) & scope_KN).any(1),
        response_tokens=int(kept_BT.sum()),
    )
    tensors = {
        "old_logprobs_N": torch.tensor(case["old_log_probs"], dtype=torch.float64)[kept_BT],
        "advantages_KN": advantages_KN * scope_KN,
        "scope_KN": scope_KN,
        "sample_index_N": torch.arange(len(kept_BT)).repeat_interleave(kept_BT.sum(1)),
    }
    clips = {"clip_low": case["clip_low"], "clip_high": case["clip_high"], "dual_clip": case["clip_dual"]}
    output = losses(logprobs_BT[kept_BT], tensors, totals, **clips)
    output.loss.backward()
    assert int(totals.active_K.sum()) == case["active"]
    assert output.loss.item() == pytest.approx(case["loss"], rel=1e-9)
    torch.testing.assert_close(logprobs_BT.grad, torch.tensor(case["grad"], dtype=torch.float64), rtol=1e-7, atol=1e-12)
