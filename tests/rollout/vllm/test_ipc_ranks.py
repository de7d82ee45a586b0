"""Two learner ranks send by ipc while an engine fails: vLLM's own sender, with host memory in the place of CUDA's."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

pytest.importorskip("vllm", reason="vLLM is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch's compiler, which vLLM imports
    from vllm.distributed.weight_transfer import ipc_engine
    from vllm.distributed.weight_transfer.packed_tensor import PackedIpcChunk

from rollout.vllm.peers import Peer, TransferError, Wait
from rollout.vllm.weights_out import build_sender

WEIGHTS = [(name, torch.ones(3)) for name in "abcd"]


def host_chunks(iterator: Any, gpu_uuid: str, post_iter_func: Any, buffer_size_bytes: int) -> Iterator[PackedIpcChunk]:
    """Chunks of two tensors, without the CUDA buffer that vLLM would pack them into."""
    items = [(name, post_iter_func((name, tensor))) for name, tensor in iterator]
    for start in range(0, len(items), 2):
        names = [name for name, _ in items[start : start + 2]]
        yield PackedIpcChunk(
            names=names, shapes=[[3]] * 2, dtype_names=["float32"] * 2, tensor_sizes=[12] * 2, ipc_handle={gpu_uuid: ()}
        )


def rank_main(rank: int, meeting: str, fails: str, folder: Path) -> None:
    """Send twice; write how the sends ended, how far each went, and what the engine was asked."""
    distributed_c10d._world = distributed_c10d._World()  # forked: the parent's group has no threads here
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    asked: list[str] = []

    def call(method: str, args: tuple[Any, ...]) -> Wait:
        asked.append(method)

        def wait(timeout_s: float) -> list[Any]:
            if method == fails:
                raise RuntimeError("out of memory")
            return []

        return wait

    replaced: dict[str, Any] = {"get_device_properties": lambda index: SimpleNamespace(uuid=f"GPU-{rank}")}
    nothing = dict.fromkeys(("synchronize", "ipc_collect"), lambda: None)
    ipc_engine.torch = SimpleNamespace(  # type: ignore[attr-defined,unused-ignore]
        accelerator=SimpleNamespace(current_device_index=lambda: 0),
        cuda=SimpleNamespace(**replaced, **nothing),
        distributed=dist,
    )
    ipc_engine.packed_ipc_producer = host_chunks
    walked: list[str] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in WEIGHTS:
            dist.barrier()  # as a gather: every rank must come this way
            walked.append(name)
            yield name, tensor

    ended = ""
    try:
        sender = build_sender([Peer("engine 0", 2, call)], backend="ipc", rank=rank, timeout_s=5, verify_every=0)
        sender.send(tensors(), 1)
    except TransferError as error:
        ended = str(error)
    dist.barrier()  # both ranks are through: neither waits for the other inside a collective
    torch.save((ended, walked, asked), folder / f"{rank}.pt")


@pytest.mark.parametrize(
    ("fails", "asked"),
    [
        ("transfer_init", ["transfer_init"]),
        ("transfer_start", ["transfer_init", "transfer_start"]),
        ("transfer_update", ["transfer_init", "transfer_start", "transfer_update"]),
        ("transfer_finish", ["transfer_init", "transfer_start", *["transfer_update"] * 2, "transfer_finish"]),
        ("", ["transfer_init", "transfer_start", *["transfer_update"] * 2, "transfer_finish"]),
    ],
)
def test_a_failing_engine_leaves_all_ranks_in_step_and_is_named_after_the_send(fails, asked, tmp_path):
    context = multiprocessing.get_context("fork")  # the ranks inherit vLLM, which takes seconds to import
    meeting = f"file://{tmp_path / 'meeting'}"
    ranks = [context.Process(target=rank_main, args=(rank, meeting, fails, tmp_path)) for rank in range(2)]
    started = time.monotonic()
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(40)
    assert [process.exitcode for process in ranks] == [0, 0], f"after {time.monotonic() - started:.0f} s"
    (ended, walked, calls), (other_ended, other_walked, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert ended == (f"weight sync: {fails} failed on engine 0: out of memory" if fails else "")
    assert other_ended == ""
    assert walked == other_walked == list("abcd")
    assert calls == asked
