"""How a policy is spread over ranks: weights that arrive before they move, and frozen ones in half the bytes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.state_dict import set_model_state_dict
from torch.multiprocessing.spawn import spawn

from rsgrpo.config.train import LearnerConfig, LoraConfig, ModelConfig
from rsgrpo.errors import RsgrpoError
from rsgrpo.learning import fsdp, learner
from rsgrpo.learning.attention import SDPA, kernels_of
from rsgrpo.learning.policy import Policy, empty_model, load_model, shrink
from rsgrpo.types import TrainGroup
from tests.laws.test_01_micro_batches_and_ranks import difference, weights_of
from tests.material.learner import learnt, make_groups, make_learner
from tests.rsgrpo.learning.fake_fsdp import fake_ranks

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


@pytest.mark.parametrize("lora", [0, 4])
def test_weights_are_rounded_before_they_are_gathered(lora, tiny_model_path, monkeypatch):
    made = make_learner(tiny_model_path, lora=LoraConfig(rank=lora))
    expected = weights_of(made)
    adapters = dict(made.gather_adapter())
    travelled: list[torch.dtype] = []

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        travelled.append(tensor.dtype)
        return fsdp.whole(tensor)

    monkeypatch.setattr("rsgrpo.learning.export.whole", whole)
    if not lora:  # a merged weight is rounded after the merge
        found = {name: tensor.clone() for name, tensor in made.gather_weights(dtype=torch.bfloat16)}
        assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in expected.items())
        assert set(travelled) == {torch.bfloat16}
    else:
        for name, tensor in made.gather_adapter(torch.bfloat16):
            assert torch.equal(tensor, adapters[name].bfloat16())
        assert set(travelled) == {torch.bfloat16}
        merged = dict(made.gather_weights(dtype=torch.bfloat16))
        assert all(torch.equal(merged[name], tensor.bfloat16()) for name, tensor in expected.items())


def test_a_rank_on_a_gpu_takes_its_share_of_the_nodes_cores(monkeypatch):
    fsdp.require_process_group(0, 1, CPU)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(96)))
    assert fsdp.share_of_cores(torch.device("cuda")) == 96
    assert fsdp.share_of_cores(CPU) == 0
    with fake_ranks(0, 8):
        monkeypatch.setattr(dist, "all_gather_object", lambda found, mine: found.__setitem__(slice(None), [mine] * 8))
        assert fsdp.share_of_cores(torch.device("cuda")) == 12


def test_cudnn_is_kept_out_of_attention_on_gpus_alone():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with kernels_of(torch.device("cuda")):
        assert torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    with kernels_of(CPU):
        assert torch.backends.cuda.cudnn_sdp_enabled() == before


def replicated_main(rank: int, port: int, path: str, images: list[str], folder: Path) -> None:
    fsdp.init_distributed(rank, 4, "127.0.0.1", port, "cpu")
    made = make_learner(path, rank=rank, world_size=4, num_ranks=4, replicas=2)
    metrics = made.update(make_groups(images, [1, 2, 0, 1]), WEIGHTS)
    torch.save((metrics, weights_of(made)), folder / f"{rank}.pt")
    made.save(folder / "state")


@pytest.mark.slow  # four processes start: half a minute
def test_two_replicas_over_two_ranks_each_learn_what_one_rank_learns(tiny_model_path, page_images, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (port, tiny_model_path, page_images, tmp_path)
    spawn(replicated_main, arguments, nprocs=4)
    groups = make_groups(page_images, [1, 2, 0, 1])
    one = make_learner(tiny_model_path)
    before = weights_of(one)
    expected = learnt(one.update(groups, WEIGHTS))
    metrics, weights = torch.load(tmp_path / "0.pt", weights_only=False)
    assert difference(weights_of(one), weights, before) < 1e-5
    assert learnt(metrics) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    resumed = make_learner(tiny_model_path)
    resumed.load(tmp_path / "state")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(resumed).items())


def test_a_checkpoint_and_an_export_without_room_are_refused_before_they_begin(
    tiny_model_path, groups, tmp_path, monkeypatch
):
    made = make_learner(tiny_model_path)
    made.update(groups, WEIGHTS)
    needed = 12 * sum(parameter.numel() for parameter in made.policy.trainable().values())
    for free, fits in ((needed - 1, False), (needed + 4096, True)):  # counters and step counts besides
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        folder = tmp_path / f"with {free}"
        if fits:
            made.save(folder)
        else:
            with pytest.raises(RsgrpoError, match=r"No space left for a checkpoint of .* GB: .* GB are free where"):
                made.save(folder)
            assert not folder.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RsgrpoError, match="No space left for an export"):
        made.export(tmp_path / "export")
    assert list((tmp_path / "export").iterdir()) == []


def test_an_export_takes_the_name_of_a_dtype(tiny_model_path, tmp_path):
    make_learner(tiny_model_path).export(tmp_path, "bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_ranks_that_replicas_do_not_divide_are_refused():
    with pytest.raises(RsgrpoError, match=r"num_ranks=6 cannot be split into learner\.replicas=4"):
        LearnerConfig(num_ranks=6, replicas=4)
