"""The sender's side of the weight transfer without vLLM: buckets, checksums, gloo, and engines that do not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from rollout.vllm.peers import Peer, TransferError
from rollout.vllm.weights_out import _first_difference, build_sender
from rollout.vllm.wire import GlooGroup, buckets, checksum, pack, unpack


def never(timeout_s):
    """An answer that does not come."""
    time.sleep(timeout_s)
    raise TimeoutError


def scripted_peer(name, answers):
    """Answer each method by `answers[method](*args)`, at once; a missing method is never answered."""

    def call(method, args):
        return (lambda timeout_s: answers[method](*args)) if method in answers else never

    return Peer(name, 1, call)


def engine_in_thread(name, received, *, forget=()):
    """A peer that takes part in the gloo group as an engine would and keeps what it received."""
    state = {}

    def init(info):
        state["group"] = GlooGroup.join(
            info["address"], info["port"], info["rank_offset"], info["world_size"], timeout_s=info["timeout_s"]
        )

    def update(info):
        named = unpack(state["group"].receive, info["names"], info["dtype_names"], info["shapes"])
        received.update({key: tensor for key, tensor in named if key not in forget})

    methods: dict[str, Callable] = {
        "transfer_init": init,
        "transfer_start": lambda: None,
        "transfer_update": update,
        "transfer_finish": lambda version: received.update(version=version),
        "checksums": lambda names: [[([key], *checksum(received.get(key, torch.zeros(2)))) for key in names]],
    }

    def call(method, args):
        outcome = []
        thread = threading.Thread(target=lambda: outcome.append(methods[method](*args)), daemon=True)
        thread.start()

        def wait(timeout_s):
            thread.join(timeout_s)
            if thread.is_alive():
                raise TimeoutError
            return outcome[0]

        return wait

    return Peer(name, 1, call)


def test_buckets_hold_consecutive_tensors_up_to_the_limit_and_a_larger_one_alone():
    sizes = {"a": 2, "b": 2, "c": 1, "d": 9, "e": 1}  # float32: 4 bytes each, limit 16 bytes
    tensors = [(name, torch.zeros(size)) for name, size in sizes.items()]
    assert [[name for name, _ in bucket] for bucket in buckets(tensors, 16)] == [["a", "b"], ["c"], ["d"], ["e"]]


def test_tensors_of_odd_sizes_and_mixed_types_survive_packing():
    tensors = [
        ("odd", torch.tensor([1.5, -2.0, 3.0]).bfloat16()),
        ("matrix", torch.arange(6, dtype=torch.float32).reshape(2, 3).T),
        ("scalar", torch.tensor(7)),
    ]
    buffer = pack(tensors)
    assert buffer.numel() == 3 * 2 + 6 * 4 + 8
    dtype_names = [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors]
    back = dict(unpack(lambda _: buffer, [n for n, _ in tensors], dtype_names, [t.shape for _, t in tensors]))
    for name, tensor in tensors:
        assert torch.equal(back[name], tensor)


def test_a_checksum_is_sum_squares_and_count():
    assert checksum(torch.tensor([[1.0, -2.0], [3.0, 0.5]])) == (2.5, 14.25, 4)
    assert checksum(torch.zeros(0)) == (0.0, 0.0, 0)


def test_shards_replicas_and_fused_parameters_agree_and_a_stale_one_is_named():
    q, k, norm, out = torch.ones(4, 2), torch.full((2, 2), 3.0), torch.tensor([1.0, 2.0]), torch.arange(8.0)
    sent = {"q": checksum(q), "k": checksum(k), "norm": checksum(norm), "out": checksum(out), "repacked": checksum(out)}

    def worker(rank, out_half):
        fused = torch.cat([q[2 * rank : 2 * rank + 2], k[rank : rank + 1]])
        return [
            (["q", "k"], *checksum(fused)),
            (["norm"], *checksum(norm)),
            (["out"], *checksum(out_half)),
            (["repacked"], 0.0, 0.0, 0),
        ]

    assert _first_difference(sent, [worker(0, out[:4]), worker(1, out[4:])]) == (None, 3)
    assert _first_difference(sent, [worker(0, out[:4]), worker(1, out[4:] + 1e-3)]) == ("out", 2)
    sent["k"] = checksum(k + 1)
    assert _first_difference(sent, [worker(0, out[:4]), worker(1, out[4:])])[0] == "q + k"


def test_two_engines_receive_all_buckets_of_both_versions():
    first: dict = {}
    second: dict = {}
    peers = [engine_in_thread("engine 0", first), engine_in_thread("engine 1", second)]
    sender = build_sender(peers, backend="gloo", bucket_bytes=16, dtype=torch.bfloat16, timeout_s=20)
    weights = {"a": torch.randn(3), "b": torch.randn(7), "c": torch.randn(2)}
    sender.send(weights.items(), 1)
    sender.send({name: tensor + 1 for name, tensor in weights.items()}.items(), 2)
    sender.close()
    for received in (first, second):
        assert received.pop("version") == 2
        assert {name: tensor.dtype for name, tensor in received.items()} == dict.fromkeys(weights, torch.bfloat16)
        assert all(torch.equal(received[name], (tensor + 1).bfloat16()) for name, tensor in weights.items())


def test_an_engine_that_keeps_an_old_tensor_is_named_with_the_tensor():
    peers = [engine_in_thread("engine 0", {}), engine_in_thread("engine 1", {}, forget=("b",))]
    sender = build_sender(peers, backend="gloo", timeout_s=20)
    with pytest.raises(TransferError, match="engine 1 holds other values of b than version 3"):
        sender.send({"a": torch.ones(2), "b": torch.ones(2)}.items(), 3)


def test_checksums_are_compared_on_every_nth_sync_only():
    asked = []
    peer = engine_in_thread("engine 0", {})

    def count(method, args):
        asked.append(method)
        return peer.call(method, args)

    counting = Peer("engine 0", 1, count)
    sender = build_sender([counting], backend="gloo", timeout_s=20, verify_every=2)
    for version in range(1, 4):
        sender.send({"a": torch.ones(2)}.items(), version)
    assert asked.count("checksums") == 2


def test_an_engine_that_does_not_answer_is_named_within_the_timeout():
    received: dict = {}
    quick, slow = engine_in_thread("engine 0", received), engine_in_thread("engine 1", {})
    stuck = Peer("engine 1", 1, lambda method, args: never if method == "transfer_start" else slow.call(method, args))
    sender = build_sender([quick, stuck], backend="gloo", timeout_s=2)
    started = time.monotonic()
    with pytest.raises(TransferError, match="no answer to transfer_start from engine 1 within 2 s"):
        sender.send({"a": torch.ones(2)}.items(), 1)
    assert time.monotonic() - started < 5
    assert received == {}


def test_engines_that_never_join_are_named():
    with pytest.raises(TransferError, match=r"transfer_init .*engine 0, engine 1"):
        build_sender([scripted_peer("engine 0", {}), scripted_peer("engine 1", {})], backend="gloo", timeout_s=1)


def test_a_failure_of_one_engine_is_reported_at_once_with_its_cause():
    def dead(*args):
        raise RuntimeError("out of memory")

    peers = [scripted_peer("engine 0", {}), scripted_peer("engine 1", {"transfer_init": dead})]
    started = time.monotonic()
    with pytest.raises(TransferError, match=r"transfer_init failed on engine 1 .*: out of memory"):
        build_sender(peers, backend="gloo", timeout_s=60)
    assert time.monotonic() - started < 10


def test_other_ranks_only_walk_through_the_tensors():
    walked = []

    def walk():
        for name in "abc":
            walked.append(name)
            yield name, torch.ones(1)

    tensors = walk()
    follower = build_sender([], backend="gloo", rank=1)
    follower.send(tensors, 1)
    follower.close()
    assert walked == ["a", "b", "c"]
