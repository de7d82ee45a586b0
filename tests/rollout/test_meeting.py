"""The ranks of a group on one machine listen where nobody else reaches them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import psutil
import pytest
import torch

from rollout.meeting import LOOPBACK, gloo_interface, is_loopback, join_store, serve_store
from rollout.vllm.peers import local_peer
from rollout.vllm.weights_out import build_sender
from rollout.vllm.wire import free_port
from tests.rollout.vllm.test_weights_out import Receiver

WAIT = timedelta(seconds=30)


@contextmanager
def new_listeners() -> Iterator[set[str]]:
    """Fill a set with the addresses at which this process listens at the end and did not in the beginning."""
    found: set[str] = set()
    before = set(listeners())
    yield found
    found |= {address for address, port in set(listeners()) - before}


def listeners() -> list[tuple[str, int]]:
    connections = psutil.Process().net_connections(kind="tcp")
    return [tuple(each.laddr) for each in connections if each.status == psutil.CONN_LISTEN]


def test_a_store_listens_at_its_address_alone():
    with new_listeners() as found:
        store = serve_store(LOOPBACK, 2, WAIT)
    assert found == {LOOPBACK}
    store.set("key", "value")
    assert join_store(LOOPBACK, store.port, 2, WAIT).get("key") == b"value"


def test_a_transfer_of_weights_on_one_machine_opens_no_other_door():
    engine = Receiver("engine 0")
    with new_listeners() as found:
        sender = build_sender([local_peer(engine)], backend="gloo", timeout_s=30, address=LOOPBACK)
        sender.send([("a", torch.ones(3))], 1)
    assert found == {LOOPBACK}
    assert engine.received["a"].tolist() == [1.0, 1.0, 1.0]
    sender.close()


RANKS = """
import sys, psutil
import torch.distributed as dist
from rsgrpo.learning.fsdp import init_distributed
rank, port = int(sys.argv[1]), int(sys.argv[2])
init_distributed(rank, 2, "127.0.0.1", port, "cpu")
dist.barrier()
found = [each.laddr.ip for each in psutil.Process().net_connections(kind="tcp") if each.status == psutil.CONN_LISTEN]
print(sorted(set(found)))
dist.barrier()
"""


def test_the_ranks_of_a_learner_on_one_machine_open_no_other_door():
    port = str(free_port())

    def run(rank: int) -> str:
        command = [sys.executable, "-c", RANKS, str(rank), port]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    with ThreadPoolExecutor(2) as pool:
        assert [line.strip() for line in pool.map(run, (0, 1))] == ["['127.0.0.1']"] * 2


@pytest.mark.parametrize(
    ("address", "local"), [("127.0.0.1", True), ("::1", True), ("192.0.2.1", False), ("node7", False)]
)
def test_only_loopback_addresses_count_as_such(address, local, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert is_loopback(address) is local
    with gloo_interface(address):
        assert ("GLOO_SOCKET_IFNAME" in os.environ) is local
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_an_interface_that_the_user_has_chosen_stays(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    with gloo_interface(LOOPBACK):
        assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
