"""The embedded engine against transformers' own plain forward, and its laws of sampling."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from rollout.build import build_engine
from rollout.config import InputsConfig, RolloutConfig
from rollout.engine import EngineError
from rollout.hf import decoding
from rollout.hf import engine as hf_engine
from rollout.hf.engine import HFEngine
from rollout.types import Prompt, RolloutGroup, SamplingParams
from tests.material.tiny_families import save_family
from tests.rollout.engine_laws import EngineLaws
from tests.rollout.parity import assert_greedy, assert_sampled_from, reference_model

INPUTS = InputsConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
VISION = "model.visual."


@pytest.fixture(scope="module")
def model(tiny_model_path):
    return reference_model(tiny_model_path)


@pytest.fixture(scope="module")
def other_model(tiny_model_path):
    """The same architecture with other weights everywhere."""
    return reference_model(tiny_model_path, seed=7, scale=0.05)


@pytest.fixture(scope="module")
def engine(tiny_model_path):
    """For tests that leave its weights alone."""
    return HFEngine(tiny_model_path, RolloutConfig(), INPUTS)


@pytest.fixture
def own_engine(tiny_model_path):
    return HFEngine(tiny_model_path, RolloutConfig(), INPUTS)


@pytest.fixture(scope="module")
def prompts(page_images):
    """Ragged prompts of 0, 1, 2, 3 and 5 images."""
    return [
        Prompt("none", "what amount is on page 2?"),
        Prompt("one", "<image>what is the code?", (page_images[1],)),
        Prompt("two", "<image><image>what amount is on page 2? answer in one word", tuple(page_images[:2])),
        Prompt("three", "[1] <image> [2] <image> [3] <image> code?", (page_images[3], page_images[0], page_images[3])),
        Prompt("five", "<image>" * 5 + "?", tuple(page_images)),
    ]


def by_id(groups) -> dict[str, RolloutGroup]:
    return {group.prompt.id: group for group in groups}


def test_a_prompt_that_surprises_the_engine_costs_no_other_its_answer(engine, prompts, monkeypatch):
    encode = engine.processor.encode

    def surprised(prompt):
        assert prompt.id != "two", "a decoder's own check"
        return encode(prompt)

    monkeypatch.setattr(engine.processor, "encode", surprised)
    groups = by_id(engine.generate(prompts, SamplingParams(temperature=0, max_tokens=3)))
    assert [name for name, group in groups.items() if group.error] == ["two"]
    assert str(groups["two"].error).startswith("the prompt cannot be prepared: AssertionError: a decoder's own check")


class TestLaws(EngineLaws):
    """Those of every engine."""


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl", "qwen3_5"])
def test_a_model_of_another_family_samples_right(model_type, tmp_path, tiny_model_path, page_images):
    """Qwen3-VL adds features of early tower layers inside the decoder; they must reach the prefill."""
    path = save_family(model_type, tiny_model_path, tmp_path / model_type)
    engine = HFEngine(path, RolloutConfig(), InputsConfig(min_pixels=1024, max_pixels=16 * 1024))
    prompts = [Prompt("a", "<image><image>code?", tuple(page_images[:2])), Prompt("b", "no page")]
    for group in engine.generate(prompts, SamplingParams(temperature=0, max_tokens=12)):
        assert_greedy(reference_model(path), engine, group)


def test_loaded_weights_are_the_weights_that_sample(model, other_model, own_engine, prompts):
    sampling = SamplingParams(temperature=0, max_tokens=16)
    before = by_id(own_engine.generate(prompts, sampling))
    updated(own_engine, other_model.state_dict(), 3)
    groups = by_id(own_engine.generate(prompts, sampling))
    for prompt in prompts:
        assert_greedy(other_model, own_engine, groups[prompt.id])
        assert groups[prompt.id].rollouts[0].weights_version == 3
    assert groups["five"].rollouts[0].token_ids_T != before["five"].rollouts[0].token_ids_T
    assert before["five"].rollouts[0].weights_version == 0


def test_weights_come_under_the_hub_names_too(other_model, own_engine, prompts):
    hub_named = {
        name.removeprefix("model.")
        if name.startswith(VISION)
        else name.replace("model.language_model.", "model."): value
        for name, value in other_model.state_dict().items()
    }
    assert "visual.patch_embed.proj.weight" in hub_named
    assert "model.layers.0.mlp.up_proj.weight" in hub_named
    updated(own_engine, hub_named, 1)
    (group,) = own_engine.generate(prompts[-1:], SamplingParams(temperature=0, max_tokens=8))
    assert_greedy(other_model, own_engine, group)


def updated(engine, weights, version):
    """Load the weights and let the engine sample with them."""
    engine.load_weights(weights.items())
    engine.finish_weights(version)


def test_features_survive_new_weights_unless_the_tower_changed(model, other_model, own_engine, prompts):
    list(own_engine.generate(prompts, SamplingParams(max_tokens=1)))
    assert len(own_engine._features) == 5, "one per distinct image"
    text_changed = {n: w for n, w in other_model.state_dict().items() if not n.startswith(VISION)}
    updated(own_engine, text_changed, 1)
    assert len(own_engine._features) == 5
    updated(own_engine, {**model.state_dict(), **text_changed}, 2)
    assert len(own_engine._features) == 5, "the same tower arrived again"
    updated(own_engine, other_model.state_dict(), 3)
    assert not own_engine._features


def test_wrong_weights_are_named(own_engine, model, prompts):
    with pytest.raises(EngineError, match=r"no weight 'model\.layers\.0\.nonsense'"):
        own_engine.load_weights([("model.layers.0.nonsense", torch.zeros(1))])
    with pytest.raises(EngineError, match=r"lm_head\.weight has shape \(3, 5\), not \(\d+, 64\)"):
        own_engine.load_weights([("lm_head.weight", torch.zeros(3, 5))])
    own_engine.load_weights([("lm_head.weight", model.lm_head.weight)])
    with pytest.raises(EngineError, match="finish_weights was not called"):
        list(own_engine.generate(prompts, SamplingParams()))
    with pytest.raises(EngineError, match=r"version 4: .* did not arrive, such as model\.language_model\.embed_tokens"):
        own_engine.finish_weights(4)
    own_engine.load_weights(item for item in model.state_dict().items() if not item[0].startswith(VISION))
    own_engine.load_weights([("model.visual.merger.mlp.0.weight", model.model.visual.merger.mlp[0].weight)])
    with pytest.raises(EngineError, match=r"did not arrive, such as model\.visual"):
        own_engine.finish_weights(4)
    assert own_engine.weights_version == 0


def test_tied_embeddings_are_one_weight(tmp_path, tiny_model_path, model, prompts):
    tied = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32)
    tied.config.tie_word_embeddings = tied.config.text_config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copy(Path(tiny_model_path) / name, tmp_path)
    engine = HFEngine(str(tmp_path), RolloutConfig(), INPUTS)
    weights = dict(tied.state_dict())
    weights.pop("lm_head.weight", None)
    weights["model.language_model.embed_tokens.weight"] = torch.flip(
        weights["model.language_model.embed_tokens.weight"], dims=[0]
    )
    updated(engine, weights, 1)
    tied.load_state_dict(weights, strict=False)
    (group,) = engine.generate(prompts[1:2], SamplingParams(temperature=0, max_tokens=8))
    assert_greedy(tied.eval(), engine, group)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(engine, prompts):
    sampling = SamplingParams(group_size=4, max_tokens=20, seed=1)
    first = by_id(engine.generate(prompts, sampling))
    engine._features.clear()
    assert by_id(engine.generate(prompts, sampling)) == first
    other = by_id(engine.generate(prompts, replace(sampling, seed=2)))
    assert all(other[key].rollouts != group.rollouts for key, group in first.items())


def test_a_rollout_does_not_depend_on_the_batch_it_sits_in(tiny_model_path, engine, prompts):
    sampling = SamplingParams(group_size=4, max_tokens=20, seed=1)
    together = by_id(engine.generate(prompts, sampling))
    small = HFEngine(tiny_model_path, RolloutConfig(max_batch_sequences=3), INPUTS)
    for prompt in prompts:
        (alone,) = small.generate([prompt], sampling)
        for mine, theirs in zip(alone.rollouts, together[prompt.id].rollouts, strict=True):
            assert mine.token_ids_T == theirs.token_ids_T
            np.testing.assert_allclose(mine.logprobs_T, theirs.logprobs_T, atol=1e-5)


def test_finished_rows_leave_the_batch_without_touching_the_others(monkeypatch, model, own_engine, prompts):
    """With a head that likes end-of-text rows stop at many lengths; all must still equal the plain forward."""
    eos = own_engine.processor.eos_token_id
    head = model.lm_head.weight.detach().clone()
    head[eos] *= 6 / head[eos].norm()
    selected: list[int] = []
    select = decoding.SpareRoomLayer.batch_select_indices

    def spy(layer, rows):
        selected.append(len(rows))
        select(layer, rows)

    monkeypatch.setattr(decoding.SpareRoomLayer, "batch_select_indices", spy)
    weights = {**model.state_dict(), "lm_head.weight": head}
    updated(own_engine, weights, 1)
    rigged = AutoModelForImageTextToText.from_config(model.config).eval()
    rigged.load_state_dict(weights)
    sampling = SamplingParams(group_size=8, max_tokens=100, temperature=0.8)
    groups = list(own_engine.generate(prompts, sampling))
    lengths = {len(rollout.token_ids_T) for group in groups for rollout in group.rollouts}
    assert len(lengths) > 5
    assert len(set(selected)) > 1, "rows were meant to be taken out more than once"
    for group in groups:
        assert_sampled_from(rigged, own_engine, group, 0.8)
        (alone,) = own_engine.generate([group.prompt], sampling)
        assert [r.token_ids_T for r in alone.rollouts] == [r.token_ids_T for r in group.rollouts]


def test_bfloat16_stays_close_to_float32(tiny_model_path, model, prompts):
    engine = HFEngine(tiny_model_path, RolloutConfig(dtype="bfloat16"), INPUTS)
    for group in engine.generate(prompts, SamplingParams(group_size=2, max_tokens=20)):
        assert_sampled_from(model, engine, group, tolerance=0.05)


def test_several_prefill_passes_join_into_one_batch(monkeypatch, model, engine, prompts):
    monkeypatch.setattr(hf_engine, "PREFILL_TOKENS", 60)
    passes: list[Any] = []
    plain = decoding.prefill

    def spy(*args):
        passes.append(args)
        return plain(*args)

    monkeypatch.setattr(hf_engine, "prefill", spy)
    for group in engine.generate(prompts, SamplingParams(temperature=0, max_tokens=12)):
        assert_greedy(model, engine, group)
    assert len(passes) > 2


def test_vision_tokens_are_never_sampled(model, own_engine, prompts):
    banned = own_engine.processor.banned_token_ids
    head = model.lm_head.weight.detach().clone()
    bias = 50.0 * model.model.language_model.norm.weight.detach()
    rigged = AutoModelForImageTextToText.from_config(model.config).eval()
    rigged.load_state_dict(model.state_dict())
    with torch.no_grad():
        for index, token_id in enumerate(banned):
            head[token_id] = bias if index % 2 else -bias
        rigged.lm_head.weight.copy_(head)
        free = rigged(input_ids=torch.tensor([[5, 6, 7]]), position_ids=torch.arange(3).expand(3, 1, 3)).logits[0]
    assert set(free.argmax(-1).tolist()) <= set(banned), "without the ban the rigged head prefers vision tokens"
    updated(own_engine, rigged.state_dict(), 1)
    for temperature in (0.0, 1.0):
        sampling = SamplingParams(group_size=4, temperature=temperature, max_tokens=30)
        for group in own_engine.generate(prompts, sampling):
            assert not {token for rollout in group.rollouts for token in rollout.token_ids_T} & set(banned)
            assert np.isfinite([logprob for rollout in group.rollouts for logprob in rollout.logprobs_T]).all()


def test_groups_come_out_as_their_batch_is_finished(monkeypatch, tiny_model_path, prompts):
    engine = HFEngine(tiny_model_path, RolloutConfig(max_batch_sequences=4), INPUTS)
    sampled: list[list[str]] = []
    sample = engine._sample

    def spy(batch, *others):
        sampled.append([one.prompt.id for one in batch])
        return sample(batch, *others)

    monkeypatch.setattr(engine, "_sample", spy)
    stream = engine.generate(prompts, SamplingParams(group_size=2, max_tokens=2))
    assert next(stream).prompt.id == "five"
    assert sampled == [["five", "two"]], "the longest first"
    assert next(stream).prompt.id == "two"
    assert len(sampled) == 1
    assert len(list(stream)) == 3
    assert sampled == [["five", "two"], ["three", "one"], ["none"]]


def test_vllm_without_its_package_says_what_to_install(tiny_model_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r'pip install -e "\.\[gpu\]"'):
        build_engine(tiny_model_path, RolloutConfig(engine="vllm"), INPUTS)


def test_top_p_reaches_the_engine(engine, prompts):
    greedy = by_id(engine.generate(prompts, SamplingParams(temperature=0, max_tokens=10)))
    for group in engine.generate(prompts, SamplingParams(group_size=4, max_tokens=10, top_p=1e-6)):
        assert [r.token_ids_T for r in group.rollouts] == [greedy[group.prompt.id].rollouts[0].token_ids_T] * 4


def test_a_stream_that_nobody_reads_to_its_end_stops_the_sampling(engine, prompts):
    sampling = SamplingParams(group_size=1, temperature=1.0, max_tokens=5_000, seed=3)
    stream = engine.stream(prompts[1], sampling)
    next(stream)
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 5  # 5,000 tokens take far longer
    (again,) = engine.generate([prompts[1]], replace(sampling, max_tokens=4))
    assert len(again.rollouts[0].token_ids_T) <= 4


def test_a_batch_of_long_prompts_is_bounded_by_the_bytes_of_its_cache(tiny_model_path, prompts, monkeypatch):
    text = reference_model(tiny_model_path).config.get_text_config()
    width = text.hidden_size // text.num_attention_heads
    longest = len(HFEngine(tiny_model_path, RolloutConfig(), INPUTS).processor.encode(prompts[-1]).token_ids_T)
    sequence_bytes = 2 * 4 * text.num_hidden_layers * text.num_key_value_heads * width * (longest + 6)
    sizes: list[int] = []

    def counting(prefilled: decoding.Prefilled, num_siblings: int, *args: Any, **options: Any) -> Any:
        layer: Any = prefilled.cache.layers[0]
        num_rows, _, num_positions, _ = layer.keys.shape
        held = num_rows * num_siblings * 2 * 4 * text.num_hidden_layers * text.num_key_value_heads * width
        sizes.append(held * (num_positions + options["max_tokens"]))
        return decoding.decode(prefilled, num_siblings, *args, **options)

    monkeypatch.setattr(hf_engine, "decode", counting)
    for room in (3.5, 0.5):  # in the longest sequences; two siblings of five prompts
        sizes.clear()
        engine = HFEngine(tiny_model_path, RolloutConfig(max_batch_gib=room * sequence_bytes / 2**30), INPUTS)
        groups = by_id(engine.generate(prompts, SamplingParams(group_size=2, max_tokens=6, seed=1)))
        assert {prompt.id for prompt in prompts} == set(groups)
        assert all(len(group.rollouts) == 2 for group in groups.values())
        assert max(sizes) <= max(room, 1) * sequence_bytes
        assert len(sizes) == 10 if room < 1 else 2 <= len(sizes) < 10


def test_joined_parts_do_not_keep_their_own_copy(engine, prompts):
    encoded = [engine.processor.encode(prompt) for prompt in prompts[:2]]
    parts = [engine._prefill([one]) for one in encoded]
    joined = decoding.join(parts)
    layers: list[Any] = [layer for part in parts for layer in part.cache.layers]
    assert all(layer.keys.numel() == layer.values.numel() == 0 for layer in layers)
    first: Any = joined.cache.layers[0]
    assert first.keys.shape[0] == 2
