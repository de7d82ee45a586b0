"""What of vLLM needs CUDA: bfloat16, ipc and nccl transfers, sleep and wake, tensor parallel engines, whole runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("hydra", reason="hydra is not installed")

from rollout.build import build_engine
from rollout.config import Dtype
from rollout.engine import Backend
from rollout.types import Prompt, SamplingParams
from rollout.vllm.peers import local_peer
from rollout.vllm.weights_out import build_sender
from rsgrpo.config.train import PlacementKind
from rsgrpo.train import train
from tests.material.learner import make_learner
from tests.material.tiny_families import save_family
from tests.material.training import steps_of, tiny_run, write_rewards, write_rows
from tests.rollout.families.test_videos import PROMPTS as VIDEO_ROWS
from tests.rollout.parity import INPUTS, ROLLOUT, assert_sampled_from, experts_taken, reference_model

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="needs CUDA")]
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
SMALL: dict[str, Any] = {
    "kv_cache_gib": 0.25, "engine_args": {"enforce_eager": True}, "gpu_memory_utilization": 0.2
}  # fmt: skip
# The float32 of this machine's matrix units is not that of its CPU.
GPU_TOLERANCE = 2e-3


@contextmanager
def started(
    model_path: str, *, dtype: Dtype = "float32", colocated: bool = True, routing_replay: bool = False, **vllm: Any
) -> Iterator[Any]:
    """A small engine on the first GPU (tensor parallel: on the first ones)."""
    own = dataclasses.replace(ROLLOUT.vllm, **(SMALL | vllm))
    rollout = dataclasses.replace(ROLLOUT, dtype=dtype, routing_replay=routing_replay, vllm=own)
    engine = build_engine(model_path, rollout, INPUTS, colocated=colocated, name="engine 0")
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def prompts(page_images):
    long = "page 1 shows a code 4 and an amount 7 " * 4
    return [
        Prompt("two", f"{long} <image> and <image> what amount is on page 2?", tuple(page_images[:2])),
        Prompt("none", f"{long} insufficient to answer?"),
    ]


def assert_same_logprobs(engine: Any, model: Any, prompts: list[Prompt], tolerance: float) -> None:
    """Sampled log-probabilities equal those of transformers' float32 on the CPU."""
    groups = list(engine.generate(prompts, SamplingParams(group_size=2, max_tokens=12)))
    assert [group.error for group in groups] == [None] * len(prompts)
    for group in groups:
        assert_sampled_from(model, engine, group, tolerance=tolerance)


def sent(engine: Any, backend: Backend, model: Any, version: int, device: str = "cuda") -> None:
    """Bring the engine to the weights of `model`, held on a GPU of this process."""
    torch.cuda.set_device(device)
    sender = build_sender([local_peer(engine)], backend=backend, bucket_bytes=1 << 20, timeout_s=60)
    sender.send([(name, tensor.to(device)) for name, tensor in model.named_parameters()], version)
    sender.close()


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, GPU_TOLERANCE), ({"engine_args": {}}, GPU_TOLERANCE), ({"dtype": "bfloat16"}, 0.3)],
    ids=["float32", "compiled graphs", "bfloat16 within the tolerance of the gate"],
)
def test_logprobs_equal_those_of_transformers(attentive_model_path, prompts, options, tolerance):
    with started(attentive_model_path, **options) as engine:
        assert engine.backend == "ipc"
        assert_same_logprobs(engine, reference_model(attentive_model_path), prompts, tolerance)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_rows_with_videos_are_read_alike(family, attentive_model_path, tiny_model_path, tmp_path):
    own = family == "qwen2_5_vl"  # the others' image and video processors normalise differently
    path = attentive_model_path if own else save_family(family, tiny_model_path, tmp_path)
    with started(path) as engine:
        assert engine.count_vision(VIDEO_ROWS) == [engine.processor.count_vision(prompt) for prompt in VIDEO_ROWS]
        assert_same_logprobs(engine, reference_model(path), VIDEO_ROWS, GPU_TOLERANCE)


def test_experts_come_with_the_tokens_that_took_them(tiny_model_path, tmp_path, prompts):
    path = save_family("qwen3_vl_moe", tiny_model_path, tmp_path / "model")
    model = reference_model(path)
    make_learner(path).export(tmp_path / "export", torch.float32)  # vLLM reads the layout of published checkpoints
    with started(str(tmp_path / "export"), routing_replay=True) as engine:
        groups = list(engine.generate(prompts, SamplingParams(group_size=2, max_tokens=12)))
    for group in groups:
        encoded = engine.processor.encode(group.prompt)
        for rollout in group.rollouts:
            ids = torch.tensor([[*encoded.token_ids_T, *rollout.token_ids_T]])
            family = engine.processor.family
            inputs = family.whole_inputs(model, ids, encoded.pixel_values, encoded.image_grid_thw)
            recorded = np.concatenate([group.prompt_experts_TLk, rollout.experts_RLk])
            taken = experts_taken(model, inputs)[:-1]
            # Rounding may give a token or two other experts.
            assert (np.sort(recorded, -1) == np.sort(taken, -1)).all(-1).mean() > 0.97


