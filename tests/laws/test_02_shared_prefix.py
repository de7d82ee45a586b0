"""Law 2: a shared-prefix row gives the log-probabilities and every gradient of one plain row per response."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rollout.config import InputsConfig
from rollout.inputs.processor import InputProcessor, PromptInputs
from rollout.types import Prompt
from rsgrpo.config.train import LoraConfig, ModelConfig
from rsgrpo.learning.attention import SDPA, PrefixRow, choose_attention
from rsgrpo.learning.packing import EncodedPrompt, build_micro_batch
from rsgrpo.learning.policy import PlainRow, Policy, add_lora, load_model, scale_adapters
from rsgrpo.types import MicroBatch, PrefixLayout, RsgrpoError, Sample

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def processor(tiny_model_path) -> InputProcessor:
    return InputProcessor(tiny_model_path, InputsConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 16))


def make_policy(
    path: str, processor: InputProcessor, *, chunk: int = 1000, train_tower: bool = False, lora: int = 0
) -> Policy:
    model = load_model(ModelConfig(path=path))
    if lora:
        add_lora(model, LoraConfig(rank=lora), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, where adapters do nothing
                torch.nn.init.normal_(parameter, std=0.1)
    policy = Policy(
        model,
        banned_token_ids=processor.banned_token_ids,
        attention=SDPA,
        logits_chunk_tokens=chunk,
        frozen_tower=not train_tower,
        compute_dtype=torch.float32,
    )
    return policy.train()


def samples(lengths: Sequence[int], seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    nothing = [np.zeros((1, length)) for length in lengths]
    return [Sample(rng.integers(0, 300, len(n[0])), n.astype(bool), n.astype(np.float32)) for n in nothing]


def encoded(policy: Policy, inputs: PromptInputs) -> EncodedPrompt:
    tokens = torch.tensor(inputs.token_ids_T)
    positions = policy.family.position_ids(policy.hf, tokens[None], inputs.image_grid_thw)[:, 0]
    if inputs.pixel_values is None or inputs.image_grid_thw is None:
        return EncodedPrompt(tokens, positions)
    if policy.frozen_tower:
        features = policy.encode_images(inputs.pixel_values, inputs.image_grid_thw)
        return EncodedPrompt(tokens, positions, (features,))
    return EncodedPrompt(tokens, positions, pixel_values=inputs.pixel_values, image_grid_thw=inputs.image_grid_thw)


def weights_for(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, generator=torch.Generator().manual_seed(1))


def backward(
    policy: Policy, rows: Sequence[Any], temperature: float = 1.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return logprobs of all rows and the gradient of a fixed weighted sum of them."""
    policy.zero_grad()
    logprobs = torch.cat([policy(row, temperature, False).logprobs_N for row in rows])
    (logprobs * weights_for(len(logprobs))).sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.hf.named_parameters() if p.grad is not None}
    return logprobs.detach(), gradients


def plain_rows(groups: Sequence[tuple[PromptInputs, list[Sample]]]) -> list[PlainRow]:
    return [
        PlainRow(
            torch.tensor([*inputs.token_ids_T, *sample.token_ids_T.tolist()]),
            len(inputs.token_ids_T) + torch.arange(len(sample.token_ids_T)),
            inputs.pixel_values,
            inputs.image_grid_thw,
        )
        for inputs, group_samples in groups
        for sample in group_samples
    ]


def assert_same(one: tuple[torch.Tensor, dict[str, torch.Tensor]], other: tuple[torch.Tensor, dict[str, torch.Tensor]]):
    assert (one[0] - other[0]).abs().max() < 1e-5
    assert one[1].keys() == other[1].keys()
    assert len(one[1]) > 5
    for name, gradient in one[1].items():
        scale = gradient.norm()
        # Those of a recurrent layer's decay are sums that nearly cancel: held against the whole layer's.
        if name.endswith(("A_log", "dt_bias", "in_proj_a.weight")):
            layer = name.partition("linear_attn")[0]
            scale = torch.stack([g.norm() for other_name, g in one[1].items() if other_name.startswith(layer)]).norm()
        assert (gradient - other[1][name]).norm() <= 1e-5 * scale + 1e-9, name


