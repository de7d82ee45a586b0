"""The learner's end of the weight transfer to vLLM engines.

The transport is vLLM's own on GPUs (nccl, ipc) and imported only there. Knows tensors by their Hugging Face names;
nothing of the model, of learning, or of how an engine is reached: a `Peer` carries the calls.
"""

from __future__ import annotations

import base64
import itertools
import logging
import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, cast

import safetensors.torch
import torch
import torch.distributed as dist

from rollout.vllm.peers import Engines, Peer, TransferError
from rollout.vllm.wire import GlooGroup, NamedTensor, buckets, checksum, free_port, own_address, pack

log = logging.getLogger(__name__)


class WeightSender(Protocol):
    """What the learner holds on every rank."""

    def send(self, named_tensors: Iterable[NamedTensor], version: int) -> None:
        """Bring all engines to `version`. Called on every rank with the rank's own iterator of the same order."""
        ...

    def close(self) -> None:
        """Leave the group; calling it twice is allowed."""
        ...


def build_sender(
    peers: Sequence[Peer],
    *,
    backend: str,
    rank: int = 0,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = 512 * 2**20,
    timeout_s: float = 300.0,
    verify_every: int = 1,
) -> WeightSender:
    """Connect a learner rank to all engines; every rank calls it, in "gloo" and "nccl" only rank 0 connects.

    backend: "gloo", "nccl" or "ipc", as the engines were started with.
    dtype: floating tensors are sent in it (the engines' own saves bandwidth); None sends them as they are.
    timeout_s: the longest that one phase (connect, start, one bucket, finish) may take.
    verify_every: compare checksums of every n-th sync, the first included; 0 is never.

    Raises:
        TransferError: an engine did not answer in time.
    """
    if backend == "ipc":
        return _IpcSender(Engines(peers, timeout_s), rank, dtype, bucket_bytes, verify_every)
    if rank > 0:
        return _Follower()
    link: type[_GlooLink] | type[_NcclLink] = _GlooLink if backend == "gloo" else _NcclLink
    return _BroadcastSender(Engines(peers, timeout_s), link, dtype, bucket_bytes, verify_every)


