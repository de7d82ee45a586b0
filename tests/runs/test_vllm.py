"""The whole loop with the real vLLM (its CPU build): sampling, scoring, learning, sending weights, supervision."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image

pytest.importorskip("vllm", reason="vLLM is not installed")

from rollout.config import RolloutConfig, TurnsConfig, VllmConfig
from rollout.inputs.processor import InputProcessor
from rollout.workers.pool import RolloutPool
from rollout.workers.worker import WorkerError, start_rollout_worker
from rsgrpo.config.train import DataConfig, LoraConfig
from rsgrpo.data.dataset import load_prompts
from rsgrpo.records.rollouts import read_rollouts, rollout_files
from rsgrpo.train import train
from tests.material.tiny_families import save_family
from tests.material.training import steps_of, tiny_run, write_rewards, write_rows

ROLLOUT = RolloutConfig(
    engine="vllm",
    group_size=4,
    max_response_tokens=24,
    num_threads=1,
    vllm=VllmConfig(
        kv_cache_gib=0.0625,
        engine_args={"max_num_seqs": 16, "mm_processor_cache_gb": 0.25},
        verify_every=1,
        sync_timeout_s=60,
    ),
)


@pytest.fixture(scope="module")
def ray_cluster():
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture
def config(tmp_path, tmp_path_factory, page_images, tiny_model_path, monkeypatch):
    modules = tmp_path_factory.mktemp("rewards")
    write_rewards(modules)
    monkeypatch.syspath_prepend(str(modules))
    rows = write_rows(tmp_path / "rows.jsonl", page_images)
    return tiny_run(tmp_path, rows, tiny_model_path, rollout=ROLLOUT)


def write_own_pages(folder: Path, questions: Sequence[str]) -> DataConfig:
    """Write a row per question, with two pages of its own; they are taken in this order."""
    rng = np.random.default_rng(0)
    with open(folder / "own.jsonl", "w") as file:
        for index, question in enumerate(questions):
            pages = [str(folder / f"own{index}-{page}.png") for page in range(2)]
            for page in pages:
                Image.fromarray(rng.integers(0, 255, (56, 84, 3), dtype=np.uint8)).save(page)
            answer = "<evidence>\n[1]: 7\n[2]: 4\n</evidence>\n<answer>7</answer>"
            row = {"id": f"own{index}", "prompt": f"<image><image>{question}", "answer": answer, "image": pages}
            file.write(json.dumps(row) + "\n")
    return DataConfig(train=str(folder / "own.jsonl"), shuffle=False)


def test_two_ranks_train_with_two_engines_on_policy_and_groups_share_their_prompt(ray_cluster, config, tmp_path):
    data = write_own_pages(tmp_path, ["page 1 shows a code 4 and an amount 7 " * 6] * 4)
    two_engines = dataclasses.replace(ROLLOUT, num_workers=2)
    cluster = dataclasses.replace(config.cluster, cpus={"rollout": 0.3, "learner": 0.3})
    learner = dataclasses.replace(config.learner, num_ranks=2)
    config = dataclasses.replace(config, data=data, rollout=two_engines, learner=learner, cluster=cluster)
    train(config)
    first, second = steps_of(config)
    for step, row in enumerate((first, second)):
        assert row["rollout/oldest_weights_version"] == step
        assert row["actor/mismatch_max"] < 1e-4, "engines and learner hold the same weights"
        assert row["rollout/tokens_per_s"] > 0
        assert row["rollout/engine_restarts"] == 0
    assert second["actor/grad_norm"] > 0
    # Of the four rollouts of a group one computes the prompt, the others find its whole blocks of 32 tokens in the
    # cache of the same engine: a group that was spread over both would find them twice in four.
    processor = InputProcessor(config.model.path, config.inputs)
    lengths = {processor.count_tokens(p) for p in load_prompts(data.train, data, config.prompt, processor)}
    (length,) = lengths
    assert length > 100
    assert second["rollout/prefix_cache_hit_rate"] == pytest.approx(3 / 4 * ((length - 1) // 32 * 32) / length)


@pytest.mark.slow  # an engine each: a minute
@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of GLM's processor
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5", "internvl", "glm4v"])
def test_models_of_other_families_are_trained(ray_cluster, config, family, tiny_model_path, tmp_path):
    """The gate compares the engine with the learner at the start, and each step the log-probabilities of all tokens."""
    rollout = dataclasses.replace(ROLLOUT, dtype="bfloat16") if family == "qwen3_5" else ROLLOUT
    model = dataclasses.replace(config.model, path=save_family(family, tiny_model_path, tmp_path / family))
    train(dataclasses.replace(config, model=model, rollout=rollout))
    steps = steps_of(config)
    assert [step["rollout/oldest_weights_version"] for step in steps] == [0, 1]
    assert all(step["actor/mismatch_max"] < (1 if family == "qwen3_5" else 1e-4) for step in steps)
    assert all(step["actor/grad_norm"] > 0 for step in steps)


BREAKER = """
from pathlib import Path

