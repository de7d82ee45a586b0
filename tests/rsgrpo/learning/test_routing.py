"""Mixtures of experts: routers in float32, load, a balance loss that no packing changes, and replayed choices."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rollout.config import RolloutConfig
from rollout.families.routers import route_in_float32
from rollout.hf.engine import HFEngine
from rollout.types import Prompt, SamplingParams
from rsgrpo.cluster.engine_check import as_train_group
from rsgrpo.learning.layers.routing import Routing, expert_load, foreign_choices, response_balance
from rsgrpo.types import RsgrpoError
from tests.material.learner import INPUTS, learnt, make_conversations, make_groups, make_learner, with_experts
from tests.material.tiny_families import save_family
from tests.rollout.parity import experts_taken, forced_experts, reference_logprobs, reference_model


@pytest.fixture(scope="module")
def path(tiny_model_path, tmp_path_factory) -> str:
    return save_family("qwen3_vl_moe", tiny_model_path, tmp_path_factory.mktemp("mixture"))


NOBODY: Any = SimpleNamespace(head_index_N=torch.tensor([0]))


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
    routing = Routing({0: router})
    assert routing.metrics(NOBODY, 1) == {}
    with routing.heard():
        router(torch.eye(16)[None])
    before = routing.metrics(NOBODY, 1)
    router(torch.ones(1, 3, 16))
    assert routing.metrics(NOBODY, 1) == before
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


# Routing replay


def test_logprobs_are_those_of_a_forward_with_the_engines_choices(path, page_images):
    learner, model = make_learner(path), reference_model(path)
    groups = with_experts(learner.encoder, make_groups(page_images, [2, 0]))
    found = learner.logprobs(groups)
    own = learner.logprobs(make_groups(page_images, [2, 0]))
    for group, logprobs_G, own_G in zip(groups, found, own, strict=True):
        for sample, logprobs_T, own_T in zip(group.samples, logprobs_G, own_G, strict=True):
            with forced_experts(model, np.concatenate([group.prompt_experts_TLk, sample.experts_RLk])):
                expected = reference_logprobs(model, learner.encoder, group.prompt, sample.token_ids_T.tolist())
            np.testing.assert_allclose(logprobs_T, expected, atol=1e-5)
            assert np.abs(logprobs_T - own_T).max() > 1e-3  # routing matters in this model


@pytest.mark.parametrize("make", [make_groups, None], ids=["groups", "conversations"])
def test_packing_and_recomputed_layers_do_not_change_what_is_replayed(make, path, page_images):
    found = []
    for options in ({"gradient_checkpointing": "none"}, {"max_tokens_per_micro_batch": 200}):
        learner = make_learner(path, **options)
        groups = make_groups(page_images, [1, 0]) if make else make_conversations(learner.encoder, page_images, [1, 0])
        metrics = learnt(learner.update(with_experts(learner.encoder, groups), [1.0, 1.0]))
        metrics.pop("actor/expert_load_max")
        assert 0.3 < metrics["actor/routing_mismatch"] <= 1
        found.append((metrics, {name: tensor.clone() for name, tensor in learner.gather_weights()}))
    (one, weights), (other, again) = found
    assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, again[name], atol=5e-6, rtol=1e-4)


def test_replaying_ones_own_choices_changes_no_bit(path, page_images):
    [group] = make_groups(page_images, [1], num_samples=1)
    model, (sample,) = reference_model(path), group.samples
    learner, replaying = make_learner(path), make_learner(path)
    encoded = learner.encoder.encode(group.prompt)
    ids = torch.tensor([[*encoded.token_ids_T, *sample.token_ids_T]])
    inputs = learner.policy.family.whole_inputs(model, ids, encoded.pixel_values, encoded.image_grid_thw)
    taken, length = experts_taken(model, inputs), len(encoded.token_ids_T)
    same = replace(group, samples=(replace(sample, experts_RLk=taken[length:-1]),), prompt_experts_TLk=taken[:length])
    plain, replayed = learner.update([group], [1.0, 1.0]), replaying.update([same], [1.0, 1.0])
    assert replayed.pop("actor/routing_mismatch") == 0
    assert learnt(replayed) == learnt(plain)
    for (name, one), (_, other) in zip(learner.gather_weights(), replaying.gather_weights(), strict=True):
        assert torch.equal(one, other), name


def test_foreign_choices_by_hand():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    assert foreign_choices(logits, torch.tensor([[0, 3], [2, 1]])).tolist() == [0.5, 0.0]  # a tie is no difference


def test_experts_that_do_not_fit_are_refused(path, page_images):
    learner = make_learner(path)
    [group] = with_experts(learner.encoder, make_groups(page_images, [0], num_samples=1))
    (sample,), prompt_experts = group.samples, group.prompt_experts_TLk
    experts = sample.experts_RLk
    assert experts is not None
    assert prompt_experts is not None
    with pytest.raises(RsgrpoError, match="all but the last have experts"):
        learner.logprobs([replace(group, samples=(replace(sample, experts_RLk=experts[1:]),))])
    with pytest.raises(RsgrpoError, match=r"experts of 3 prompt tokens, but the prompt has \d+ here"):
        learner.logprobs([replace(group, prompt_experts_TLk=prompt_experts[:3])])
    fewer = (replace(sample, experts_RLk=experts[:, :2]),)
    with pytest.raises(RsgrpoError, match=r"2 experts per token in 2 layers, .* takes 2 of 8 in 3 layers"):
        learner.logprobs([replace(group, samples=fewer, prompt_experts_TLk=prompt_experts[:, :2])])


def test_a_reference_takes_its_own_experts(path, page_images):
    reference = make_learner(path, trainable=False)
    plain = make_groups(page_images, [1])
    [own_G], [replayed_G] = (reference.logprobs(each) for each in (plain, with_experts(reference.encoder, plain)))
    for own_T, replayed_T in zip(own_G, replayed_G, strict=True):
        np.testing.assert_array_equal(own_T, replayed_T)


def test_replay_removes_what_routing_adds_to_the_mismatch(path, page_images):
    """The engine's states are rounded to bfloat16, and so some of its tokens take other experts than the learner's."""
    engine = HFEngine(path, RolloutConfig(dtype="bfloat16", routing_replay=True, num_threads=1), INPUTS)
    prompts = [Prompt(f"p{page}", f"what amount is on page {page}?") for page in range(6)]
    groups = list(engine.generate(prompts, SamplingParams(group_size=8, max_tokens=12, seed=1)))
    sampled_T = np.concatenate([rollout.logprobs_T for group in groups for rollout in group.rollouts])
    learner, mismatch = make_learner(path), {}
    for replays in (False, True):
        asked = [as_train_group(group, group.prompt, replays=replays) for group in groups]
        found_T = np.concatenate([each for logprobs_G in learner.logprobs(asked) for each in logprobs_G])
        difference_T = sampled_T - found_T
        mismatch[replays] = float(np.mean(np.exp(difference_T) - difference_T - 1))  # k3, as actor/mismatch_k3
    assert mismatch[True] < 0.6 * mismatch[False]
