"""The sender's side of the weight transfer without vLLM: buckets, checksums, gloo, and engines that do not answer."""

from __future__ import annotations

import time

import pytest
import torch

from rollout.vllm.peers import TransferError, local_peer
from rollout.vllm.weights_out import _first_difference, build_sender
from rollout.vllm.wire import GlooGroup, buckets, checksum, from_buffer, layout_of, to_buffer


class Receiver:
    """Takes part in the gloo group as an engine would and keeps what it received, except what it is to forget."""

    num_workers = 1

    def __init__(self, name: str, forget: tuple[str, ...] = ()) -> None:
        self.name = name
        self.forget = forget
        self.received: dict[str, torch.Tensor] = {}
        self.version = 0
        self.times_asked = 0

    def transfer_init(self, info):
        rank, self.met_at = info.pop("rank_offset"), info["address"]
        self.group = GlooGroup.join(rank=rank, **info)

    def transfer_start(self):
        pass

    def transfer_update(self, layout):
        self.received |= {name: tensor for name, tensor in self.group.receive(**layout) if name not in self.forget}

    def transfer_finish(self, version):
        self.version = version

    def checksums(self, names):
        self.times_asked += 1
        return [[([name], *checksum(self.received.get(name, torch.zeros(2)))) for name in names]]


def silent(*args):
    """A call that is not answered in time."""
    time.sleep(4)


def connected(*engines: Receiver, timeout_s: float = 20, **options):
    return build_sender([local_peer(engine) for engine in engines], backend="gloo", timeout_s=timeout_s, **options)


def test_the_group_meets_at_the_address_that_the_sender_is_given():
    receiver = Receiver("engine 0")
    sender = connected(receiver, address="127.0.0.1")
    assert receiver.met_at == "127.0.0.1"
    sender.close()


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
    buffer = to_buffer(tensors)
    assert buffer.numel() == 3 * 2 + 6 * 4 + 8
    back = dict(from_buffer(buffer, **layout_of(tensors)))
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
    engines = Receiver("engine 0"), Receiver("engine 1")
    sender = connected(*engines, bucket_bytes=16, dtype=torch.bfloat16)
    weights = {"a": torch.randn(3), "b": torch.randn(7), "c": torch.randn(2)}
    sender.send(weights.items(), 1)
    sender.send({name: tensor + 1 for name, tensor in weights.items()}.items(), 2)
    sender.close()
    for engine in engines:
        assert engine.version == 2
        assert {name: tensor.dtype for name, tensor in engine.received.items()} == dict.fromkeys(
            weights, torch.bfloat16
        )
        assert all(torch.equal(engine.received[name], (tensor + 1).bfloat16()) for name, tensor in weights.items())


def test_a_stale_tensor_is_named_with_its_engine_on_every_nth_sync_only():
    engines = Receiver("engine 0"), Receiver("engine 1", forget=("b",))
    sender = connected(*engines, verify_every=2)
    for version in (1, 3):
        with pytest.raises(TransferError, match=f"the values of b on engine 1 are not those of version {version}"):
            sender.send({"a": torch.ones(2), "b": torch.ones(2)}.items(), version)
        sender.send({"a": torch.ones(2), "b": torch.ones(2)}.items(), version + 1)  # not compared
    assert engines[0].times_asked == 2


def test_an_engine_that_does_not_answer_is_named_within_the_timeout(monkeypatch):
    quick, stuck = Receiver("engine 0"), Receiver("engine 1")
    monkeypatch.setattr(stuck, "transfer_start", silent)
    sender = connected(quick, stuck, timeout_s=1)
    started = time.monotonic()
    with pytest.raises(TransferError, match="no answer to transfer_start from engine 1 within 1 s"):
        sender.send({"a": torch.ones(2)}.items(), 1)
    assert time.monotonic() - started < 3
    assert quick.received == {}


def test_engines_that_never_join_are_named(monkeypatch):
    monkeypatch.setattr(Receiver, "transfer_init", silent)
    with pytest.raises(TransferError, match=r"transfer_init .*engine 0, engine 1"):
        connected(Receiver("engine 0"), Receiver("engine 1"), timeout_s=1)


def test_a_failure_of_one_engine_is_reported_at_once_with_its_cause(monkeypatch):
    dead = Receiver("engine 1")

    def transfer_init(info):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(dead, "transfer_init", transfer_init)
    started = time.monotonic()
    with pytest.raises(TransferError, match=r"transfer_init failed on engine 1 .*: out of memory"):
        connected(Receiver("engine 0"), dead, timeout_s=8)
    assert time.monotonic() - started < 4


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
