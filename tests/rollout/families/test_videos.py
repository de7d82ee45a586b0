"""Videos in every family that reads them: the shared row, the engine, the gate, and rows of all kinds in one step."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

from rollout.config import InputsConfig, RolloutConfig
from rollout.families import FAMILIES
from rollout.hf.engine import HFEngine
from rollout.inputs.images import PromptError
from rollout.inputs.processor import InputProcessor, PromptInputs
from rollout.types import Prompt, SamplingParams
from rsgrpo.cluster.engine_check import blanked
from rsgrpo.config.train import AlgorithmConfig, LearnerConfig, ModelConfig
from rsgrpo.learning.learner import Learner
from rsgrpo.learning.packing import EncodedPrompt, build_micro_batch
from tests.laws.test_02_shared_prefix import assert_same, backward, make_policy, plain_rows, samples
from tests.material.gate import OneEngine, failures, run_gate
from tests.material.learner import SMALL, make_groups
from tests.material.tiny_families import save_family

INPUTS = InputsConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 16, max_videos=2, max_frames=5)
READERS = [name for name, family in FAMILIES.items() if family.reads_videos]
NEAR_TWINS = ("qwen2_vl", "qwen3_vl_moe", "qwen3_5_moe")
ALSO = [name for name in FAMILIES if name not in READERS]


def png(seed: int, width: int = 64, height: int = 96) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PAGE = png(0, 100, 60)
CLIP, SHORT = tuple(png(seed) for seed in range(1, 6)), (png(7), png(8))
TIMES = (0.0, 2.0, 4.0, 6.0, 8.0)
PROMPTS = [
    Prompt("both", "a <video> b <image> c <video> d", (*CLIP, PAGE, *SHORT), videos=(TIMES, (0.0, 0.5))),
    Prompt("text", "only text"),
    Prompt("page", "a <image> b", (PAGE,)),
    Prompt("clip", "<video> what happens?", CLIP, videos=(TIMES,)),
]


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in NEAR_TWINS)) for name in READERS]
)
def path(request, tiny_model_path, tmp_path_factory) -> str:
    if request.param == "qwen2_5_vl":
        return tiny_model_path
    return save_family(request.param, tiny_model_path, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def processor(path) -> InputProcessor:
    return InputProcessor(path, INPUTS)


def encoded(policy: Any, inputs: PromptInputs) -> Any:
    tokens, grid = torch.tensor(inputs.token_ids_T), inputs.image_grid_thw
    positions = policy.family.position_ids(policy.hf, tokens[None], grid, video_steps=inputs.video_steps)[:, 0]
    if inputs.pixel_values is None or grid is None or not policy.frozen_tower:
        return EncodedPrompt(tokens, positions, pixel_values=inputs.pixel_values, image_grid_thw=grid)
    pieces = torch.split(inputs.pixel_values, grid.prod(1).tolist())
    features = [policy.encode_images(piece, one[None]) for piece, one in zip(pieces, grid, strict=True)]
    return EncodedPrompt(tokens, positions, tuple(features))


@pytest.mark.parametrize("train_tower", [False, True])
def test_a_shared_row_equals_transformers_own_forward_of_each_response(train_tower, path, processor):
    """With `pixel_values_videos` and its own tower; text-only and image rows beside the videos.

    Positions are its own too, except for those that it does not number as published (see `Qwen2VL.position_ids`).
    """
    policy = make_policy(path, processor, train_tower=train_tower)
    lengths = [[7, 1, 12], [3], [5, 5], [4, 9]]
    groups = [
        (processor.encode(prompt), samples(n, seed=i))
        for i, (prompt, n) in enumerate(zip(PROMPTS, lengths, strict=True))
    ]
    rows = []
    for inputs, group in groups:
        rows += [dataclasses.replace(row, video_steps=inputs.video_steps) for row in plain_rows([(inputs, group)])]
    shared = build_micro_batch([(encoded(policy, inputs), group) for inputs, group in groups])
    assert_same(backward(policy, rows), backward(policy, [shared]))


def test_the_order_and_the_times_of_frames_count(path, processor):
    policy = make_policy(path, processor)
    later = tuple(4 * second for second in TIMES)
    one, backwards, slower = (
        processor.encode(Prompt("p", "<video> when?", frames, videos=(times,)))
        for frames, times in ((CLIP, TIMES), (CLIP[::-1], TIMES), (CLIP, later))
    )

    def scored(inputs: PromptInputs) -> torch.Tensor:
        [row] = plain_rows([(inputs, samples([6]))])
        with torch.no_grad():
            return policy(dataclasses.replace(row, video_steps=inputs.video_steps), 1.0, False).logprobs_N

    assert (scored(one) - scored(backwards)).abs().max() > 1e-5
    if policy.family.model_type != "qwen2_vl":  # which numbers frames without regard to time
        assert (scored(one) - scored(slower)).abs().max() > 1e-5


def test_positions_of_text_go_on_after_a_videos_last_moment(tiny_model_path):
    processor = InputProcessor(tiny_model_path, dataclasses.replace(INPUTS, max_pixels=28 * 28))  # one token a frame
    policy = make_policy(tiny_model_path, processor)
    inputs = processor.encode(Prompt("p", "<video>b", CLIP, videos=(TIMES,)))
    positions = policy.family.position_ids(policy.hf, torch.tensor(inputs.token_ids_T)[None], inputs.image_grid_thw,
                                           video_steps=inputs.video_steps)[:, 0]  # fmt: skip
    first = inputs.token_ids_T.index(processor.tokenizer.get_vocab()["<|video_pad|>"])
    interval = 4 * int(policy.hf.config.vision_config.tokens_per_second)  # two frames, 2 s apart
    assert inputs.video_steps == (4.0,)
    assert positions[:, first : first + 3].tolist() == [
        [first, first + interval, first + 2 * interval], [first] * 3, [first] * 3
    ]  # fmt: skip
    behind = len(inputs.token_ids_T) - first - 3
    assert positions[:, first + 3 :].tolist() == [[first + 2 * interval + 1 + index for index in range(behind)]] * 3


def test_positions_in_time_are_counted_in_float32_seconds_as_vllm_does(tiny_model_path):
    processor = InputProcessor(tiny_model_path, dataclasses.replace(INPUTS, max_pixels=28 * 28, max_frames=12))
    policy = make_policy(tiny_model_path, processor)
    times = tuple(0.35 * index for index in range(12))
    inputs = processor.encode(Prompt("p", "<video>b", (*CLIP, *CLIP, *SHORT), videos=(times,)))
    positions = policy.family.position_ids(policy.hf, torch.tensor(inputs.token_ids_T)[None], inputs.image_grid_thw,
                                           video_steps=inputs.video_steps)[0, 0]  # fmt: skip
    first = inputs.token_ids_T.index(processor.tokenizer.get_vocab()["<|video_pad|>"])
    assert policy.hf.config.vision_config.tokens_per_second == 4
    # 0.7 in float32 is 0.69999999: 5 x 4 x 0.7 falls below 14.
    assert (positions[first : first + 6] - first).tolist() == [0, 2, 5, 8, 11, 13]


def test_tokens_are_those_of_transformers_processor(path, processor):
    """Its pixels too. Of Qwen3-VL's marks around a whole video, which published processors leave out, it keeps both."""
    theirs = AutoProcessor.from_pretrained(path)
    frames = [np.asarray(frame) for frame in processor.load_images(PROMPTS[3])]
    metadata = VideoMetadata(
        total_num_frames=5,
        fps=0.5,
        frames_indices=list(range(5)),
        height=frames[0].shape[0],
        width=frames[0].shape[1],
    )
    expected = theirs(
        text=[processor.template.prompt(PROMPTS[3])], videos=[np.stack(frames)],
        do_resize=False, do_sample_frames=False, video_metadata=[metadata], return_tensors="pt",
    )  # fmt: skip
    ours = processor.encode(PROMPTS[3])
    tokens = expected["input_ids"][0].tolist()
    if processor.family.stamps_frames:
        start, end = (processor.tokenizer.convert_tokens_to_ids(f"<|vision_{which}|>") for which in ("start", "end"))
        tokens.pop(tokens.index(start))
        tokens.pop(len(tokens) - 1 - tokens[::-1].index(end))
    assert ours.token_ids_T == tokens
    assert processor.count_tokens(PROMPTS[3]) == len(tokens)
    assert torch.equal(ours.image_grid_thw, expected["video_grid_thw"])
    torch.testing.assert_close(ours.pixel_values, expected["pixel_values_videos"], atol=1e-5, rtol=0)
    if "second_per_grid_ts" in expected:
        assert ours.video_steps == pytest.approx([float(step) for step in expected["second_per_grid_ts"]])


