"""The learner's side of a weight sync with vLLM engines.

The steps of one sync:
1. Every rank of the learner calls `WeightSender.send` with its own iterator of named tensors, in the same order.
2. `Peers` (peers.py) calls `VllmEngine.transfer_start`: running requests end, new ones wait. A `Peer` carries each call
   to its engine, within this process or through Ray.
3. `_Verifier` converts the tensors to the engine's dtype and computes their checksums; `buckets` (wire.py) groups them.
4. For each bucket `VllmEngine.transfer_update` announces names and shapes, while a link moves the bytes: `_GlooLink` on
   CPU, `_NcclLink` between GPUs. On shared GPUs `_IpcSender` passes handles instead. nccl and ipc are vLLM's own.
5. In the engine's worker processes the receiver (weights_in.py for gloo, else vLLM's own) loads the bucket.
6. `VllmEngine.transfer_finish` refuses incomplete layers, drops all caches and lets sampling resume.
7. `_Verifier` compares its sums with what the workers hold (`WeightReceiver.resident_checksums`).
"""

from __future__ import annotations

import base64
import itertools
import logging
import math
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, cast

import safetensors.torch
import torch

from rollout.engine import Backend
from rollout.meeting import serve_store
from rollout.vllm.peers import Peer, Peers, TransferError
from rollout.vllm.wire import (
    Checksum,
    GlooGroup,
    HeldChecksum,
    NamedTensor,
    buckets,
    checksum,
    free_port,
    layout_of,
)

log = logging.getLogger(__name__)


class WeightSender:
    """What every rank of the learner sends with; by itself, a rank that takes part in gathering but sends nothing."""

    def send(self, named_tensors: Iterable[NamedTensor], version: int) -> None:
        """Bring all engines to `version`. Called on every rank with the rank's own iterator of the same order."""
        for _ in named_tensors:
            pass

    def close(self) -> None:
        """Leave the group; calling it twice is allowed."""


def build_sender(
    peers: Sequence[Peer],
    *,
    backend: Backend,
    rank: int = 0,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = 512 * 2**20,
    timeout_s: float = 300.0,
    verify_every: int = 1,
    address: str = "",
) -> WeightSender:
    """Connect a learner rank to all engines; every rank calls it, but with "gloo" and "nccl" only rank 0 connects.

    backend: `VllmEngine.backend`.
    dtype: floating-point tensors are sent in it (the engines' own saves bandwidth); None sends them as they are.
    timeout_s: limit of each phase (connect, start, one bucket, finish).
    verify_every: compare checksums after every n-th sync, the first included; 0 never compares.
    address: under which the engines reach this rank; "" is that of the interface of the default route.

    Raises:
        TransferError: an engine did not answer in time.
    """
    group = Peers(peers, timeout_s, address)
    verifier = _Verifier(group, verify_every if rank == 0 else 0, dtype)
    if backend == "ipc":
        return _IpcSender(group, rank, bucket_bytes, verifier)
    if rank > 0:
        return WeightSender()
    assert backend != "load", "its weights come by `load_weights`"
    link = _GlooLink(group) if backend == "gloo" else _NcclLink(group, bucket_bytes)
    return _BroadcastSender(group, link, bucket_bytes, verifier)