def test_weights_shared_by_ipc_are_used_and_all_caches_are_dropped(tiny_model_path, prompts):
    with started(tiny_model_path) as engine:
        assert_same_logprobs(engine, reference_model(tiny_model_path), prompts, GPU_TOLERANCE)
        for version in (1, 2):
            moved = reference_model(tiny_model_path, seed=version)
            sent(engine, "ipc", moved, version)  # compares checksums on the way
            assert engine.weights_version == version
            assert_same_logprobs(engine, moved, prompts, GPU_TOLERANCE)


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleeping_engine_gives_up_memory_and_wakes_in_two_parts_around_a_sync(tiny_model_path, prompts, level):
    with started(tiny_model_path, sleep_level=level, kv_cache_gib=2.0) as engine:
        list(engine.generate(prompts, GREEDY))
        awake = torch.cuda.mem_get_info()[0]
        engine.sleep()
        asleep = torch.cuda.mem_get_info()[0]
        assert asleep - awake > 1.9 * 2**30, "the KV cache is free for the learner"
        engine.wake(["weights"])
        assert torch.cuda.mem_get_info()[0] - awake > 1.9 * 2**30, "the cache is still away while weights arrive"
        moved = reference_model(tiny_model_path, seed=3)
        sent(engine, "ipc", moved, 1)
        engine.wake(["kv_cache"])
        assert_same_logprobs(engine, moved, prompts, GPU_TOLERANCE)


def test_an_engine_that_wakes_without_a_sync_samples_as_before(tiny_model_path, prompts):
    with started(tiny_model_path, sleep_level=1) as engine:
        engine.sleep()
        engine.wake()
        assert_same_logprobs(engine, reference_model(tiny_model_path), prompts, GPU_TOLERANCE)


@two_gpus
def test_weights_broadcast_by_nccl_from_another_gpu_are_used(tiny_model_path, prompts):
    with started(tiny_model_path, colocated=False) as engine:
        assert engine.backend == "nccl"
        for version in (1, 2):
            moved = reference_model(tiny_model_path, seed=version)
            sent(engine, "nccl", moved, version, device=f"cuda:{GPUS - 1}")
            assert_same_logprobs(engine, moved, prompts, GPU_TOLERANCE)


@two_gpus
def test_an_engine_on_two_gpus_samples_what_transformers_says(tiny_model_path, prompts):
    # The tiny model has one KV head, which both GPUs then hold.
    with started(tiny_model_path, tensor_parallel_size=2, colocated=False) as engine:
        assert engine.num_workers == 2
        assert_same_logprobs(engine, reference_model(tiny_model_path), prompts, GPU_TOLERANCE)
        moved = reference_model(tiny_model_path, seed=4)
        engine.load_weights(moved.named_parameters())
        engine.finish_weights(1)
        assert_same_logprobs(engine, moved, prompts, GPU_TOLERANCE)


@pytest.fixture
def run_of(tmp_path, tmp_path_factory, page_images, tiny_model_path, monkeypatch) -> Callable[..., Any]:
    """Returns a configuration of two steps on GPUs, in bfloat16."""
    modules = tmp_path_factory.mktemp("rewards")
    write_rewards(modules)
    monkeypatch.syspath_prepend(str(modules))
    rows = write_rows(tmp_path / "rows.jsonl", page_images)
    config = tiny_run(tmp_path, rows, tiny_model_path)

    def make(placement: PlacementKind, *, num_ranks: int = 1, num_workers: int = 1, **vllm: Any) -> Any:
        options = {**SMALL, "verify_every": 1, "sync_timeout_s": 120, **vllm}
        rollout = dataclasses.replace(
            config.rollout,
            engine="vllm",
            dtype="bfloat16",
            num_workers=num_workers,
            vllm=dataclasses.replace(ROLLOUT.vllm, **options),
        )
        learner = dataclasses.replace(config.learner, device="cuda", precision="bfloat16", num_ranks=num_ranks)
        cluster = dataclasses.replace(config.cluster, num_cpus=8, placement=placement)
        return dataclasses.replace(config, rollout=rollout, learner=learner, cluster=cluster)

    return make


@pytest.mark.parametrize(
    ("gpus", "placement", "options"),
    [
        (1, "colocated", {"sleep_level": 0}),
        (1, "colocated", {"sleep_level": 1}),
        (2, "disaggregated", {}),
        (2, "colocated", {"num_ranks": 2, "tensor_parallel_size": 2, "sleep_level": 1}),
        (4, "disaggregated", {"num_ranks": 2, "tensor_parallel_size": 2}),
    ],
)
def test_a_run_learns_on_policy_with_gpus_shared_and_apart(run_of, gpus, placement, options):
    if gpus > GPUS:
        pytest.skip(f"needs {gpus} GPUs")
    config = run_of(placement, **options)
    train(config)
    for step, row in enumerate(steps_of(config)):
        assert row["rollout/oldest_weights_version"] == step
        assert row["actor/mismatch_max"] < 0.3  # bfloat16 on both sides
        assert row["rollout/engine_restarts"] == 0
