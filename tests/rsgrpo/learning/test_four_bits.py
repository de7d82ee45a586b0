"""QLoRA: adapters over a base in 4 bits. What needs bitsandbytes is skipped where that is not installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rollout.config import InputsConfig
from rollout.inputs.processor import InputProcessor
from rsgrpo.config.train import LoraConfig, ModelConfig
from rsgrpo.errors import ConfigError, RsgrpoError
from rsgrpo.learning.attention import SDPA
from rsgrpo.learning.export import full_weights
from rsgrpo.learning.layers.four_bits import FourBitLinear, pack_base, require_packing
from rsgrpo.learning.policy import Policy, add_lora, load_model
from tests.laws.test_02_shared_prefix import assert_same, backward, groups_of, plain_rows, row_of
from tests.material.learner import make_learner

CPU = torch.device("cpu")


@pytest.fixture
def _bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def test_it_is_refused_without_cuda_or_over_several_ranks(tiny_model_path):
    with pytest.raises(RsgrpoError, match=r"needs CUDA and learner.num_ranks=1, but the device is cpu .*base_bits=16"):
        make_learner(tiny_model_path, lora=LoraConfig(rank=2, base_bits=4))
    with pytest.raises(RsgrpoError, match=r"learner\.num_ranks is 2"):
        require_packing(torch.device("cuda"), 2)


def test_a_base_in_four_bits_needs_adapters():
    with pytest.raises(ConfigError, match=r"Set model\.lora\.rank > 0"):
        LoraConfig(base_bits=4)
    with pytest.raises(ConfigError, match="must be 16 or 4, got 8"):
        LoraConfig(rank=2, base_bits=8)


@pytest.mark.usefixtures("_bitsandbytes")
def test_weights_that_are_codes_are_kept_and_others_to_half_a_step():
    linear = nn.Linear(64, 2)
    with torch.no_grad():  # a block of 64 is scaled by its largest value; 0, 1 and -1 are codes of NF4
        linear.weight.copy_(torch.tensor([3.0, -3.0, 0.0, 0.0]).repeat(32).reshape(2, 64))
    packed = FourBitLinear(linear, CPU)
    assert torch.equal(packed.weight, linear.weight)
    assert packed.packed.nbytes == 64
    hidden = torch.randn(5, 64, requires_grad=True)
    torch.testing.assert_close(packed(hidden), linear(hidden))
    packed(hidden).sum().backward()
    torch.testing.assert_close(hidden.grad, linear.weight.sum(0).expand(5, -1))
    rough = nn.Linear(640, 30)
    error = (FourBitLinear(rough, CPU).weight - rough.weight).abs().max() / rough.weight.abs().max()
    assert 0.02 < error < 0.16  # the widest gap between two codes is 0.3


@pytest.mark.usefixtures("_bitsandbytes")
def test_the_shared_row_is_exact_over_a_packed_base_and_an_export_holds_what_was_trained(tiny_model_path, page_images):
    processor = InputProcessor(tiny_model_path, InputsConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 16))
    model = load_model(ModelConfig(path=tiny_model_path))
    names = {name for name, _ in model.named_parameters()}
    add_lora(model, LoraConfig(rank=4), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    pack_base(model, CPU)
    policy = Policy(
        model,
        banned_token_ids=processor.banned_token_ids,
        attention=SDPA,
        logits_chunk_tokens=1000,
        frozen_tower=True,
        compute_dtype=torch.float32,
    ).train()
    groups = groups_of(processor, page_images, [2, 0])
    shared = backward(policy, [row_of(policy, groups)])
    assert_same(backward(policy, plain_rows(groups)), shared)

    weights = {name: tensor.clone() for name, tensor in full_weights(policy, with_vision=True)}
    assert set(weights) == names
    merged = load_model(ModelConfig(path=tiny_model_path))
    merged.load_state_dict(weights)
    plain = Policy(
        merged,
        banned_token_ids=processor.banned_token_ids,
        attention=SDPA,
        logits_chunk_tokens=1000,
        frozen_tower=True,
        compute_dtype=torch.float32,
    )
    with torch.no_grad():
        torch.testing.assert_close(plain(row_of(plain, groups), 1.0, False).logprobs_N, shared[0], atol=1e-4, rtol=0)