def test_engine_and_learner_agree_after_steps_of_all_kinds_of_rows(path):
    settings = LearnerConfig(**SMALL)
    learner = Learner(ModelConfig(path=path), settings, INPUTS, algorithm=AlgorithmConfig(), total_steps=4)
    engine = HFEngine(path, RolloutConfig(max_response_tokens=8, num_threads=1), INPUTS)
    groups = [
        dataclasses.replace(group, prompt=prompt)
        for group, prompt in zip(make_groups([], [0] * len(PROMPTS)), PROMPTS, strict=True)
    ]
    assert learner.update(groups, [1.0, 1.0])["actor/skipped"] == 0  # its first step compares with the plain forward
    engine.load_weights(learner.gather_weights())
    engine.finish_weights(1)
    assert failures(run_gate(OneEngine(engine), learner, [PROMPTS[0], PROMPTS[3]], version=1)) == set()
    sampled = list(engine.generate(PROMPTS, SamplingParams(group_size=2, max_tokens=4, seed=1)))
    assert all(group.error is None for group in sampled)


def test_a_blank_frame_changes_what_follows(path, processor):
    engine = HFEngine(path, RolloutConfig(max_response_tokens=8), INPUTS)
    prompt = PROMPTS[3]
    grey = blanked(dataclasses.replace(prompt, images=prompt.images[2:3], videos=())).images[0]
    hidden = dataclasses.replace(prompt, images=(*CLIP[:2], grey, *CLIP[3:]))
    seen, unseen = (
        next(iter(engine.generate([one], SamplingParams(temperature=0.0, max_tokens=4)))).rollouts[0]
        for one in (prompt, hidden)
    )
    differs = list(seen.token_ids_T) != list(unseen.token_ids_T)
    assert differs or np.abs(np.subtract(seen.logprobs_T, unseen.logprobs_T)).max() > 1e-6


