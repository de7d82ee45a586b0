"""Reward functions of other trainers score through an adapter; each function here has its trainer's own signature."""

from __future__ import annotations

import asyncio
import sys

import pytest

from rewards import adapters
from rewards.api import Response, RewardError, bind_reward

GOLD = Response("so 16", truth={"answers": ["16"], "gold": "16", "level": 2}, num_tokens=7, question="how many?")
FUNCTIONS = """
seen = {}

def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    seen.update(locals())
    return 0.5

def as_dict(solution_str, ground_truth):
    return {"score": 0.25, "format": 1.0}

def by_text(predict: str, ground_truth: str) -> dict:
    return {"overall": float(ground_truth in predict), "accuracy": 1.0}

def by_texts(predicts, ground_truths, format_weight=0.1):
    return [{"overall": float(g in p)} for p, g in zip(predicts, ground_truths)]

def by_input(reward_input):
    assert reward_input["response_length"] == 7
    return {"overall": float(reward_input["ground_truth"] in reward_input["response"])}

def lengths(completions, level, **kwargs):
    return [len(text) * one for text, one in zip(completions, level)]

async def later(prompts, completions, **kwargs):
    return [float(completions[0][0]["content"] == "so 16" and prompts[0][0]["role"] == "user")]

def correct(completion, answer, **kwargs):
    return 1.0 if answer in completion[-1]["content"] else 0.0

async def judged(prompt, completion, state):
    return float(state["answer"] == "16")
"""


@pytest.fixture(autouse=True)
def functions(tmp_path, monkeypatch):
    (tmp_path / "other_trainers.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("other_trainers", None)


@pytest.mark.parametrize(
    ("adapter", "function", "score"),
    [
        ("verl", "compute_score", 0.5),
        ("verl", "as_dict", 0.25),
        ("easyr1", "by_text", 1.0),
        ("easyr1", "by_texts", 1.0),
        ("easyr1", "by_input", 1.0),
        ("trl", "lengths", 10),
        ("verifiers", "correct", 1.0),
    ],
)
def test_a_function_of_another_trainer_scores(adapter, function, score):
    bound = bind_reward(getattr(adapters, adapter), {"function": f"other_trainers:{function}"})
    assert bound(GOLD) == score


def test_verl_is_told_the_rows_columns():
    truth = {"data_source": "mine", "extra_info": {"index": 3}, "ground_truth": "17", "answers": ["16"]}
    adapters.verl(Response("so", truth=truth), function="other_trainers:compute_score")
    seen = sys.modules["other_trainers"].seen
    assert (seen["data_source"], seen["ground_truth"], seen["extra_info"]) == ("mine", "17", {"index": 3})


def test_async_functions_are_awaited():
    async def score(adapter, **arguments):
        return await adapter(GOLD, **arguments)

    assert asyncio.run(score(adapters.trl, function="other_trainers:later", conversational=True)) == 1.0
    assert asyncio.run(score(adapters.verifiers, function="other_trainers:judged")) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"function": "other_trainers"}, "function must be module:function"),
        ({"function": "other_trainers:gone"}, "has no function 'gone'"),
        ({"function": "other_trainers:as_dict", "key": "acc"}, "no number under 'acc'; it has score, format"),
    ],
)
def test_what_cannot_be_used_is_named(arguments, message):
    with pytest.raises(RewardError, match=message):
        adapters.verl(GOLD, **arguments)
