"""What both ends of the gloo weight transfer share: named tensors as bytes, the process group, and checksums.

Only torch is needed, so that a learner without vLLM can send.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rollout.meeting import gloo_group, join_store

NamedTensor = tuple[str, torch.Tensor]
"""A weight under its Hugging Face name."""
Checksum = tuple[float, float, int]
"""(sum, sum of squares, elements), sums in float64; they add up over the shards of a tensor."""
HeldChecksum = tuple[list[str], float, float, int]
"""The Hugging Face names that one parameter of an engine holds, and the parameter's checksum."""

CHECKSUM_CHUNK = 1 << 24


class GlooGroup:
    """Broadcasts buckets of weights from rank 0, independent of the process's other groups."""

    def __init__(self, store: Any, address: str, rank: int, world_size: int, timeout_s: float) -> None:
        """Take the store, where all meet at `address`."""
        self._timeout = timedelta(seconds=timeout_s)
        store = dist.PrefixStore("weights", store)  # type: ignore[attr-defined,unused-ignore]
        self._group: Any = gloo_group(store, address, rank, world_size, self._timeout)
        self._options = dist.BroadcastOptions()
        self._options.rootRank = 0

    @classmethod
    def join(cls, address: str, port: int, rank: int, world_size: int, *, timeout_s: float) -> GlooGroup:
        """Join through the store of rank 0."""
        store = join_store(address, port, world_size, timedelta(seconds=timeout_s))
        return cls(store, address, rank, world_size, timeout_s)

    def broadcast(self, bucket: Sequence[NamedTensor]) -> None:
        """Send a bucket to all other ranks; called on rank 0."""
        self._broadcast(to_buffer(bucket))

    def receive(
        self, names: Sequence[str], dtype_names: Sequence[str], shapes: Sequence[Sequence[int]]
    ) -> Iterator[NamedTensor]:
        """Yield the tensors of the bucket that rank 0 broadcasts, described as by `layout_of`."""
        buffer = torch.empty(sum(_num_bytes(dtype_names, shapes)), dtype=torch.uint8)
        self._broadcast(buffer)
        return from_buffer(buffer, names, dtype_names, shapes)

    def _broadcast(self, buffer: torch.Tensor) -> None:
        self._group.broadcast([buffer], self._options).wait(self._timeout)


def layout_of(bucket: Sequence[NamedTensor]) -> dict[str, list[Any]]:
    """Return the names, dtype names and shapes of a bucket, in the order of their bytes."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def to_buffer(bucket: Sequence[NamedTensor]) -> torch.Tensor:
    """Return the bytes of all tensors in one uint8 buffer on the CPU."""
    return torch.cat([tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for _, tensor in bucket])


def from_buffer(
    buffer: torch.Tensor, names: Sequence[str], dtype_names: Sequence[str], shapes: Sequence[Sequence[int]]
) -> Iterator[NamedTensor]:
    """Yield the tensors whose bytes are in a buffer, each in its own memory."""
    parts = torch.split(buffer, _num_bytes(dtype_names, shapes))
    for name, part, dtype_name, shape in zip(names, parts, dtype_names, shapes, strict=True):
        yield name, part.clone().view(getattr(torch, dtype_name)).view(tuple(shape))


def _num_bytes(dtype_names: Sequence[str], shapes: Sequence[Sequence[int]]) -> list[int]:
    pairs = zip(dtype_names, shapes, strict=True)
    return [math.prod(shape) * getattr(torch, dtype_name).itemsize for dtype_name, shape in pairs]


def checksum(tensor: torch.Tensor) -> Checksum:
    """Return the checksum of a tensor on any device."""
    flat = tensor.detach().reshape(-1)
    total = squares = torch.zeros((), dtype=torch.float64, device=flat.device)
    for part in torch.split(flat, CHECKSUM_CHUNK):  # a float64 copy of a whole embedding would not fit
        exact = part.double()
        total, squares = total + exact.sum(), squares + exact.square().sum()
    return total.item(), squares.item(), flat.numel()


def buckets(named_tensors: Iterable[NamedTensor], max_bytes: int) -> Iterator[list[NamedTensor]]:
    """Yield consecutive tensors together while they fit in `max_bytes`; a larger one comes alone."""
    bucket: list[NamedTensor] = []
    num_bytes = 0
    for name, tensor in named_tensors:
        if bucket and num_bytes + tensor.nbytes > max_bytes:
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append((name, tensor))
        num_bytes += tensor.nbytes
    if bucket:
        yield bucket


def own_address() -> str:
    """Return the address under which other machines reach this one; the loopback address without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: nothing is sent, only a route is looked up
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