class AdapterSender(WeightSender):
    """Sends a LoRA adapter's tensors only; the base weights stay as the engine loaded them."""

    def __init__(
        self, peers: Sequence[Peer], adapter_config: dict[str, Any], *, rank: int = 0, timeout_s: float = 300.0
    ) -> None:
        self._peers = Peers(peers, timeout_s)
        self._config = adapter_config
        self._rank = rank

    def send(self, named_tensors: Iterable[NamedTensor], version: int) -> None:
        """Send the adapter in peft's names (`base_model.model.….lora_A.weight`) to every engine."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named_tensors}
        if self._rank == 0:
            self._peers.call("load_adapter", safetensors.torch.save(tensors), self._config, version)


def _first_difference(
    sent: Mapping[str, Checksum], held_by_worker: Sequence[Sequence[HeldChecksum]]
) -> tuple[str | None, int]:
    """Return the first parameter whose values in an engine differ from those sent (None: none), and how many agreed.

    A parameter is either split over the workers, and their sums add up, or each worker has all of it. One that is
    neither (repacked, or replicated in part) is not compared.
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
    """Converts outgoing tensors, computes their checksums, and compares them with what the engines hold afterwards."""

    def __init__(self, peers: Peers, every: int, dtype: torch.dtype | None = None) -> None:
        self._peers = peers
        self._every = every
        self._dtype = dtype
        self._syncs = itertools.count()
        self._sums: dict[str, Checksum] | None = None

    def outgoing(self, named_tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """Yield the tensors of one sync in the dtype in which they are sent."""
        self._sums = {} if self._every and next(self._syncs) % self._every == 0 else None
        for name, tensor in named_tensors:
            if self._dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(self._dtype)
            if self._sums is not None:
                self._sums[name] = checksum(tensor)
            yield name, tensor

    def check(self, version: int) -> None:
        """Raise TransferError naming the engine and the parameter that differs."""
        if self._sums is None:
            return
        answers = self._peers.call("checksums", list(self._sums))
        for peer, held_by_worker in zip(self._peers.peers, answers, strict=True):
            differs, compared = _first_difference(self._sums, held_by_worker)
            if differs is not None:
                raise TransferError(
                    f"weight sync: the values of {differs} on {peer.name} are not those of version {version}"
                )
            log.info("weights %d on %s: %d parameters agree", version, peer.name, compared)


class _BroadcastSender(WeightSender):
    """Rank 0 of the learner: broadcasts bucket after bucket to all workers of all engines."""

    def __init__(self, peers: Peers, link: _GlooLink | _NcclLink, bucket_bytes: int, verifier: _Verifier) -> None:
        self._peers = peers
        self._link = link
        self._bucket_bytes = bucket_bytes
        self._verifier = verifier

    def send(self, named_tensors: Iterable[NamedTensor], version: int) -> None:
        self._peers.call("transfer_start")
        for bucket in buckets(self._verifier.outgoing(named_tensors), self._bucket_bytes):
            self._peers.call("transfer_update", layout_of(bucket), meanwhile=partial(self._link.broadcast, bucket))
        self._peers.call("transfer_finish", version)
        self._verifier.check(version)

    def close(self) -> None:
        self._link.close()


class _GlooLink:
    """Rank 0 of a gloo group of the sender and all workers."""

    def __init__(self, peers: Peers) -> None:
        address, timeout = peers.address, timedelta(seconds=peers.timeout_s)
        store = serve_store(address, peers.world_size, timeout)
        meeting = {"address": address, "port": store.port, "timeout_s": peers.timeout_s}

        def join() -> None:
            self._group: GlooGroup | None = GlooGroup(store, address, 0, peers.world_size, peers.timeout_s)

        peers.call_each("transfer_init", init_infos(peers, meeting), join)

    def broadcast(self, bucket: Sequence[NamedTensor]) -> None:
        assert self._group is not None, "send after close"
        self._group.broadcast(bucket)

    def close(self) -> None:
        self._group = None


class _NcclLink:
    """Rank 0 of vLLM's packed nccl transport: one packed broadcast for each bucket."""

    def __init__(self, peers: Peers, bucket_bytes: int) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self._buffer_bytes = 2 * bucket_bytes  # above any bucket, so that a bucket is never split
        meeting = {"master_address": peers.address, "master_port": free_port()}
        self._device = torch.cuda.current_device()
        self._group: Any = None

        def join() -> None:
            torch.cuda.set_device(self._device)
            self._group = trainer_init(meeting | {"world_size": peers.world_size})

        peers.call_each("transfer_init", init_infos(peers, meeting | nccl_packing(self._buffer_bytes)), join)

    def broadcast(self, bucket: Sequence[NamedTensor]) -> None:
        """Return when the bucket's bytes have left."""
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
        if self._group is not None:
            self._group.destroy()
            self._group = None


class _IpcSender(WeightSender):
    """Every learner rank shares its copy of the weights with the engine worker on its own GPU (vLLM's packed ipc)."""

    def __init__(self, peers: Peers, rank: int, bucket_bytes: int, verifier: _Verifier) -> None:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine

        self._tensors: Iterable[NamedTensor] = ()
        self._bucket_bytes = bucket_bytes
        self._verifier = verifier
        self._client = _IpcClient(peers)
        init_info = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=bucket_bytes)
        client, source = cast(Any, self._client), cast(Any, self)  # both only behave like vLLM's base classes
        self._transfer = IPCTrainerWeightTransferEngine.trainer_init(init_info, client=client, source=source)

    def __iter__(self) -> Iterator[NamedTensor]:
        """Yield the tensors of the current sync: this object is the source that vLLM's sender reads."""
        for name, tensor in self._tensors:
            if tensor.nbytes > self._bucket_bytes:
                raise TransferError(
                    f"{name} has {tensor.nbytes / 2**20:.0f} MiB, but rollout.vllm.sync_bucket_mib is "
                    f"{self._bucket_bytes / 2**20:.0f}. Raise it to at least the largest tensor."
                )
            yield name, tensor

    def send(self, named_tensors: Iterable[NamedTensor], version: int) -> None:
        """Send all tensors as one version; every rank's iterator must yield full tensors.

        All ranks go through the whole send even where an engine has failed: they meet in collectives within it.
        """
        self._tensors = self._verifier.outgoing(named_tensors)
        self._client.version = version
        self._transfer.send_weights()
        self._client.raise_failure()
        self._verifier.check(version)

    def close(self) -> None:
        self._transfer.shutdown()


class _IpcClient:
    """Forwards the four calls of vLLM's sender to all engines; handles travel pickled.

    Only the sending rank has a client, and what it raised would take that rank alone out of the collectives. So the
    first failure is kept until the send is over, and the engines are not called again.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._failure: TransferError | None = None
        self.version = 0

    def raise_failure(self) -> None:
        """Raise what an engine has failed with since this client was made."""
        if self._failure is not None:
            raise self._failure

    def _call(self, method: str, *args: Any) -> None:
        if self._failure is None:
            try:
                self._peers.call(method, *args)
            except TransferError as error:
                self._failure = error

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("transfer_init", init_info)

    def start_weight_update(self) -> None:
        self._call("transfer_start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        handles = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()
        self._call("transfer_update", update_info | {"ipc_handles": None, "ipc_handles_pickled": handles})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("transfer_finish", self.version)


def init_infos(peers: Peers, meeting: Mapping[str, Any]) -> list[tuple[dict[str, Any]]]:
    """Return the arguments of each engine's `transfer_init`: where the group meets, and its first worker's rank."""
    first_ranks = itertools.accumulate((peer.num_workers for peer in peers.peers), initial=1)  # rank 0 sends
    shared = {**meeting, "world_size": peers.world_size}
    return [({**shared, "rank_offset": rank},) for rank, _ in zip(first_ranks, peers.peers, strict=False)]


def nccl_packing(buffer_bytes: int) -> dict[str, Any]:
    """Return what vLLM's nccl receiver must know of the sender's packing."""
    return {"packed": True, "packed_buffer_size_bytes": buffer_bytes}
