"""What both ends of the gloo weight transfer share: named tensors as bytes, their group, and checksums.

Needs torch alone, so that a learner without vLLM can send.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

NamedTensor = tuple[str, torch.Tensor]

CHECKSUM_CHUNK = 1 << 24


class GlooGroup:
    """Rank 0 broadcasts byte buffers to the others, apart from any other process group of the process."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._group: Any = dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, world_size, self._timeout)
        self._options = dist.BroadcastOptions()
        self._options.rootRank = 0

    @classmethod
    def join(cls, address: str, port: int, rank: int, world_size: int, *, timeout_s: float) -> GlooGroup:
        """Meet the others at a store that rank 0 keeps."""
        store = dist.TCPStore(address, port, world_size, is_master=False, timeout=timedelta(seconds=timeout_s))
        return cls(store, rank, world_size, timeout_s)

    def send(self, buffer: torch.Tensor) -> None:
        """Broadcast a uint8 buffer from rank 0."""
        self._group.broadcast([buffer], self._options).wait(self._timeout)

    def receive(self, num_bytes: int) -> torch.Tensor:
        """Return the uint8 buffer that rank 0 broadcasts."""
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        self._group.broadcast([buffer], self._options).wait(self._timeout)
        return buffer


def pack(bucket: Sequence[NamedTensor]) -> torch.Tensor:
    """Return the bytes of all tensors in one uint8 buffer on the CPU."""
    return torch.cat([tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for _, tensor in bucket])


def unpack(
    receive: Callable[[int], torch.Tensor], names: Sequence[str], dtype_names: Sequence[str], shapes: Sequence[Any]
) -> Iterator[NamedTensor]:
    """Receive one buffer and yield the tensors in it, each in memory of its own."""
    dtypes = [getattr(torch, name) for name in dtype_names]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    parts = receive(sum(sizes)).split(sizes)
    for name, part, dtype, shape in zip(names, parts, dtypes, shapes, strict=True):
        yield name, part.clone().view(dtype).view(tuple(shape))


def checksum(tensor: torch.Tensor) -> tuple[float, float, int]:
    """Return (sum, sum of squares, elements) in float64: numbers that add up over the shards of a tensor."""
    flat = tensor.detach().reshape(-1)
    total = squares = torch.zeros((), dtype=torch.float64, device=flat.device)
    for part in flat.split(CHECKSUM_CHUNK):  # float64 copies of an embedding would not fit beside it
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
    """Return the address under which other machines reach this one; the loopback address when there is no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: nothing is sent, only a route is looked up
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