class AdapterSender:
    """Ships a LoRA adapter's own tensors; the base weights stay as the engine loaded them."""

    def __init__(
        self, peers: Sequence[Peer], adapter_config: dict[str, Any], *, rank: int = 0, timeout_s: float = 300.0
    ) -> None:
        self._engines = Engines(peers, timeout_s)
        self._config = adapter_config
        self._rank = rank

    def send(self, named_tensors: Iterable[NamedTensor], version: int) -> None:
        """Send the adapter in peft's names (`base_model.model.….lora_A.weight`) to every engine."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named_tensors}
        if self._rank == 0:
            self._engines.all("load_adapter", safetensors.torch.save(tensors), self._config, version)

    def close(self) -> None:
        """Nothing is held open."""


def _first_difference(
    sent: dict[str, tuple[float, float, int]], held_by_worker: list[list[tuple[list[str], float, float, int]]]
) -> tuple[str | None, int]:
    """Return the first parameter that an engine holds otherwise than it was sent (None: none), and how many agreed.

    held_by_worker: `resident_checksums` of each of the engine's workers. A parameter is either split over the workers,
        and their sums add up, or each has all of it. What is neither (repacked or replicated in part) is not compared.
    """
    compared = 0
    for parts in zip(*held_by_worker, strict=True):
        members = parts[0][0]
        expected = [sum(column) for column in zip(*(sent[name] for name in members), strict=True)]
        held = [sum(column) for column in zip(*(part[1:] for part in parts), strict=True)]
        replicas = [list(part[1:]) for part in parts] if all(part[3] == expected[2] for part in parts) else [held]
        if replicas == [held] and held[2] != expected[2]:
            continue
        # |sum| <= sqrt(elements * sum of squares), which bounds the rounding of a sum taken in another order.
        scale = math.sqrt(expected[1] * expected[2])
        for total, squares, _ in replicas:
            if abs(total - expected[0]) > 1e-10 * scale or abs(squares - expected[1]) > 1e-10 * expected[1]:
                return " + ".join(members), compared
        compared += 1
    return None, compared


class _Verifier:
    """Adds up checksums while tensors are sent, and compares them with what the engines hold afterwards."""

    def __init__(self, engines: Engines, every: int) -> None:
        self._engines = engines
        self._every = every
        self._syncs = itertools.count()
        self._sums: dict[str, tuple[float, float, int]] | None = None

    def watch(self, named_tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """Pass tensors through."""
        self._sums = {} if self._every and next(self._syncs) % self._every == 0 else None
        for name, tensor in named_tensors:
            if self._sums is not None:
                self._sums[name] = checksum(tensor)
            yield name, tensor

    def check(self, version: int) -> None:
        """Raise TransferError naming the engine and the parameter that differs."""
        if self._sums is None:
            return
        answers = self._engines.all("checksums", list(self._sums))
        for peer, held_by_worker in zip(self._engines.peers, answers, strict=True):
            differs, compared = _first_difference(self._sums, held_by_worker)
            if differs is not None:
                raise TransferError(
                    f"weight sync: {peer.name} holds other values of {differs} than version {version} has"
                )
            log.info("weights %d on %s: %d parameters agree", version, peer.name, compared)


class _Follower:
    """A learner rank that only helps to gather."""

    def send(self, named_tensors: Iterable[NamedTensor], version: int) -> None:
        for _ in named_tensors:
            pass

    def close(self) -> None:
        pass


class _BroadcastSender:
    """Rank 0 of the learner: broadcasts bucket after bucket to all workers of all engines."""

    def __init__(
        self,
        engines: Engines,
        link: type[_GlooLink] | type[_NcclLink],
        dtype: torch.dtype | None,
        bucket_bytes: int,
        verify_every: int,
    ) -> None:
        self._engines = engines
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._verifier = _Verifier(engines, verify_every)
        self._link = link(engines, bucket_bytes)

    def send(self, named_tensors: Iterable[NamedTensor], version: int) -> None:
        """Send all tensors as one version."""
        tensors = self._verifier.watch(_cast(named_tensors, self._dtype))
        self._engines.all("transfer_start")
        for bucket in buckets(tensors, self._bucket_bytes):
            info = {
                "names": [name for name, _ in bucket],
                "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                "shapes": [list(tensor.shape) for _, tensor in bucket],
            }
            args = [(info,) for _ in self._engines.peers]
            self._engines.each("transfer_update", args, partial(self._link.send, bucket))
        self._engines.all("transfer_finish", version)
        self._verifier.check(version)

    def close(self) -> None:
        """Leave the group."""
        self._link.close()


class _GlooLink:
    """The sender's end of a gloo group."""

    def __init__(self, engines: Engines, bucket_bytes: int) -> None:
        world_size = 1 + engines.num_workers
        timeout = timedelta(seconds=engines.timeout_s)
        address = own_address()
        store = dist.TCPStore(address, 0, world_size, is_master=True, wait_for_workers=False, timeout=timeout)
        infos = [
            (
                {
                    "address": address,
                    "port": store.port,
                    "rank_offset": offset,
                    "world_size": world_size,
                    "timeout_s": engines.timeout_s,
                },
            )
            for offset in _rank_offsets(engines.peers)
        ]

        def connect() -> None:
            self._group: GlooGroup | None = GlooGroup(store, 0, world_size, engines.timeout_s)

        engines.each("transfer_init", infos, connect)

    def send(self, bucket: Sequence[NamedTensor]) -> None:
        """Broadcast one bucket."""
        assert self._group is not None, "send after close"
        self._group.send(pack(bucket))

    def close(self) -> None:
        """Leave the group."""
        self._group = None


