"""What every engine that samples a real model must do; each engine's tests inherit it."""

from __future__ import annotations

import dataclasses

import pytest

from rollout.engine import EngineError
from rollout.types import Prompt, SamplingParams
from tests.rollout.parity import assert_greedy_parity, assert_sampled_from

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


class EngineLaws:
    """Uses its module's fixtures `engine`, `model` (transformers' own) and `prompts`; the second has an image."""

    def test_greedy_tokens_and_logprobs_equal_transformers(self, engine, model, prompts):
        assert_greedy_parity(engine, model, prompts, GREEDY)

    def test_sampled_logprobs_equal_the_teacher_forced_ones_at_the_sampling_temperature(self, engine, model, prompts):
        for group in engine.generate(prompts, SamplingParams(group_size=3, temperature=0.7, max_tokens=24, seed=5)):
            assert len({tuple(rollout.token_ids_T) for rollout in group.rollouts}) == 3
            assert group.num_prompt_tokens == len(engine.processor.encode(group.prompt).token_ids_T)
            assert_sampled_from(model, engine, group, 0.7)

    def test_responses_end_at_the_limit_or_at_end_of_text(self, engine, prompts):
        sampling = SamplingParams(group_size=8, temperature=1.2, max_tokens=40, seed=3)
        rollouts = [rollout for group in engine.generate(prompts * 3, sampling) for rollout in group.rollouts]
        assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
        for rollout in rollouts:
            ended = rollout.token_ids_T[-1] == engine.processor.eos_token_id
            assert ended == (rollout.finish_reason == "stop")
            assert engine.processor.eos_token_id not in rollout.token_ids_T[:-1]
            assert len(rollout.token_ids_T) == 40 or ended
            assert len(rollout.logprobs_T) == len(rollout.token_ids_T)
            assert (rollout.text, rollout.token_spans_T) == engine.processor.decode(rollout.token_ids_T)

    def test_bad_prompts_fail_alone_with_a_reason(self, engine, prompts, page_images, tmp_path):
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"\x89PNG\r\n\x1a\n not really")
        limits = engine.processor.inputs
        many = (page_images * 2)[: limits.max_images + 1]
        bad = {
            "long": (Prompt("long", "page " * (limits.max_prompt_tokens + 1)), "inputs.max_prompt_tokens is"),
            "unreadable": (Prompt("unreadable", "<image>", (str(broken),)), "broken.png"),
            "many": (Prompt("many", "<image>" * len(many), tuple(many)), "inputs.max_images is"),
            "marks": (Prompt("marks", "<image>", ()), "1 <image> marks for 0 images"),
        }
        asked = [prompt for prompt, _ in bad.values()] + prompts[:1]
        sampling = SamplingParams(group_size=2, max_tokens=4)
        groups = {group.prompt.id: group for group in engine.generate(asked, sampling)}
        assert groups.keys() == {prompt.id for prompt in asked}
        assert len(groups[prompts[0].id].rollouts) == 2
        for name, (_, reason) in bad.items():
            assert groups[name].rollouts == ()
            assert reason in groups[name].error

    @pytest.mark.parametrize(
        ("values", "rule"),
        [({"group_size": 0}, "group_size must be >= 1"), ({"top_p": 0.0}, "top_p must be in"),
         ({"max_tokens": 0}, "max_tokens must be >= 1, got 0")],
    )  # fmt: skip
    def test_sampling_that_makes_no_sense_is_refused(self, engine, prompts, values, rule):
        with pytest.raises(EngineError, match=rule):
            next(engine.generate(prompts, SamplingParams(**values)))

    def test_a_stream_tells_the_text_in_pieces_and_ends_with_the_group(self, engine, prompts):
        sampling = SamplingParams(temperature=1.0, max_tokens=40, seed=3)  # greedy text may be one long half byte
        *pieces, group = engine.stream(prompts[1], sampling)
        assert len(pieces) > 1
        (whole,) = engine.generate([prompts[1]], sampling)
        assert "".join(pieces) == group.rollouts[0].text == whole.rollouts[0].text
        assert group.rollouts[0].token_ids_T == whole.rollouts[0].token_ids_T

    def test_a_stream_that_nobody_reads_to_its_end_leaves_the_engine_free(self, engine, prompts):
        stream = engine.stream(prompts[1], dataclasses.replace(GREEDY, temperature=1.0, max_tokens=40))
        next(stream)
        stream.close()
        (group,) = engine.generate([prompts[0]], GREEDY)
        assert group.error is None

    def test_a_stream_of_a_prompt_that_cannot_be_sampled_ends_with_its_error(self, engine):
        (group,) = engine.stream(Prompt("gone", "<image>?", ("no-such-file.png",)), GREEDY)
        assert "no-such-file.png" in group.error