def groups_of(processor: InputProcessor, images: Sequence[str], counts: Sequence[int]) -> list[Any]:
    made = []
    for index, count in enumerate(counts):
        prompt = Prompt(f"p{index}", "<image>" * count + "what amount is on page 2?", tuple(images[:count]))
        lengths = [[7, 1, 12], [3], [5, 5]][index % 3]
        made.append((processor.encode(prompt), samples(lengths, seed=index)))
    return made


def row_of(policy: Policy, groups: Sequence[tuple[PromptInputs, list[Sample]]]) -> MicroBatch:
    return build_micro_batch([(encoded(policy, inputs), group) for inputs, group in groups])


@pytest.mark.parametrize(
    ("counts", "temperature", "train_tower"),
    [
        ([1], 1.0, False),
        ([4], 1.0, False),
        ([5], 1.0, False),
        ([0], 1.0, False),
        ([2, 0, 5], 1.0, False),
        ([0, 0], 1.0, False),
        ([2], 0.7, False),
        ([3, 1], 1.0, True),
    ],
    ids=str,
)
def test_shared_equals_plain_for_ragged_responses_and_any_number_of_images(
    counts, temperature, train_tower, tiny_model_path, processor, page_images
):
    policy = make_policy(tiny_model_path, processor, train_tower=train_tower)
    groups = groups_of(processor, page_images, counts)
    shared = backward(policy, [row_of(policy, groups)], temperature)
    tower = [g for name, g in shared[1].items() if name.startswith("model.visual.patch_embed")]
    assert bool(tower) == train_tower
    assert all(gradient.norm() > 0 for gradient in tower)
    assert_same(backward(policy, plain_rows(groups), temperature), shared)


def test_lora_gradients_equal_and_the_reference_is_the_model_without_adapters(tiny_model_path, processor, page_images):
    policy = make_policy(tiny_model_path, processor, lora=4)
    groups = groups_of(processor, page_images, [2, 0])
    row = row_of(policy, groups)
    shared = backward(policy, [row])
    assert all("lora_" in name for name in shared[1])
    assert not any("visual" in name for name in shared[1])
    assert_same(backward(policy, plain_rows(groups)), shared)
    bare = make_policy(tiny_model_path, processor)
    with torch.no_grad(), scale_adapters(policy.hf, 0.0):
        without = policy(row, 1.0, False).logprobs_N
        assert torch.equal(without, bare(row, 1.0, False).logprobs_N)
    assert not torch.allclose(without, shared[0])


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_head_chunks_change_nothing(entropy_gradient, tiny_model_path, processor, page_images):
    groups = groups_of(processor, page_images, [2, 0])
    results = []
    for chunk in (1000, 4):
        policy = make_policy(tiny_model_path, processor, chunk=chunk)
        row = row_of(policy, groups)
        logprobs, entropy, *_ = policy(row, 1.0, entropy_gradient)
        assert entropy.requires_grad == entropy_gradient
        (logprobs.sum() + (0.5 * entropy.sum() if entropy_gradient else 0.0)).backward()
        gradients = {name: p.grad.clone() for name, p in policy.hf.named_parameters() if p.grad is not None}
        results.append((logprobs.detach(), gradients, entropy.detach()))
    assert_same(results[0][:2], results[1][:2])
    torch.testing.assert_close(results[0][2], results[1][2])


