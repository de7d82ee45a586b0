"""One rank of many, of a model of any size, in seconds: torch's fake process group and tensors without storage.

What runs is the learner's own policy, sharding, checkpointing and optimiser; what is counted is the bytes alive.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForImageTextToText

from rsgrpo.config.train import LearnerConfig, LoraConfig
from rsgrpo.learning.attention import SDPA
from rsgrpo.learning.context import ALONE, Team, make_team
from rsgrpo.learning.fsdp import compute_dtype, make_mesh, shard
from rsgrpo.learning.optimizer import Optimizer
from rsgrpo.learning.policy import Policy, add_lora, recompute, shrink
from rsgrpo.types import MicroBatch, PrefixLayout

CPU = torch.device("cpu")


@contextmanager
def fake_ranks(rank: int, world_size: int) -> Iterator[None]:
    """Be one rank of a process group whose collectives return at once; the group of the process is put back."""
    world = distributed_c10d._world
    distributed_c10d._world = distributed_c10d._World()
    try:
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        yield
    finally:
        distributed_c10d._world = world


@dataclass
class Watch(TorchDispatchMode):
    """Counts bytes of storages that are alive, and notes the collectives."""

    peak: int = 0
    collectives: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def note(self, tensor: torch.Tensor) -> None:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        self._alive[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            sizes = [leaf.numel() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.collectives.append((str(func), sum(sizes)))
        known = len(self._alive)
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf)
        if len(self._alive) > known or func.namespace == "c10d":
            storages = {key: storage for key, ref in self._alive.items() if (storage := ref()) is not None}
            self._alive = {key: self._alive[key] for key in storages}
            self.peak = max(self.peak, sum(storage.nbytes() for storage in storages.values()))
        return output


def row(prompt_tokens: int, response_lengths: tuple[int, ...], team: Team = ALONE) -> MicroBatch:
    """Return a row of text, or a rank's share of one."""
    own, held = response_lengths, prompt_tokens
    whole: tuple[int, ...] = ()
    if team.size > 1:
        dealt = team.deal(response_lengths)
        own = tuple(length for length, rank in zip(response_lengths, dealt, strict=True) if rank == team.rank) or (1,)
        held = sum(length for _, length in team.slices(prompt_tokens, team.rank)) + 1
        whole = (prompt_tokens,)
    total, responses = held + sum(own), sum(own)
    zeros_N = torch.zeros(responses, dtype=torch.int64)
    return MicroBatch(
        PrefixLayout((held,), (own,), whole),
        token_ids_T=torch.zeros(total, dtype=torch.int64),
        position_ids_3T=torch.zeros(3, total, dtype=torch.int64),
        features=None,
        pixel_values=None,
        image_grid_thw=None,
        head_index_N=zeros_N,
        targets_N=zeros_N,
        sample_index_N=zeros_N,
        scope_KN=torch.ones(1, responses, dtype=torch.bool),
        advantages_KN=torch.ones(1, responses),
    )


def watch_step(
    values: Mapping[str, Any],
    learner: LearnerConfig,
    rows: list[tuple[int, tuple[int, ...]]],
    *,
    rank: int = 0,
    lora: LoraConfig | None = None,
) -> Watch:
    """Run these rows, (prompt tokens, response lengths), through one rank of the learner; the optimiser has state.

    values: of a config.json. The tower is frozen, and its weights and a LoRA run's base are exact in bfloat16.
    """
    settings = AutoConfig.for_model("qwen2_5_vl", **values)
    build: Any = AutoModelForImageTextToText.from_config
    with fake_ranks(rank, learner.num_ranks):
        mesh = make_mesh(CPU)  # of real tensors
        with torch.device("meta"):
            model = build(settings, dtype=torch.float32)
        if lora is not None:
            add_lora(model, lora, seed=0)
        policy = Policy(
            model,
            banned_token_ids=[5],
            attention=SDPA,
            logits_chunk_tokens=learner.logits_chunk_tokens,
            frozen_tower=True,
            compute_dtype=compute_dtype(learner.precision),
            team=make_team(learner.context_parallel),
        )
        recompute(policy, learner.gradient_checkpointing)
        shrink(policy, model, [True, True])
        with FakeTensorMode(allow_non_fake_inputs=True):
            _materialise(policy.hf)
            policy.is_empty = True  # there is nothing to move to the device
            shard(policy, learner, CPU, mesh)
            optimizer = Optimizer(policy.trainable().values(), (), learner, total_steps=1)
            watch = Watch()
            for tensor in itertools.chain(policy.parameters(), policy.buffers()):
                watch.note(tensor)
            with watch:
                _learn(policy, row(1, (1,), policy.team))
                optimizer.adamw.step()
                optimizer.adamw.zero_grad(set_to_none=True)
                _learn(policy, row(1, (1,), policy.team))
                for prompt_tokens, response_lengths in rows:
                    _learn(policy, row(prompt_tokens, response_lengths, policy.team))
    return watch


def _learn(policy: Policy, batch: MicroBatch) -> None:
    torch.autograd.backward(policy(batch, 1.0, False).logprobs_N.sum())


def _materialise(model: nn.Module) -> None:
    """Replace tensors without device by fake ones on the CPU; Module.to_empty does not take fake tensors."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(new, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