class _NcclLink:
    """The sender's end of vLLM's packed nccl transport: one packed broadcast for each bucket."""

    def __init__(self, engines: Engines, bucket_bytes: int) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        address, port = own_address(), free_port()
        world_size = 1 + engines.num_workers
        self._buffer_bytes = 2 * bucket_bytes  # above any bucket, so that a bucket is never split
        meet = {"master_address": address, "master_port": port, "world_size": world_size}
        infos = [(info,) for info in nccl_infos(engines.peers, meet, self._buffer_bytes)]
        self._device = torch.cuda.current_device()
        self._group: Any = None

        def connect() -> None:
            torch.cuda.set_device(self._device)
            self._group = trainer_init(meet)

        engines.each("transfer_init", infos, connect)

    def send(self, bucket: Sequence[NamedTensor]) -> None:
        """Broadcast one bucket; returns when its bytes have left."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        torch.cuda.set_device(self._device)
        torch.cuda.current_stream().synchronize()  # the gather that made the tensors
        packed_nccl_broadcast_producer(
            iterator=iter(bucket),
            group=self._group,
            src=0,
            post_iter_func=lambda item: item[1].detach().cuda(),  # an offloaded learner gathers on the CPU
            buffer_size_bytes=self._buffer_bytes,
        )

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.destroy()
            self._group = None


class _IpcSender:
    """Every learner rank shares its copy of the weights with the engine worker on its own GPU (vLLM's packed ipc)."""

    def __init__(
        self, engines: Engines, rank: int, dtype: torch.dtype | None, bucket_bytes: int, verify_every: int
    ) -> None:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine

        self._tensors: Iterable[NamedTensor] = ()
        self._rank = rank
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._verifier = _Verifier(engines, verify_every)
        self._client = _IpcClient(engines)
        init_info = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=bucket_bytes)
        client, source = cast(Any, self._client), cast(Any, self)  # what is asked of both, without vLLM's base classes
        self._transfer = IPCTrainerWeightTransferEngine.trainer_init(init_info, client=client, source=source)

    def __iter__(self) -> Iterator[NamedTensor]:
        """Yield the tensors of the sync under way: this object is the source that vLLM's end reads."""
        for name, tensor in self._tensors:
            if tensor.nbytes > self._bucket_bytes:
                raise TransferError(
                    f"{name} has {tensor.nbytes / 2**20:.0f} MiB, rollout.vllm.sync_bucket_mib is "
                    f"{self._bucket_bytes / 2**20:.0f}; raise it to at least the largest tensor"
                )
            yield name, tensor

    def send(self, named_tensors: Iterable[NamedTensor], version: int) -> None:
        """Send all tensors as one version; the iterator must yield full tensors on every rank."""
        tensors = _cast(named_tensors, self._dtype)
        self._tensors = self._verifier.watch(tensors) if self._rank == 0 else tensors
        self._client.version = version
        self._transfer.send_weights()
        if self._rank == 0:
            self._verifier.check(version)

    def close(self) -> None:
        """Let go of shared memory."""
        self._transfer.shutdown()


class _IpcClient:
    """The four calls that vLLM's sender makes, passed on to all engines; handles travel pickled."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._engines.all("transfer_init", init_info)

    def start_weight_update(self) -> None:
        self._engines.all("transfer_start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        handles = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()
        self._engines.all("transfer_update", update_info | {"ipc_handles": None, "ipc_handles_pickled": handles})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._engines.all("transfer_finish", self.version)


def nccl_infos(peers: Sequence[Peer], meet: dict[str, Any], buffer_bytes: int) -> list[dict[str, Any]]:
    """Return, for each engine, what vLLM's nccl receiver is told; meet: where the group meets."""
    packing = {"packed": True, "packed_buffer_size_bytes": buffer_bytes}
    return [{**meet, **packing, "rank_offset": offset} for offset in _rank_offsets(peers)]


def _cast(named_tensors: Iterable[NamedTensor], dtype: torch.dtype | None) -> Iterator[NamedTensor]:
    for name, tensor in named_tensors:
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _rank_offsets(peers: Sequence[Peer]) -> list[int]:
    """Return the rank of each engine's first worker; rank 0 is the sender."""
    return list(itertools.accumulate((peer.num_workers for peer in peers[:-1]), initial=1))