def test_the_entropy_is_that_of_the_distribution_without_banned_tokens(tiny_model_path, processor, page_images):
    policy = make_policy(tiny_model_path, processor).eval()
    [(inputs, group)] = groups_of(processor, page_images, [1])
    row = build_micro_batch([(encoded(policy, inputs), [group[1]])])
    with torch.no_grad():
        scores = policy(row, 2.0, False)
        tokens = row.token_ids_T[:-1][None]
        kinds = (tokens == policy.hf.config.image_token_id).int()
        policy.family.language_model(policy.hf).config._attn_implementation = "sdpa"
        logits = policy.hf(
            input_ids=tokens,
            pixel_values=inputs.pixel_values,
            image_grid_thw=inputs.image_grid_thw,
            mm_token_type_ids=kinds,
        ).logits[0, -1]
    allowed = [token for token in range(len(logits)) if token not in processor.banned_token_ids]
    distribution = torch.distributions.Categorical(logits=logits[allowed] / 2.0)
    assert scores.entropy_N.item() == pytest.approx(distribution.entropy().item(), rel=1e-5)
    assert scores.top_probs_N.item() == pytest.approx(distribution.probs.max().item(), rel=1e-5)
    target = allowed.index(int(row.targets_N[0]))
    assert scores.logprobs_N.item() == pytest.approx(distribution.log_prob(torch.tensor(target)).item(), rel=1e-5)
    assert scores.is_top_N.item() == (target == distribution.probs.argmax().item())


def test_bfloat16_is_as_far_from_float32_as_two_plain_runs_are(tiny_model_path, processor, page_images):
    exact = make_policy(tiny_model_path, processor)
    groups = groups_of(processor, page_images, [3, 0])
    rows = plain_rows(groups)
    truth = backward(exact, rows)
    rounded = make_policy(tiny_model_path, processor)
    rounded.hf.to(torch.bfloat16)
    row = row_of(rounded, groups)
    shared = backward(rounded, [row])
    plain = backward(rounded, rows)

    def gap(one: Any, other: Any) -> tuple[float, float]:
        squares = [((one[1][n].float() - other[1][n].float()) ** 2).sum() for n in one[1]]
        return float((one[0] - other[0]).abs().mean()), float(torch.stack(squares).sum().sqrt())

    noise, found = gap(plain, truth), gap(shared, truth)
    assert 0 < found[0] < 1.25 * noise[0]
    assert 0 < found[1] < 1.25 * noise[1]


def test_the_head_sees_response_tokens_only_however_long_the_prompt(tiny_model_path, processor, page_images):
    policy = make_policy(tiny_model_path, processor, chunk=8)
    widths: list[int] = []
    policy.hf.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[0]))
    groups = groups_of(processor, page_images, [5, 1])
    row = row_of(policy, groups)
    policy(row, 1.0, False)
    assert widths == [8, 8, 7]  # 20 + 3 response tokens in chunks of 8, of a row of over a hundred
    assert len(row.token_ids_T) > 100


def test_siblings_and_neighbours_do_not_see_each_other(tiny_model_path, processor, page_images):
    policy = make_policy(tiny_model_path, processor).eval()
    groups = [(encoded(policy, inputs), group) for inputs, group in groups_of(processor, page_images, [1, 2])]
    with torch.no_grad():
        before = policy(build_micro_batch(groups), 1.0, False).logprobs_N
        changed = dataclasses.replace(groups[0][1][1], token_ids_T=np.array([299]))
        groups[0][1][1] = changed
        after = policy(build_micro_batch(groups), 1.0, False).logprobs_N
    same = torch.ones(len(before), dtype=torch.bool)
    same[7] = False  # the changed response has the one token after the first response's seven
    assert torch.equal(before[same], after[same])
    assert before[7] != after[7]


def test_varlen_bounds_by_hand():
    row = PrefixRow(PrefixLayout((2, 1), ((1, 2), ())), CPU, torch.float32)
    query_bounds, key_bounds, positions, longest_query, longest_key = row.varlen
    assert row.split_lengths == [2, 1, 2, 1]
    assert query_bounds.tolist() == [0, 2, 3, 5, 6]
    assert key_bounds.tolist() == [0, 2, 5, 9, 10]
    assert positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5]
    assert (longest_query, longest_key) == (2, 4)


def test_the_attention_back_end_is_chosen_or_refused():
    assert choose_attention("auto", CPU, torch.float32) == SDPA
    with pytest.raises(RsgrpoError, match=r"learner\.attention=flash needs flash-attn"):
        choose_attention("flash", CPU, torch.bfloat16)
