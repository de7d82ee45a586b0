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
from rollout.types import Prompt, Rollout, RolloutGroup, SamplingParams
from tests.material.parity import assert_greedy, assert_sampled_from, reference_model

INPUTS = InputsConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
VISION = "model.visual."


@pytest.fixture(scope="module")
def model(tiny_model_path):
    return reference_model(tiny_model_path)


@pytest.fixture(scope="module")
def other_model(tiny_model_path):
    """The same architecture with other weights everywhere."""
    return reference_model(tiny_model_path, seed=7, scale=0.05)


@pytest.fixture
def engine(tiny_model_path):
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


def test_greedy_tokens_and_logprobs_equal_a_plain_forward(model, engine, prompts):
    groups = by_id(engine.generate(prompts, SamplingParams(temperature=0, max_tokens=24)))
    assert len({group.num_prompt_tokens for group in groups.values()}) == len(prompts), (
        "the batch is meant to be ragged"
    )
    for prompt in prompts:
        assert groups[prompt.id].num_prompt_tokens == engine.processor.count_tokens(prompt)
        assert_greedy(model, engine, groups[prompt.id])


def test_a_model_of_another_family_samples_right(tmp_path, tiny_model_path, page_images):
    """Qwen3-VL adds features of early tower layers inside the decoder; they must reach the prefill."""
    from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    token_id = tokenizer.convert_tokens_to_ids
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10_000.0, "mrope_interleaved": True}
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "rope_parameters": rope}
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    levels = {"patch_size": 16, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    tokens = ("image", "video", "vision_start", "vision_end")
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    special: dict[str, Any] = {f"{k}_token_id": token_id(name) for k, name in zip(tokens, names, strict=True)}
    config = Qwen3VLConfig(
        text_config={**text, **heads, "initializer_range": 0.2},
        vision_config={**vision, **levels, "initializer_range": 0.2},
        **special,
    )
    qwen3 = Qwen3VLForConditionalGeneration(config).eval()
    qwen3.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=32 * 32 * 16).save_pretrained(tmp_path)
    engine = HFEngine(str(tmp_path), RolloutConfig(), InputsConfig(min_pixels=1024, max_pixels=16 * 1024))
    prompts = [Prompt("a", "<image><image>code?", tuple(page_images[:2])), Prompt("b", "no page")]
    for group in engine.generate(prompts, SamplingParams(temperature=0, max_tokens=12)):
        assert_greedy(qwen3, engine, group)


def test_loaded_weights_are_the_weights_that_sample(model, other_model, engine, prompts):
    sampling = SamplingParams(temperature=0, max_tokens=16)
    before = by_id(engine.generate(prompts, sampling))
    engine.load_weights(other_model.state_dict().items())
    engine.finish_weights(3)
    groups = by_id(engine.generate(prompts, sampling))
    for prompt in prompts:
        assert_greedy(other_model, engine, groups[prompt.id])
        assert groups[prompt.id].rollouts[0].weights_version == 3
    assert groups["five"].rollouts[0].token_ids_T != before["five"].rollouts[0].token_ids_T
    assert before["five"].rollouts[0].weights_version == 0


def test_weights_come_under_the_hub_names_too(other_model, engine, prompts):
    hub_named = {
        name.removeprefix("model.")
        if name.startswith(VISION)
        else name.replace("model.language_model.", "model."): value
        for name, value in other_model.state_dict().items()
    }
    assert "visual.patch_embed.proj.weight" in hub_named
    assert "model.layers.0.mlp.up_proj.weight" in hub_named
    engine.load_weights(hub_named.items())
    engine.finish_weights(1)
    (group,) = engine.generate(prompts[-1:], SamplingParams(temperature=0, max_tokens=8))
    assert_greedy(other_model, engine, group)


def test_features_survive_new_weights_unless_the_tower_changed(model, other_model, engine, prompts):
    list(engine.generate(prompts, SamplingParams(max_tokens=1)))
    assert len(engine._features) == 5, "one per distinct image"
    text_changed = {n: w for n, w in other_model.state_dict().items() if not n.startswith(VISION)}
    engine.load_weights(text_changed.items())
    engine.finish_weights(1)
    assert len(engine._features) == 5
    engine.load_weights({**model.state_dict(), **text_changed}.items())
    engine.finish_weights(2)
    assert len(engine._features) == 5, "the same tower arrived again"
    engine.load_weights(other_model.state_dict().items())
    engine.finish_weights(3)
    assert not engine._features


