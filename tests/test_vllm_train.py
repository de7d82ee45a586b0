"""The whole loop with the real vLLM (its CPU build): sampling, scoring, learning, sending weights, supervision."""

from __future__ import annotations

import dataclasses

import pytest
import ray

pytest.importorskip("vllm", reason="vLLM is not installed")

from training_material import steps_of, tiny_run, write_rewards, write_rows

from rollout.config import RolloutConfig, VllmConfig
from rsgrpo.config import LoraConfig
from rsgrpo.train import train

ROLLOUT = RolloutConfig(
    engine="vllm",
    group_size=4,
    max_response_tokens=24,
    num_threads=1,
    vllm=VllmConfig(kv_cache_gib=0.0625, max_num_seqs=16, mm_cache_gib=0.25, verify_every=1, sync_timeout_s=60),
)


@pytest.fixture(scope="module")
def ray_cluster():
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture
def config(tmp_path, tmp_path_factory, page_images, tiny_model_path, monkeypatch):
    modules = tmp_path_factory.mktemp("rewards")
    write_rewards(modules)
    monkeypatch.syspath_prepend(str(modules))
    rows = write_rows(tmp_path / "rows.jsonl", page_images)
    return tiny_run(tmp_path, rows, tiny_model_path, rollout=ROLLOUT)


def test_two_ranks_train_with_vllm_and_every_rollout_is_on_policy(ray_cluster, config):
    train(dataclasses.replace(config, learner=dataclasses.replace(config.learner, num_ranks=2)))
    first, second = steps_of(config)
    for step, row in enumerate((first, second)):
        assert row["rollout/oldest_weights_version"] == step
        assert row["actor/mismatch_max"] < 1e-4, "engine and learner hold the same weights"
        assert row["rollout/tokens_per_s"] > 0
        assert row["rollout/engine_restarts"] == 0
        # 3 of 4 prompts of a group come from the cache but for the last, partial block of 32 tokens.
        assert 0.2 < row["rollout/prefix_cache_hit_rate"] <= 0.75
    assert second["actor/grad_norm"] > 0


KILLER = """
from pathlib import Path

import psutil

from rewards.api import Response, reward


@reward
def kills_an_engine_once(response: Response) -> float:
    "Kill vLLM's own process, below the Ray node that this process belongs to, after the first group is scored."
    done = Path({path!r})
    if not done.exists():
        processes = psutil.Process().parent().children(recursive=True)
        engines = [process for process in processes if "EngineCore" in process.name()]
        done.write_text(str([process.pid for process in engines]))
        engines[0].kill()
    return sum(c in "aeiou" for c in response.text) / 10
"""


def test_an_engine_killed_in_mid_step_is_replaced_and_the_run_goes_on(ray_cluster, config, tmp_path, monkeypatch):
    killed = tmp_path / "killed"
    (tmp_path / "tests_killing_reward.py").write_text(KILLER.replace("{path!r}", repr(str(killed))))
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards = {"kills": "tests_killing_reward:kills_an_engine_once"}
    few = dataclasses.replace(ROLLOUT, max_response_tokens=64, vllm=dataclasses.replace(ROLLOUT.vllm, max_num_seqs=4))
    algorithm = dataclasses.replace(config.algorithm, prompts_per_step=4, max_staleness=1, importance_cap=2.0)
    train(dataclasses.replace(config, rewards=rewards, reward_args={}, rollout=few, algorithm=algorithm))
    assert len(killed.read_text().split(",")) == 1
    first, second = steps_of(config)
    assert first["rollout/engine_restarts"] == second["rollout/engine_restarts"] == 1
    assert first["rollout/groups_sampled"] == second["rollout/groups_sampled"] == 4
    assert first["actor/mismatch_max"] < 1e-4, "the new engine has the learner's weights"
    assert [row["rollout/oldest_weights_version"] for row in (first, second)] == [0, 0]


def test_an_adapter_is_trained_and_only_it_is_sent(ray_cluster, config):
    lora = LoraConfig(rank=4, alpha=8)
    model = dataclasses.replace(config.model, lora=lora)
    train(dataclasses.replace(config, model=model, learner=dataclasses.replace(config.learner, lr=1e-2)))
    first, second = steps_of(config)
    assert [row["rollout/oldest_weights_version"] for row in (first, second)] == [0, 1]
    assert max(row["actor/mismatch_max"] for row in (first, second)) < 1e-4
