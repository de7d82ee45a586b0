"""A run in one process (`cluster=inline`): no Ray, breakpoints in rewards, the engine check."""

from __future__ import annotations

import dataclasses
import os

import pytest

import rsgrpo.cluster.local
from rsgrpo.cluster.engine_check import EnginesDiffer
from rsgrpo.config.train import ClusterConfig, ModelConfig, TrainConfig
from rsgrpo.errors import ConfigError
from rsgrpo.train import train
from tests.material.tiny_families import save_family
from tests.material.training import steps_of, tiny_run, write_rows
from tests.test_architecture import run_without

REWARD = """
import os
from rewards.api import Response, reward

processes = set()

@reward
def vowels(response: Response) -> float:
    processes.add(os.getpid())
    return sum(c in "aeiou" for c in response.text) / 10
"""


@pytest.fixture
def config(tmp_path, page_images, tiny_model_path, monkeypatch) -> TrainConfig:
    (tmp_path / "rewards_of_inline.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = write_rows(tmp_path / "rows.jsonl", page_images)
    rewards = {"vowels": "rewards_of_inline:vowels"}
    one = ClusterConfig(kind="inline")
    return tiny_run(tmp_path / "runs", rows, tiny_model_path, rewards=rewards, reward_args={}, cluster=one)


def test_rewards_run_in_the_process_of_the_caller_where_a_breakpoint_stops(config):
    import rewards_of_inline

    train(config)
    assert len(steps_of(config)) == 2
    assert rewards_of_inline.processes == {os.getpid()}


def test_a_mixture_learns_with_the_experts_that_its_engine_took(config, tiny_model_path, tmp_path):
    path = save_family("qwen3_vl_moe", tiny_model_path, tmp_path / "mixture")
    replaying = dataclasses.replace(config.rollout, dtype="bfloat16", routing_replay=True)
    config = dataclasses.replace(config, model=ModelConfig(path=path), rollout=replaying)
    train(config)
    assert len(steps_of(config)) == 2
    assert all(0 <= step["actor/routing_mismatch"] < 0.1 for step in steps_of(config))


def test_a_run_needs_neither_ray_nor_vllm(config, tmp_path):
    statement = f"""
import sys
sys.path.append({str(tmp_path)!r})
from rsgrpo.config.train import *
from rollout.config import *
from rsgrpo.train import train
train({config!r})
"""
    result = run_without({"ray", "vllm", "datasets", "wandb", "openai"}, statement)
    assert result.returncode == 0, result.stderr
    assert len(steps_of(config)) == 2


def test_an_engine_with_other_weights_is_found(config, monkeypatch):
    def never(self, version: int) -> None:
        """As if no weights arrived."""

    first_step = dataclasses.replace(config, gate=dataclasses.replace(config.gate, every=1))
    monkeypatch.setattr(rsgrpo.cluster.local.LocalCluster, "sync_weights", never)
    with pytest.raises(EnginesDiffer, match="the engines do not sample from the policy that is trained"):
        train(first_step)
    assert len(steps_of(config)) == 1  # they agree until the learner's weights move


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("learner", {"num_ranks": 2}, r"cluster\.kind=inline has a single process, but learner\.num_ranks=2"),
        ("rollout", {"num_workers": 2}, r"cluster\.kind=inline has one engine, but rollout\.num_workers=2"),
        ("rollout", {"engine": "vllm"}, r"cluster\.kind=inline samples in this process, but rollout\.engine=vllm"),
    ],
)
def test_what_needs_more_processes_is_refused(config, part, values, message):
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)}))