@pytest.mark.parametrize("family", ALSO)
def test_other_families_refuse_videos(family, tiny_model_path, tmp_path):
    processor = InputProcessor(save_family(family, tiny_model_path, tmp_path), INPUTS)
    with pytest.raises(
        PromptError, match=rf"{family} models read none here; qwen2_vl, qwen2_5_vl, .* do\. Give frames"
    ):
        processor.encode(PROMPTS[3])


@pytest.mark.parametrize(
    ("prompt", "limits", "message"),
    [
        (PROMPTS[0], {"max_videos": 1}, "has 2 videos, but inputs.max_videos is 1"),
        (PROMPTS[3], {"max_frames": 4}, "a video has 5 frames, but inputs.max_frames is 4"),
        (dataclasses.replace(PROMPTS[3], text="no mark"), {}, "the text has 0 <video> marks for 1 videos"),
        (
            Prompt("p", "<video>", (png(1), png(2, 200, 60)), videos=((0.0, 1.0),)),
            {},
            "must have one size after the resize",
        ),
    ],
    ids=["videos", "frames", "marks", "sizes"],
)
def test_what_cannot_be_shown_is_refused(prompt, limits, message, tiny_model_path):
    processor = InputProcessor(tiny_model_path, dataclasses.replace(INPUTS, **limits))
    with pytest.raises(PromptError, match=message):
        processor.encode(prompt)
