"""How a policy is spread over ranks: weights that arrive before they move, and frozen ones in half the bytes."""

from __future__ import annotations

import multiprocessing
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.state_dict import set_model_state_dict

from rsgrpo.config.train import LearnerConfig, LoraConfig, ModelConfig
from rsgrpo.learning import fsdp, learner
from rsgrpo.learning.attention import SDPA
from rsgrpo.learning.policy import Policy, empty_model, load_model, shrink
from rsgrpo.types import TrainGroup
from tests.laws.test_01_micro_batches_and_ranks import weights_of
from tests.material.learner import learnt, make_learner

CPU = torch.device("cpu")
WEIGHTS = [1.0, 2.0]


@pytest.mark.parametrize("frozen_tower", [True, False])
def test_an_offloaded_tower_moves_to_the_gpu_only_after_its_weights_have_come(
    frozen_tower, tiny_model_path, monkeypatch
):
    fsdp.require_process_group(0, 1, CPU)
    config = ModelConfig(path=tiny_model_path)
    source = load_model(config)
    expected = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    policy = Policy(
        empty_model(config),
        banned_token_ids=[5],
        attention=SDPA,
        logits_chunk_tokens=512,
        frozen_tower=frozen_tower,
        compute_dtype=torch.float32,
    )
    fsdp.shard(policy, LearnerConfig(), CPU, fsdp.make_mesh(CPU))
    moves: list[torch.device] = []
    monkeypatch.setattr(policy.family.vision_tower(policy.hf), "to", moves.append)

    def on_one_device(*args: Any, **options: Any) -> Any:
        assert not moves, "Multiple devices found"  # what torch says of a tower on the GPU beside offloaded weights
        return set_model_state_dict(*args, **options)

    monkeypatch.setattr("rsgrpo.learning.fsdp.set_model_state_dict", on_one_device)
    fsdp.fill(policy, source, LearnerConfig(offload=True), CPU)
    assert moves == ([CPU] if frozen_tower else [])  # a trained tower is sharded and stays offloaded
    found = {name: fsdp.whole(tensor) for name, tensor in policy.hf.state_dict().items()}
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def rounded_model_path(tiny_model_path, tmp_path_factory) -> str:
    """A model as it is published: every weight exact in bfloat16."""
    folder = tmp_path_factory.mktemp("rounded") / "model"
    shutil.copytree(tiny_model_path, folder)
    tensors = {name: tensor.bfloat16().float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def frozen_dtypes(made: learner.Learner) -> set[torch.dtype]:
    return {parameter.dtype for parameter in made.policy.parameters() if not parameter.requires_grad}


def test_a_frozen_base_in_bfloat16_changes_no_bit(rounded_model_path, groups, monkeypatch):
    options: dict[str, Any] = {"precision": "bfloat16", "lora": LoraConfig(rank=4)}
    halved = make_learner(rounded_model_path, **options)
    assert frozen_dtypes(halved) == {torch.bfloat16}
    assert {parameter.dtype for parameter in halved.policy.trainable().values()} == {torch.float32}
    monkeypatch.setattr(learner, "shrink_frozen", lambda policy, source: shrink(policy, source, [True, False]))
    whole = make_learner(rounded_model_path, **options)
    assert frozen_dtypes(whole) == {torch.float32, torch.bfloat16}  # the base and the tower
    for _ in range(2):
        assert learnt(halved.update(groups, WEIGHTS)) == learnt(whole.update(groups, WEIGHTS))
    merged = weights_of(whole)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in weights_of(halved).items())
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}


def test_a_base_that_bfloat16_would_round_stays_float32(tiny_model_path, rounded_model_path):
    assert frozen_dtypes(make_learner(tiny_model_path, precision="bfloat16", lora=LoraConfig(rank=4))) == {
        torch.float32
    }
    assert frozen_dtypes(make_learner(rounded_model_path, lora=LoraConfig(rank=4))) == {torch.float32}
    assert frozen_dtypes(make_learner(rounded_model_path, precision="bfloat16", trainable=False)) == {torch.bfloat16}


def rank_main(rank: int, path: str, groups: list[TrainGroup], folder: Path) -> None:
    distributed_c10d._world = distributed_c10d._World()  # forked: the parent's group has no threads here
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    options: dict[str, Any] = {"precision": "bfloat16", "lora": LoraConfig(rank=4), "num_ranks": 2}
    made = make_learner(path, rank=rank, world_size=2, **options)
    torch.save((frozen_dtypes(made), weights_of(made), made.logprobs(groups)), folder / f"{rank}.pt")


def test_several_ranks_agree_on_the_dtype_of_what_is_frozen(rounded_model_path, groups, tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = (rounded_model_path, groups, tmp_path)
    ranks = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    alone = make_learner(rounded_model_path, precision="bfloat16", lora=LoraConfig(rank=4))
    expected = alone.logprobs(groups)
    for rank in range(2):
        dtypes, weights, logprobs = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert dtypes == {torch.bfloat16}
        if rank == 0:
            assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(alone).items())
        for one, other in zip(expected, logprobs, strict=True):
            np.testing.assert_array_equal(np.concatenate(one), np.concatenate(other))
