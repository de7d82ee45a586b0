"""Videos in the real vLLM: the same tokens, pixels, positions and log-probabilities as everywhere else here."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from rollout.build import build_engine
from rollout.types import Prompt, SamplingParams
from rollout.vllm.requests import build_request
from rollout.vllm.turns import continued
from tests.material.gate import OneEngine, failures, one_learner, run_gate
from tests.material.learner import make_learner
from tests.material.tiny_families import save_family
from tests.rollout.families.test_videos import CLIP, PAGE, PROMPTS, SHORT, TIMES
from tests.rollout.parity import INPUTS, ROLLOUT, assert_sampled_from, reference_logprobs, reference_model

UNEVEN = Prompt("uneven", "first <video> then <image>?", (*CLIP[:3], PAGE), videos=((0.1, 0.45, 1.5),))
# 0.7 s a patch, a little less in float32: the sixth patch of Qwen2.5-VL is at position 13, and at 14 without rounding.
LONG = Prompt("long", "<video> when?", (*CLIP, *CLIP, *SHORT), videos=(tuple(0.35 * index for index in range(12)),))
ROWS = [*PROMPTS, UNEVEN, LONG]


def requested(engine, prompt):
    return build_request(engine.processor, prompt, max_tokens=8, max_model_len=400)[0]


def rendered(engine, request):
    return engine._run(engine._llm.renderer.render_cmpl_async([request], skip_mm_cache=True))[0]


def assert_same_inputs(engine):
    """Tokens and pixels are ours, and nothing is resized or left out."""
    for prompt in ROWS:
        ours, theirs = engine.processor.encode(prompt), rendered(engine, requested(engine, prompt))
        assert list(theirs["prompt_token_ids"]) == ours.token_ids_T
        clips = theirs["mm_kwargs"].get("video", []) if prompt.videos else []
        assert len(clips) == len(prompt.videos)
        for clip, step in zip(clips, ours.video_steps, strict=True):
            if "second_per_grid_ts" in clip:
                assert clip["second_per_grid_ts"].data.item() == np.float32(step)
    assert engine.count_vision(ROWS) == [engine.processor.count_vision(prompt) for prompt in ROWS]


def test_every_kind_of_row_is_sampled_from_transformers_distribution(alive, attentive_model_path):
    model = reference_model(attentive_model_path)
    assert_same_inputs(alive)
    groups = list(alive.generate(ROWS, SamplingParams(group_size=3, temperature=0.7, max_tokens=16, seed=2)))
    assert {group.prompt.id for group in groups} == {prompt.id for prompt in ROWS}
    for group in groups:
        assert len({tuple(rollout.token_ids_T) for rollout in group.rollouts}) == 3
        assert_sampled_from(model, alive, group, 0.7)


def test_order_and_times_of_frames_are_part_of_what_is_cached(alive, attentive_model_path):
    """The same frames, backwards or at other times, are another video, though every frame was seen before."""
    model = reference_model(attentive_model_path)
    later = tuple(4 * second for second in TIMES)
    prompts = [
        Prompt(name, "<video> when?", frames, videos=(times,))
        for name, frames, times in (("one", CLIP, TIMES), ("back", CLIP[::-1], TIMES), ("slow", CLIP, later))
    ]
    found = {}
    for prompt in prompts:
        (group,) = alive.generate([prompt], SamplingParams(temperature=0.0, max_tokens=4))
        assert_sampled_from(model, alive, group)
        found[prompt.id] = group.rollouts[0]
    for one, other in itertools.combinations(found.values(), 2):
        assert (list(one.token_ids_T), list(one.logprobs_T)) != (list(other.token_ids_T), list(other.logprobs_T))


def test_frames_of_several_sizes_and_times_that_stand_still_are_refused_alone(alive):
    bad = [
        Prompt("sizes", "<video>", (CLIP[0], PAGE), videos=((0.0, 1.0),)),
        Prompt("still", "<video>", SHORT, videos=((1.0, 1.0),)),
    ]
    groups = {g.prompt.id: g for g in alive.generate([*bad, UNEVEN], SamplingParams(group_size=2, max_tokens=2))}
    assert "must have one size after the resize" in groups["sizes"].error
    assert "the times of a video's frames must increase" in groups["still"].error
    assert len(groups["uneven"].rollouts) == 2


def test_a_conversation_about_a_video_goes_on_about_a_page(alive):
    processor, prompt, said = alive.processor, PROMPTS[3], [20, 21, 22]
    answer = processor.encode_observation("look: <image>", [PAGE], has_ended=False)
    request = continued(processor, requested(alive, prompt), said, answer, [PAGE])
    tokens = [*processor.encode(prompt).token_ids_T, *said, *answer.token_ids_T]
    assert list(rendered(alive, request)["prompt_token_ids"]) == tokens


def test_the_gate_finds_engine_and_learner_equal(alive, attentive_model_path):
    learner = one_learner(attentive_model_path, INPUTS)
    assert failures(run_gate(OneEngine(alive), learner, [PROMPTS[0], UNEVEN])) == set()


@pytest.mark.slow  # an engine each
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"])
def test_other_families_read_them_by_their_own_rule(family, tiny_model_path, tmp_path):
    """In bfloat16, the only type of vLLM's CPU kernels for recurrent layers, as near as that is."""
    path = save_family(family, tiny_model_path, tmp_path / "model")
    if family == "qwen3_vl_moe":  # vLLM reads its experts in the layout of published checkpoints
        make_learner(path).export(tmp_path / "export", torch.float32)
        path = str(tmp_path / "export")
    recurrent = family.startswith("qwen3_5")
    rollout = dataclasses.replace(ROLLOUT, dtype="bfloat16") if recurrent else ROLLOUT
    engine: Any = build_engine(path, rollout, INPUTS)
    try:
        model = reference_model(path)
        assert_same_inputs(engine)
        for group in engine.generate(ROWS, SamplingParams(group_size=3, max_tokens=12, seed=1)):
            assert group.error is None
            if not recurrent:
                assert_sampled_from(model, engine, group)
                continue
            for rollout in group.rollouts:
                expected = reference_logprobs(model, engine.processor, group.prompt, rollout.token_ids_T)
                assert (torch.tensor(rollout.logprobs_T) - expected).abs().mean() < 0.1
    finally:
        engine.close()
