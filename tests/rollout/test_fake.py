"""The scripted engine: scripts, gold answers, limits and errors."""

from __future__ import annotations

import json

import pytest
import torch

from rollout.build import build_engine
from rollout.config import InputsConfig, RolloutConfig, TurnsConfig
from rollout.engine import EngineError
from rollout.fake import FakeEngine, read_script
from rollout.turns.environment import Reply
from rollout.types import Prompt, SamplingParams

INPUTS = InputsConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 16)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.jsonl"
    rows = [
        {"id": "a", "responses": ["<answer>7</answer>", "é 漢"]},
        {"id": "b", "error": "the scripted engine was told to fail"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return str(path)


def start(model_path: str, script: str = "", gold_response: str = "") -> FakeEngine:
    rollout = RolloutConfig(engine="fake", script=script, gold_response=gold_response)
    engine = build_engine(model_path, rollout, INPUTS)
    assert isinstance(engine, FakeEngine)
    return engine


def test_responses_are_taken_in_turn(tiny_model_path, script):
    engine = start(tiny_model_path, script)
    (group,) = engine.generate([Prompt("a", "?")], SamplingParams(group_size=5, max_tokens=100))
    assert [rollout.text for rollout in group.rollouts] == ["<answer>7</answer>", "é 漢"] * 2 + ["<answer>7</answer>"]
    assert group.num_prompt_tokens == engine.processor.count_tokens(Prompt("a", "?"))
    for rollout in group.rollouts:
        assert rollout.finish_reason == "stop"
        assert rollout.token_ids_T[-1] == engine.processor.eos_token_id
        assert list(rollout.logprobs_T) == [0.0] * len(rollout.token_ids_T)
        assert (rollout.text, rollout.token_spans_T) == engine.processor.decode(rollout.token_ids_T)


def test_a_long_response_stops_at_the_limit(tiny_model_path, script):
    engine = start(tiny_model_path, script)
    (whole,) = engine.generate([Prompt("a", "?")], SamplingParams(max_tokens=100))
    num_tokens = len(whole.rollouts[0].token_ids_T)
    (fits,) = engine.generate([Prompt("a", "?")], SamplingParams(max_tokens=num_tokens))
    (cut,) = engine.generate([Prompt("a", "?")], SamplingParams(max_tokens=num_tokens - 1))
    assert fits.rollouts[0].finish_reason == "stop"
    assert cut.rollouts[0].finish_reason == "length"
    assert cut.rollouts[0].token_ids_T == whole.rollouts[0].token_ids_T[:-1]
    assert engine.processor.eos_token_id not in cut.rollouts[0].token_ids_T


def composed(truth):
    """A task's own gold response, as `rollout.gold_response` names it."""
    return f"{truth['marks']} marks: {truth['answers'][0]}"


def test_a_prompt_outside_the_script_gets_its_gold_response(tiny_model_path, script):
    truth = {"answers": ["7", "seven"], "marks": 3}
    prompts = [Prompt("c", "?", truth=truth), Prompt("d", "?", truth={**truth, "gold": "as it is"})]

    def texts(gold_response):
        engine = start(tiny_model_path, script, gold_response)
        return [group.rollouts[0].text for group in engine.generate(prompts, SamplingParams(max_tokens=200))]

    assert texts("") == ["7", "as it is"]
    assert texts("tests.rollout.test_fake:composed") == ["3 marks: 7", "as it is"]
    with pytest.raises(EngineError, match=r"rollout\.gold_response=nowhere:fn cannot be loaded"):
        texts("nowhere:fn")


def test_errors_stay_with_their_prompt(tiny_model_path, script):
    engine = start(tiny_model_path, script)
    prompts = [Prompt("b", "?"), Prompt("nobody", "?"), Prompt("a", "<image>?"), Prompt("a", "?")]
    groups = list(engine.generate(prompts, SamplingParams(max_tokens=100)))
    assert groups[0].error == "the scripted engine was told to fail"
    assert "'nobody' is not in rollout.script" in str(groups[1].error)
    assert "0 images" in str(groups[2].error)
    assert [len(group.rollouts) for group in groups] == [0, 0, 0, 1]


def test_versions_count_and_weights_are_dropped(tiny_model_path, script):
    engine = start(tiny_model_path, script)
    engine.load_weights(iter([("anything", torch.zeros(2))]))
    engine.finish_weights(9)
    (group,) = engine.generate([Prompt("a", "?")], SamplingParams(max_tokens=100))
    assert group.rollouts[0].weights_version == engine.weights_version == 9
    engine.close()
    engine.close()


@pytest.mark.parametrize("line", ["{", '{"id": "a"}', "[1]", '{"responses": ["x"]}'])
def test_a_bad_script_names_file_and_line_and_a_missing_one_the_file(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"id": "a", "responses": ["x"]}\n' + line + "\n")
    with pytest.raises(EngineError, match=r"bad\.jsonl, line 2"):
        read_script(str(path))
    with pytest.raises(EngineError, match=r"rollout\.script: nowhere\.jsonl cannot be read"):
        read_script("nowhere.jsonl")


def test_turns_without_an_environment_are_refused_instead_of_cut(tiny_model_path, tmp_path):
    path = tmp_path / "turns.jsonl"
    path.write_text(json.dumps({"id": "a", "responses": [["<open>1</open>", "<answer>7</answer>"]]}) + "\n")
    (group,) = start(tiny_model_path, str(path)).generate([Prompt("a", "?")], SamplingParams())
    assert group.error is not None
    assert "the script has 2 turns for 'a', but there is no rollout.turns.environment" in group.error


class Opens:
    """Answers every turn that opens something."""

    def __init__(self, prompt):
        pass

    def step(self, turn):
        return Reply("here it is", facts={"call": "open"}) if "<open>" in turn else None


def test_a_script_that_ends_before_its_episode_ends_the_response(tiny_model_path, tmp_path):
    turns = TurnsConfig("tests.rollout.test_fake:Opens", max_turns=3)
    scripts = [["<open>1</open>"], ["<open>1</open>", "it is 7"], ["<open>1</open>"] * 5]
    path = tmp_path / "turns.jsonl"
    path.write_text(json.dumps({"id": "a", "responses": scripts}) + "\n")
    engine = FakeEngine(tiny_model_path, RolloutConfig(script=str(path), turns=turns), INPUTS)
    (group,) = engine.generate([Prompt("a", "?")], SamplingParams(group_size=3))
    early, answered, endless = group.rollouts
    assert [rollout.finish_reason for rollout in group.rollouts] == ["stop", "stop", "turns"]
    (unread,) = early.observations
    assert (unread.at, unread.token_ids_S, unread.images) == (len(early.token_ids_T), (), ())
    assert unread.facts == answered.observations[0].facts
    assert len(endless.observations) == 3