def test_wrong_weights_are_named(engine, model, prompts):
    with pytest.raises(EngineError, match=r"no weight 'model\.layers\.0\.nonsense'"):
        engine.load_weights([("model.layers.0.nonsense", torch.zeros(1))])
    with pytest.raises(EngineError, match=r"lm_head\.weight has shape \(3, 5\), not \(\d+, 64\)"):
        engine.load_weights([("lm_head.weight", torch.zeros(3, 5))])
    engine.load_weights([("lm_head.weight", model.lm_head.weight)])
    with pytest.raises(EngineError, match="finish_weights was not called"):
        list(engine.generate(prompts, SamplingParams()))
    with pytest.raises(EngineError, match=r"version 4: .* did not arrive, such as model\.language_model\.embed_tokens"):
        engine.finish_weights(4)
    engine.load_weights(item for item in model.state_dict().items() if not item[0].startswith(VISION))
    engine.load_weights([("model.visual.merger.mlp.0.weight", model.model.visual.merger.mlp[0].weight)])
    with pytest.raises(EngineError, match=r"did not arrive, such as model\.visual"):
        engine.finish_weights(4)
    assert engine.weights_version == 0


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
    engine.load_weights(weights.items())
    engine.finish_weights(1)
    tied.load_state_dict(weights, strict=False)
    (group,) = engine.generate(prompts[1:2], SamplingParams(temperature=0, max_tokens=8))
    assert_greedy(tied.eval(), engine, group)


def test_sampled_logprobs_equal_teacher_forced_ones(model, engine, prompts):
    sampling = SamplingParams(group_size=3, temperature=0.7, max_tokens=40, seed=5)
    for group in engine.generate(prompts, sampling):
        assert len(group.rollouts) == 3
        assert len({tuple(rollout.token_ids_T) for rollout in group.rollouts}) == 3
        assert_sampled_from(model, engine, group, 0.7)


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


def test_finished_rows_leave_the_batch_without_touching_the_others(monkeypatch, model, engine, prompts):
    """With a head that likes end-of-text rows stop at many lengths; all must still equal the plain forward."""
    eos = engine.processor.eos_token_id
    head = model.lm_head.weight.detach().clone()
    head[eos] *= 6 / head[eos].norm()
    selected: list[int] = []
    select = decoding.SpareRoomLayer.batch_select_indices

    def spy(layer, rows):
        selected.append(len(rows))
        select(layer, rows)

    monkeypatch.setattr(decoding.SpareRoomLayer, "batch_select_indices", spy)
    weights = {**model.state_dict(), "lm_head.weight": head}
    engine.load_weights(weights.items())
    engine.finish_weights(1)
    rigged = AutoModelForImageTextToText.from_config(model.config).eval()
    rigged.load_state_dict(weights)
    sampling = SamplingParams(group_size=8, max_tokens=100, temperature=0.8)
    groups = list(engine.generate(prompts, sampling))
    lengths = {len(rollout.token_ids_T) for group in groups for rollout in group.rollouts}
    assert len(lengths) > 5
    assert len(set(selected)) > 1, "rows were meant to be taken out more than once"
    for group in groups:
        for rollout in group.rollouts:
            stopped = rollout.token_ids_T[-1] == eos
            assert (rollout.finish_reason == "stop") == stopped
            assert stopped or len(rollout.token_ids_T) == 100
            assert eos not in rollout.token_ids_T[:-1]
            assert len(rollout.token_spans_T) == len(rollout.logprobs_T) == len(rollout.token_ids_T)
        assert_sampled_from(rigged, engine, group, 0.8)
        (alone,) = engine.generate([group.prompt], sampling)
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


def test_vision_tokens_are_never_sampled(model, engine, prompts):
    banned = engine.processor.banned_token_ids
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
    engine.load_weights(rigged.state_dict().items())
    engine.finish_weights(1)
    for temperature in (0.0, 1.0):
        sampling = SamplingParams(group_size=4, temperature=temperature, max_tokens=30)
        for group in engine.generate(prompts, sampling):
            assert not {token for rollout in group.rollouts for token in rollout.token_ids_T} & set(banned)
            assert np.isfinite([logprob for rollout in group.rollouts for logprob in rollout.logprobs_T]).all()