import psutil

from rewards.api import Response, reward

CALLS = Path({path!r})


@reward
def breaks_engines(response: Response) -> float:
    "Kill vLLM's own process (below this process's Ray node) at the first response, stop the next one at the 17th."
    calls = len(CALLS.read_text()) + 1 if CALLS.exists() else 1
    CALLS.write_text("x" * calls)
    if calls in (1, 17):
        processes = psutil.Process().parent().children(recursive=True)
        (engine,) = [process for process in processes if "EngineCore" in process.name()]
        engine.kill() if calls == 1 else engine.suspend()
    return sum(c in "aeiou" for c in response.text) / 10
"""


@pytest.mark.slow  # two engines start again: minutes; tests/rollout/workers/test_worker.py kills an embedded one
def test_an_engine_killed_and_one_stalled_in_mid_step_are_replaced_and_the_run_goes_on(
    ray_cluster, config, tmp_path, monkeypatch
):
    (tmp_path / "tests_breaking_reward.py").write_text(BREAKER.replace("{path!r}", repr(str(tmp_path / "calls"))))
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards = {"breaks": "tests_breaking_reward:breaks_engines"}
    # One group at a time, so that others are still to come when the first is scored.
    vllm = dataclasses.replace(
        ROLLOUT.vllm, engine_args={"max_num_seqs": 4, "mm_processor_cache_gb": 0.25}, stall_timeout_s=10
    )
    few = dataclasses.replace(ROLLOUT, max_response_tokens=64, vllm=vllm)
    algorithm = dataclasses.replace(config.algorithm, prompts_per_step=4, max_staleness=1, importance_cap=2.0)
    changes: dict[str, Any] = {
        "rewards": rewards,
        "reward_args": {},
        "rollout": few,
        "algorithm": algorithm,
        "total_steps": 3,
    }
    train(dataclasses.replace(config, **changes))
    rows = steps_of(config)
    assert rows[0]["rollout/engine_restarts"] >= 1
    assert rows[2]["rollout/engine_restarts"] == 2
    assert [row["rollout/groups_sampled"] for row in rows] == [4, 4, 4]
    assert rows[0]["actor/mismatch_max"] < 1e-4, "the new engine has the learner's weights"
    # One step off: step t learns from rollouts of version t - 2.
    assert [row["rollout/oldest_weights_version"] for row in rows] == [0, 0, 1]


@pytest.mark.slow  # an engine, four steps of long responses: half a minute
def test_weights_that_change_in_flight_keep_a_run_within_its_staleness(ray_cluster, config):
    vllm = dataclasses.replace(ROLLOUT.vllm, in_flight=True)
    long = dataclasses.replace(ROLLOUT, max_response_tokens=200, vllm=vllm)
    algorithm = dataclasses.replace(config.algorithm, max_staleness=2, importance_cap=2.0)
    train(dataclasses.replace(config, rollout=long, algorithm=algorithm, total_steps=4))
    rows = steps_of(config)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["rollout/oldest_weights_version"] >= max(0, row["step"] - 3) for row in rows)
    assert all(row["rollout/engine_restarts"] == 0 for row in rows)
    assert rows[-1]["actor/mismatch_max"] < 10


PAGE_BREAKER = """
from pathlib import Path

from rewards.api import Response, reward


@reward
def breaks_a_page(response: Response) -> float:
    "Cut off a page of a row whose turn comes in the next step."
    page = Path({path!r})
    page.write_bytes(page.read_bytes()[:100])
    return sum(c in "aeiou" for c in response.text) / 10
