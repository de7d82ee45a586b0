"""Spreads a policy over ranks with FSDP2."""

from __future__ import annotations

import datetime
import itertools
import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rollout.meeting import gloo_interface, join_store, serve_store
from rsgrpo.config.train import LearnerConfig
from rsgrpo.errors import InputError, RsgrpoError
from rsgrpo.learning.policy import Policy

_TIMEOUT = datetime.timedelta(minutes=30)


def init_distributed(rank: int, world_size: int, address: str, port: int, device: str) -> None:
    """Join the process group of the learner's ranks: gloo on CPU, nccl on CUDA. Blocks until all ranks have joined.

    address, port: where rank 0 listens for the others; loopback where all are on one machine.
    device: "auto", "cpu" or "cuda" (torch's current device).
    """
    backend = "cpu:gloo,cuda:nccl" if resolve_device(device).type == "cuda" else "gloo"
    if world_size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        return
    store = (
        serve_store(address, world_size, _TIMEOUT, port)
        if rank == 0
        else join_store(address, port, world_size, _TIMEOUT)
    )
    with gloo_interface(address):
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)


def require_process_group(rank: int, world_size: int, device: torch.device) -> None:
    """Make the process group of a single rank where none exists; check that an existing group is the one meant.

    Raises:
        RsgrpoError: several ranks without a group, or a group of another size.
    """
    if not dist.is_initialized():
        if world_size > 1:
            raise RsgrpoError(
                f"world_size={world_size} needs a process group. Call init_distributed on every rank before Learner"
            )
        init_distributed(0, 1, "", 0, device.type)
    if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
        raise RsgrpoError(
            f"rank {rank} of {world_size} contradicts the process group, in which this is rank {dist.get_rank()} of "
            f"{dist.get_world_size()}. Pass the same numbers to init_distributed and Learner"
        )


def share_of_cores(device: torch.device) -> int:
    """Return this rank's share of its node's cores where it works on a GPU; 0 on CPU leaves it to torch. Collective.

    Ray gives a process that reserves a quarter of a core one thread, which would load, convert and, with
    `learner.offload`, update billions of weights.
    """
    if device.type == "cpu":
        return 0
    nodes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, socket.gethostname())
    return max(1, len(os.sched_getaffinity(0)) // nodes.count(socket.gethostname()))


def resolve_device(wanted: str) -> torch.device:
    """Return the device for `learner.device`: "auto" takes CUDA where there is one."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise InputError(f"learner.device must be auto, cpu or cuda, got {wanted!r}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("learner.device=cuda, but torch finds no CUDA device. Set learner.device=cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def compute_dtype(precision: str) -> torch.dtype:
    """Return the dtype in which layers compute, for `learner.precision`."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def make_mesh(device: torch.device, replicas: int = 1) -> DeviceMesh:
    """Return the mesh of all ranks, of two dimensions where there are replicas. Collective."""
    world_size = dist.get_world_size()
    if replicas == 1:
        return init_device_mesh(device.type, (world_size,))
    shape, names = (replicas, world_size // replicas), ("replicate", "shard")
    return init_device_mesh(device.type, shape, mesh_dim_names=names)


def shard(policy: Policy, learner: LearnerConfig, device: torch.device, mesh: DeviceMesh) -> None:
    """Shard every decoder layer, then the rest, over a mesh, in place; a frozen tower is kept whole on every rank.

    Ranks run a frozen tower on different images at different times, so it must need no collective.

    Raises:
        RsgrpoError: offload without an accelerator.
    """
    if learner.offload and device.type == "cpu":
        raise RsgrpoError(
            "learner.offload=true moves weights from a GPU to CPU memory, but no GPU is used. Set learner.offload=false"
        )
    dtype = compute_dtype(learner.precision)
    mixed = dtype != torch.float32
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32) if mixed else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy() if learner.offload else OffloadPolicy(),
    }
    family, model = policy.family, policy.hf
    tower = family.vision_tower(model)
    layers = list(family.decoder_layers(model))
    if learner.compile:
        for layer in layers:
            layer.compile(dynamic=True)
    if policy.frozen_tower and not policy.is_empty:
        tower.to(device)
    blocks = layers if policy.frozen_tower else [*family.vision_blocks(model), *layers]
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(policy, **options, ignored_params=set(tower.parameters()) if policy.frozen_tower else None)
    _prefetch(layers)
    if not policy.is_empty:
        _set_buffers(policy, dict(policy.named_buffers()), device)


def fill(policy: Policy, source: Any, learner: LearnerConfig, device: torch.device) -> None:
    """Give a policy that was sharded empty its weights and buffers. Collective.

    source: the loaded model on rank 0, None elsewhere; its tensors are sent one at a time.
    """
    banned_V = policy.banned_V.clone()
    policy.to_empty(device="cpu" if learner.offload else device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(policy.hf, {} if source is None else source.state_dict(), options=options)
    if policy.frozen_tower:  # after the weights came, which torch wants on one device; a trained tower is offloaded too
        policy.family.vision_tower(policy.hf).to(device)
    buffers = {name: buffer.to(device) for name, buffer in policy.hf.named_buffers()}
    for name, buffer in buffers.items():
        # Rotary frequencies are in no state dict.
        if source is not None:
            buffer.copy_(source.get_buffer(name))
        dist.broadcast(buffer, 0)
    _set_buffers(policy.hf, buffers, device)
    policy.banned_V = banned_V.to(device)
    if source is not None:
        policy.hf.generation_config = source.generation_config


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of which every rank may hold a shard. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def give_back(policy: Policy, device: torch.device) -> None:
    """Free what a pass leaves behind: weights that it gathered, and memory that torch keeps to allocate from.

    Until its next backward the outermost group's parameters would otherwise be whole and in the compute dtype instead
    of the float32 shards, and an engine on the same device would find no room to wake up.
    """
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _set_buffers(module: nn.Module, buffers: dict[str, torch.Tensor], device: torch.device) -> None:
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, buffer.to(device))


def _prefetch(layers: list[nn.Module]) -> None:
    """Gather the next layer's weights while this one computes, in forward and in backward."""
    for this, following in itertools.pairwise(layers):
        if isinstance(this, FSDPModule) and isinstance(following, FSDPModule):
            this.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([this])