def test_a_bad_prompt_fails_alone(engine, prompts, page_images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    bad = [
        Prompt("unreadable", "<image>?", (str(broken),)),
        Prompt("too-many", "<image>" * 6, (*page_images, page_images[0])),
        Prompt("too-few", "<image><image>?", (page_images[0],)),
    ]
    groups = by_id(engine.generate([bad[0], *prompts[:2], *bad[1:]], SamplingParams(group_size=2, max_tokens=4)))
    assert set(groups) == {"unreadable", "too-many", "too-few", "none", "one"}
    for prompt in bad:
        assert groups[prompt.id].rollouts == ()
        assert groups[prompt.id].error
    assert "broken.png" in str(groups["unreadable"].error)
    for prompt in prompts[:2]:
        assert groups[prompt.id].error is None
        assert [rollout.finish_reason for rollout in groups[prompt.id].rollouts] == ["length", "length"]


def test_groups_come_out_as_their_batch_is_finished(monkeypatch, tiny_model_path, prompts):
    engine = HFEngine(tiny_model_path, RolloutConfig(max_batch_sequences=4), INPUTS)
    sampled: list[list[str]] = []
    sample = engine._sample

    def spy(batch, siblings, sampling):
        sampled.append([prompt.id for prompt, _ in batch])
        return sample(batch, siblings, sampling)

    monkeypatch.setattr(engine, "_sample", spy)
    stream = engine.generate(prompts, SamplingParams(group_size=2, max_tokens=2))
    assert next(stream).prompt.id == "five"
    assert sampled == [["five", "two"]], "the longest first"
    assert next(stream).prompt.id == "two"
    assert len(sampled) == 1
    assert len(list(stream)) == 3
    assert sampled == [["five", "two"], ["three", "one"], ["none"]]


def test_the_text_and_its_spans_belong_to_the_tokens(engine, prompts):
    for group in engine.generate(prompts[:2], SamplingParams(group_size=4, max_tokens=30)):
        for rollout in group.rollouts:
            assert isinstance(rollout, Rollout)
            assert (rollout.text, rollout.token_spans_T) == engine.processor.decode(rollout.token_ids_T)


def test_impossible_sampling_is_refused(engine, prompts):
    with pytest.raises(EngineError, match="top_p must be in"):
        next(engine.generate(prompts, SamplingParams(top_p=0.0)))
    with pytest.raises(EngineError, match="max_tokens must be >= 1, got 0"):
        next(engine.generate(prompts, SamplingParams(max_tokens=0)))


def test_vllm_without_its_package_says_what_to_install(tiny_model_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install -e \.\[gpu\]"):
        build_engine(tiny_model_path, RolloutConfig(engine="vllm"), INPUTS)


def test_top_p_reaches_the_engine(engine, prompts):
    sampling = SamplingParams(group_size=4, max_tokens=10, top_p=1e-6)
    greedy = by_id(engine.generate(prompts, SamplingParams(temperature=0, max_tokens=10)))
    for group in engine.generate(prompts, sampling):
        for rollout in group.rollouts:
            assert rollout.token_ids_T == greedy[group.prompt.id].rollouts[0].token_ids_T


def test_a_stream_tells_the_text_in_pieces_and_ends_with_the_same_group(engine, prompts):
    sampling = SamplingParams(group_size=1, temperature=1.0, max_tokens=12, seed=3)
    *pieces, group = list(engine.stream(prompts[1], sampling))
    assert len(pieces) > 1
    (whole,) = engine.generate([prompts[1]], sampling)
    assert group.rollouts == whole.rollouts
    assert whole.rollouts[0].text.startswith("".join(pieces))


def test_a_stream_that_nobody_reads_to_its_end_stops_the_sampling(engine, prompts):
    sampling = SamplingParams(group_size=1, temperature=1.0, max_tokens=5_000, seed=3)
    stream = engine.stream(prompts[1], sampling)
    next(stream)
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 5  # 5,000 tokens take far longer
    (again,) = engine.generate([prompts[1]], replace(sampling, max_tokens=4))
    assert len(again.rollouts[0].token_ids_T) <= 4


def test_a_stream_of_a_prompt_that_cannot_be_sampled_ends_with_its_error(engine):
    (group,) = engine.stream(Prompt("gone", "<image>?", ("no-such-file.png",)), SamplingParams(group_size=1))
    assert "no-such-file.png" in group.error