"""


def test_an_adapter_is_trained_and_prompts_that_cannot_be_sampled_are_replaced(
    ray_cluster, config, tmp_path, monkeypatch, caplog
):
    questions = ["what amount is on page 1?"] * 6
    questions[3] = "page 1 shows a code 4 and an amount 7 " * 9  # more than the engine takes, see max_model_len
    data = write_own_pages(tmp_path, questions)
    (tmp_path / "tests_page_reward.py").write_text(PAGE_BREAKER.replace("{path!r}", repr(str(tmp_path / "own2-1.png"))))
    monkeypatch.syspath_prepend(str(tmp_path))
    config = dataclasses.replace(
        config,
        data=data,
        rewards={"breaks": "tests_page_reward:breaks_a_page"},
        reward_args={},
        model=dataclasses.replace(config.model, lora=LoraConfig(rank=4, alpha=8)),
        learner=dataclasses.replace(config.learner, lr=1e-2),
        rollout=dataclasses.replace(
            ROLLOUT,
            vllm=dataclasses.replace(ROLLOUT.vllm, engine_args={**ROLLOUT.vllm.engine_args, "max_model_len": 120}),
        ),
    )
    train(config)
    first, second = steps_of(config)
    assert [row["rollout/oldest_weights_version"] for row in (first, second)] == [0, 1]
    assert max(row["actor/mismatch_max"] for row in (first, second)) < 1e-4
    # Rows 2 and 3 fail; the step goes on with rows 4 and 5.
    assert [row["rollout/prompt_errors"] for row in (first, second)] == [0, 2]
    assert [row["rollout/groups_sampled"] for row in (first, second)] == [2, 2]
    said = [record.getMessage() for record in caplog.records if "could not be sampled" in record.getMessage()]
    assert len(said) == 2
    assert "prompt own2 could not be sampled" in said[0]
    assert "own2-1.png" in said[0]
    assert "prompt own3" in said[1]
    assert "Raise rollout.vllm.engine_args.max_model_len" in said[1]


@pytest.mark.slow  # an engine of its own; tests/rollout/vllm/test_turns.py is the fast part
def test_conversations_with_a_tools_pages_are_trained_on_what_was_sampled(ray_cluster, config, page_images):
    arguments = {"pages": list(page_images), "stop": ["e", "a", "o", "1"]}
    turns = TurnsConfig("tests.material.environments:Moody", arguments, max_turns=4, max_observation_tokens=200)
    rollout = dataclasses.replace(ROLLOUT, max_response_tokens=40, turns=turns)
    gate = dataclasses.replace(config.gate, every=1)
    algorithm = dataclasses.replace(config.algorithm, credit="causal")
    train(dataclasses.replace(config, rollout=rollout, gate=gate, algorithm=algorithm, total_steps=3))
    rows = steps_of(config)
    assert [row["rollout/oldest_weights_version"] for row in rows] == [0, 1, 2], (
        "every step samples with its own weights"
    )
    for row in rows:
        assert row["actor/mismatch_max"] < 1e-4, "what was sampled is what is scored, images of every turn included"
        assert row["actor/grad_norm"] > 0
        assert 1 < row["rollout/turns_mean"] <= row["rollout/turns_max"] <= 4
        assert row["rollout/observation_images_mean"] > 0
        assert row["rollout/prefix_cache_hit_rate"] > 0.3, "a turn finds what came before it"
    assert sum(row.get("rollout/turns/exception", 0) for row in rows) >= 1, "a failing tool costs its turn"
    stored = read_rollouts(rollout_files(Path(config.output_dir) / "run")[3])
    assert any(len(o.images) > 1 for rollout in stored for o in rollout.observations)


def test_engines_that_cannot_start_say_what_to_change_before_anything_is_sampled(ray_cluster, config, tiny_model_path):
    changes: dict[str, dict[str, Any]] = {
        r"does not divide the model's 2 attention heads\. Use one of": {"tensor_parallel_size": 3},
        r"KV cache 900.0.* are free\. Lower rollout.vllm.kv_cache_gib": {"kv_cache_gib": 900.0},
    }
    workers = [
        start_rollout_worker(
            index,
            tiny_model_path,
            dataclasses.replace(ROLLOUT, vllm=dataclasses.replace(ROLLOUT.vllm, **change)),
            config.inputs,
            options={"num_cpus": 0.1},
        )
        for index, change in enumerate(changes.values())
    ]
    for worker, said in zip(workers, changes, strict=True):
        pool = RolloutPool([worker], timeout_s=120)
        with pytest.raises(WorkerError, match=said) as failure:
            pool.ping()
        assert "Traceback" not in str(failure.value)
        assert not failure.value.is_lost, "another engine would fail as well"
        pool.close()
