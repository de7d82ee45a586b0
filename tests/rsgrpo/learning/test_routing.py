"""Mixtures of experts: routers in float32, the load of experts, and a balance loss that no packing changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rollout.families.routers import route_in_float32
from rsgrpo.learning.layers.routing import Routing, expert_load, response_balance
from tests.material.learner import learnt, make_groups, make_learner
from tests.material.tiny_families import save_family


@pytest.fixture(scope="module")
def path(tiny_model_path, tmp_path_factory) -> str:
    return save_family("qwen3_vl_moe", tiny_model_path, tmp_path_factory.mktemp("mixture"))


class Router(nn.Module):
    """Eight experts, two per token."""

    top_k, num_experts, hidden_dim = 2, 8, 16

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, hidden_states: torch.Tensor) -> Any:
        raise NotImplementedError


def test_bfloat16_states_are_routed_by_float32_logits():
    router = Router().to(torch.bfloat16)
    route_in_float32([router])
    hidden = torch.randn(500, 16, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    logits, shares, experts = router(hidden[None])
    exact = hidden.double() @ router.weight.double().T
    assert (logits.dtype, shares.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(logits.double(), exact, atol=1e-5, rtol=1e-5)
    assert torch.equal(experts, exact.topk(2).indices)
    rounded = nn.functional.linear(hidden, router.weight).topk(2).indices
    assert (rounded.sort().values != experts.sort().values).any()  # what rounding would do
    torch.testing.assert_close(shares.float().sum(-1), torch.ones(500), atol=1e-2, rtol=0)


def test_what_a_backward_pass_recomputes_is_not_heard():
    router = Router()
    route_in_float32([router])
    routing = Routing([router])
    assert routing.metrics() == {}
    with routing.heard():
        router(torch.eye(16)[None])
    before = routing.metrics()
    router(torch.ones(1, 3, 16))
    assert routing.metrics() == before
    assert 1 <= float(before["actor/expert_load_max"]) <= 4


def test_the_load_and_the_balance_of_responses_by_hand():
    experts = torch.tensor([[0], [1], [0], [0], [1]])  # the first token is a prompt's own and counts in no response
    assert expert_load(experts, 2).tolist() == pytest.approx([1.2, 0.8])
    logits = torch.tensor([[0.0, 9.0], [0.0, 0.0], [0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    batch: Any = SimpleNamespace(head_index_N=torch.tensor([1, 2, 3, 4]), sample_index_N=torch.tensor([0, 0, 1, 1]))
    # Response 0: f = (1/2, 1/2), p = (1/2, 1/2): 2 (1/4 + 1/4) = 1. Response 1: the same by symmetry.
    assert float(response_balance(logits, experts, batch)) == pytest.approx(2.0)
    batch.sample_index_N = torch.tensor([0, 0, 0, 1])
    # Response 0: f = (2/3, 1/3), p_0 = (1/2 + 1/2 + s) / 3 with s = sigmoid(3). Response 1: f = (0, 1), p_1 = s.
    s = torch.sigmoid(torch.tensor(3.0)).item()
    first = (1 + s) / 3
    assert float(response_balance(logits, experts, batch)) == pytest.approx(
        2 * (2 / 3 * first + 1 / 3 * (1 - first)) + 2 * s
    )


@pytest.mark.parametrize("coef", [0.0, 0.5])
def test_micro_batches_change_neither_the_gradient_nor_the_balance(coef, path, page_images):
    """Law 1 for mixtures: no capacity, and the balance is within each response."""
    found = []
    for max_tokens in (4096, 130):
        learner = make_learner(path, balance_coef=coef, max_tokens_per_micro_batch=max_tokens)
        metrics = learnt(learner.update(make_groups(page_images, [1, 0, 2]), [1.0, 1.0]))
        assert 1 <= metrics.pop("actor/expert_load_max") <= 4
        found.append((metrics, {name: tensor.clone() for name, tensor in learner.gather_weights()}))
    (one, weights), (other, again) = found
    assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, again[name], atol=2e-6, rtol=1e-4)


def test_the_balance_loss_evens_the_experts():
    router = Router()
    route_in_float32([router])
    hidden = torch.randn(200, 16, generator=torch.Generator().manual_seed(1)) + 1.0  # all lean to the same experts
    batch: Any = SimpleNamespace(head_index_N=torch.arange(200), sample_index_N=torch.arange(200) // 50)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.05)
    loads = []
    for _ in range(100):
        logits, _, experts = router(hidden)
        loads.append(float(expert_load(experts, 8).max()))
        optimizer.zero_grad()
        response_balance(logits, experts, batch).backward()
        optimizer.step()
    assert loads[0] > 2
    assert loads[-1] < 0.75 * loads[0]


def test_the_learner_adds_it_to_its_loss(path, page_images):
    weights = []
    for coef in (0.0, 5.0):
        learner = make_learner(path, balance_coef=coef)
        learner.update(make_groups(page_images, [0]), [1.0, 1.0])
        weights.append({name: tensor.clone() for name, tensor in learner.gather_weights() if "mlp.gate" in name})
    assert len(weights[0]) == 3
    assert all((weights[0][name] - weights[1][name]).abs().max() > 1e-4 for name in weights[0])
