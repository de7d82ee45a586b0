"""Sampling with the real vLLM (its CPU build) against transformers, on a random two-layer Qwen2.5-VL."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoConfig

pytest.importorskip("vllm", reason="vLLM is not installed")

from rollout.build import build_engine
from rollout.config import ConfigError, RolloutConfig, VllmConfig
from rollout.types import Prompt, SamplingParams
from rollout.vllm.launch import response_cache_bytes
from rollout.vllm.requests import build_request, prompts_at_once
from rsgrpo.cluster.engine_check import blanked, table
from tests.material.gate import OneEngine, failures, one_learner, run_gate
from tests.rollout.engine_laws import EngineLaws
from tests.rollout.parity import INPUTS, ROLLOUT, assert_sampled_from, reference_model


@pytest.fixture(scope="module")
def model(attentive_model_path):
    return reference_model(attentive_model_path)


@pytest.fixture(scope="module")
def learner(attentive_model_path):
    return one_learner(attentive_model_path, INPUTS)


@pytest.fixture
def prompts(page_images):
    return [
        Prompt("three", "<image> and <image> or <image> what amount is on page 2?", tuple(page_images[:3])),
        Prompt("one", "what code is on <image>?", (page_images[4],)),
        Prompt("none", "insufficient to answer?", ()),
        Prompt("repeat", "<image><image> page 1", (page_images[1], page_images[1])),
    ]


class TestLaws(EngineLaws):
    """Those of every engine."""


def test_vision_tokens_are_never_sampled(engine, prompts):
    # Without the ban, one of these 5 among 400 tokens would come up in about 1 of 80 draws of a random model.
    groups = list(engine.generate(prompts, SamplingParams(group_size=8, temperature=1.5, max_tokens=48)))
    sampled = [token for group in groups for rollout in group.rollouts for token in rollout.token_ids_T]
    assert len(sampled) > 800
    assert not set(sampled) & set(engine.processor.banned_token_ids)


def test_pixels_reach_vllm_unchanged(engine, prompts):
    request, _ = build_request(engine.processor, prompts[0], max_tokens=8, max_model_len=400)
    (rendered,) = engine._run(engine._llm.renderer.render_cmpl_async([request], skip_mm_cache=True))
    patches = torch.cat([item["pixel_values"].data for item in rendered["mm_kwargs"]["image"]])
    # vLLM normalises on the device; the parity tests cover that, this one every single byte before it.
    images = engine.processor.load_images(prompts[0])
    plain = {"do_resize": False, "do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    assert torch.equal(patches, engine.processor.image_processor(images=images, **plain)["pixel_values"])


def test_equal_seeds_give_equal_responses_and_siblings_differ(engine, prompts):
    def tokens(seed):
        sampling = SamplingParams(group_size=3, max_tokens=16, seed=seed)
        groups = sorted(engine.generate(prompts[:2], sampling), key=lambda group: group.prompt.id)
        return [rollout.token_ids_T for group in groups for rollout in group.rollouts]

    first = tokens(1)
    assert len(set(first)) == 6
    assert tokens(1) == first
    assert not set(tokens(2)) & set(first)


def test_a_group_computes_its_prompt_once(engine, page_images):
    text = "<image> what amount is on page 2? " + "page 1 shows a code 4 and an amount 7 " * 10
    prompts = [Prompt(f"long{index}", f"{text}{index}", (page_images[index],)) for index in range(2)]
    lengths = [engine.processor.count_tokens(prompt) for prompt in prompts]
    assert min(lengths) > 128
    engine.stats()
    list(engine.generate(prompts, SamplingParams(group_size=8, max_tokens=4)))
    stats = engine.stats()
    # Whole blocks of 32 tokens are shared; the last prompt token is always computed, to predict what follows it.
    assert stats["prompt_tokens"] == 8 * sum(lengths)
    assert stats["cached_tokens"] == 7 * sum((length - 1) // 32 * 32 for length in lengths)
    assert stats["prefix_cache_hit_rate"] == stats["cached_tokens"] / stats["prompt_tokens"]
    assert stats["generated_tokens"] > 0


def test_the_cache_has_the_blocks_that_its_bytes_make(engine, attentive_model_path):
    text = AutoConfig.from_pretrained(attentive_model_path).get_text_config()
    # 2 layers x (keys + values) x 1 head x 32 x 4 bytes = 512 bytes a token, 32 tokens a block, 64 MiB.
    assert response_cache_bytes(text, "float32", max_tokens=1, block_size=1) == 2 * 512  # one block is vLLM's own
    assert engine._llm.vllm_config.cache_config.num_gpu_blocks == (64 << 20) // (512 * 32)


def test_prompts_that_do_not_fit_into_one_step_are_sampled_as_exactly(engine, model, page_images):
    text = "page 1 shows a code 4 and an amount 7 " * 10
    prompts = [Prompt(f"many{index}", f"{index} <image> {text}", (page_images[index % 5],)) for index in range(16)]
    assert sum(engine.processor.count_tokens(prompt) for prompt in prompts) > 2048  # tokens of a step on CPU
    groups = list(engine.generate(prompts, SamplingParams(group_size=2, max_tokens=4)))
    assert len(groups) == 16
    for group in groups:
        assert_sampled_from(model, engine, group)


def test_a_response_limit_beyond_the_engine_is_refused_with_the_setting_to_raise(engine, prompts):
    (group,) = engine.generate(prompts[:1], SamplingParams(max_tokens=500))
    assert "Raise rollout.vllm.engine_args.max_model_len" in group.error


def test_groups_come_while_others_still_run_and_closing_aborts_the_rest(engine, prompts):
    many = [Prompt(f"p{index}", f"amount {index}?") for index in range(24)]
    engine.stats()
    groups = engine.generate(many, SamplingParams(group_size=8, temperature=1.0, max_tokens=40))
    assert next(groups).error is None
    groups.close()
    list(engine.generate(prompts[2:3], SamplingParams(max_tokens=2)))  # the engine is free again
    assert engine.stats()["generated_tokens"] < 24 * 8 * 20


# ---- the gate between this engine and the learner ------------------------------------------------------------------


def test_the_gate_holds_between_vllm_and_the_learner(engine, learner, prompts):
    checks = run_gate(OneEngine(engine), learner, prompts)
    assert failures(checks) == set(), table(checks)
    assert len(checks) == 4 * 6 + 2


def test_the_gate_catches_stale_weights(engine, attentive_model_path, prompts, tmp_path):
    shutil.copytree(attentive_model_path, tmp_path / "moved")
    reference_model(attentive_model_path, seed=1).save_pretrained(tmp_path / "moved")
    ahead = one_learner(str(tmp_path / "moved"), INPUTS)
    assert {"greedy token below the best", "log-probabilities differ by"} <= failures(
        run_gate(OneEngine(engine), ahead, prompts)
    )
    assert failures(run_gate(OneEngine(engine), ahead, prompts, version=1)) >= {"weights version"}


def test_the_gate_catches_missing_images(engine, learner, prompts):
    grey = OneEngine(engine, seen=lambda prompt: dataclasses.replace(blanked(prompt), id=prompt.id))
    assert {"blank pages change its answer by", "log-probabilities differ by"} <= failures(
        run_gate(grey, learner, prompts)
    )


def test_the_gate_catches_other_pixels_of_the_same_and_of_another_size(
    engine, learner, attentive_model_path, prompts, page_images, tmp_path
):
    mirrored = {}
    for path in page_images:
        mirrored[path] = str(tmp_path / Path(path).name)
        ImageOps.mirror(Image.open(path)).save(mirrored[path])

    def seen(prompt):
        return dataclasses.replace(prompt, images=tuple(mirrored.get(source, source) for source in prompt.images))

    assert failures(run_gate(OneEngine(engine, seen), learner, prompts)) & {
        "greedy token below the best",
        "log-probabilities differ by",
    }
    smaller = one_learner(attentive_model_path, dataclasses.replace(INPUTS, max_pixels=784 * 4))
    assert {"prompt tokens, image tokens", "image features of the engine"} <= failures(
        run_gate(OneEngine(engine), smaller, prompts)
    )


def test_a_request_that_vllm_breaks_off_is_made_once_more(engine, prompts, monkeypatch):
    finished, asked = engine._finished, []

    async def breaks_off(prompt, *rest):
        asked.append(prompt.id)
        if asked.count(prompt.id) <= (1 if prompt is prompts[0] else 2):
            return SimpleNamespace(
                outputs=[SimpleNamespace(finish_reason="error")], prompt_token_ids=range(counts[prompt.id])
            )
        return await finished(prompt, *rest)

    counts = {prompt.id: engine.processor.count_tokens(prompt) for prompt in prompts}
    monkeypatch.setattr(engine, "_finished", breaks_off)
    sampling = SamplingParams(group_size=2, max_tokens=4)
    groups = {group.prompt.id: group for group in engine.generate(prompts[:2], sampling)}
    assert len(groups[prompts[0].id].rollouts) == 2
    assert groups[prompts[1].id].error == "vLLM ended a rollout by error"
    assert len(asked) == 4


def test_prompts_whose_pages_would_fill_the_memory_wait():
    assert prompts_at_once(256, 8, 5 * 1_568_000) == 64  # training: twice as many groups as fit
    assert prompts_at_once(256, 1, 5 * 1_568_000) == 121  # validation: 70 MB of pixels each
    assert prompts_at_once(256, 1, 784) == 512
    assert prompts_at_once(1, 8, 784) == prompts_at_once(256, 1, 10**10) == 2


# ---- what ends before it starts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_parallel_size": 3}, r"tensor_parallel_size=3 does not divide the model's 2 attention .*\[1, 2\]"),
        ({"engine_args": {"max_model_len": 5000}}, r"5,000 tokens, but the model has 4,096 positions"),
        ({"engine_args": {"max_num_seq": 4}}, r"args\.max_num_seq: the installed vLLM has no .*mean max_num_seqs"),
        ({"engine_args": {"logprobs_mode": "x"}}, r"engine_args\.logprobs_mode is always 'processed_logprobs' here"),
        ({"kv_cache_gib": 0.0001}, r"kv_cache_gib=0\.0001 is too small .* \(448 tokens, .*Raise it to 0\.00"),
        ({"kv_cache_gib": 900}, r"vLLM needs 9\d\d\.\d GiB .*KV cache 900\.0.* Lower rollout.vllm.kv_cache_gib"),
    ],
)
def test_sizes_that_cannot_work_are_refused_before_start(tiny_model_path, options, said):
    rollout = RolloutConfig(engine="vllm", max_response_tokens=48, vllm=VllmConfig(**options))
    with pytest.raises(ConfigError, match=said):
        build_engine(tiny_model_path, rollout, INPUTS)


def test_a_device_that_the_installed_vllm_does_not_run_on_is_refused(tiny_model_path):
    with pytest.raises(ConfigError, match="the installed vLLM runs on cpu, but rollout asks for cuda"):
        build_engine(tiny_model_path, ROLLOUT, INPUTS, device="cuda")


def test_a_model_that_vllm_does_not_know_is_refused(tiny_model_path, tmp_path):
    shutil.copytree(tiny_model_path, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "architectures": ["OurOwnModel"]}))
    with pytest.raises(ConfigError, match=r"vLLM does not support .*OurOwnModel.*Use rollout.engine=hf"):
        build_engine(str(tmp_path / "model"), ROLLOUT, INPUTS)
