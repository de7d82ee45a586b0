"""Where the processes of a group find each other: a store that only those who should can reach.

Torch's store has no password and listens on every interface of a machine; whoever reaches it can read its keys and take
a rank's place. So it listens on the loopback interface where all ranks are on one machine, and else on one address.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

LOOPBACK = "127.0.0.1"


def is_loopback(address: str) -> bool:
    """Return whether an address reaches this machine alone; a name never does."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def serve_store(address: str, world_size: int, timeout: timedelta, port: int = 0) -> Any:
    """Return rank 0's store, which listens on `address` and nowhere else; port 0: any that is free."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family, backlog=2048)
    port, descriptor = listener.getsockname()[1], listener.detach()
    return _store(
        address, port, world_size, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=descriptor
    )


def join_store(address: str, port: int, world_size: int, timeout: timedelta) -> Any:
    """Return the store of rank 0, once it listens."""
    return _store(address, port, world_size, is_master=False, wait_for_workers=False, timeout=timeout)


def _store(*arguments: Any, **options: Any) -> Any:
    return dist.TCPStore(*arguments, **options)  # type: ignore[attr-defined,unused-ignore]


def gloo_group(store: Any, address: str, rank: int, world_size: int, timeout: timedelta) -> Any:
    """Return a gloo group whose ranks meet at `address`; over loopback its connections stay there too."""
    gloo: Any = dist.ProcessGroupGloo  # type: ignore[attr-defined,unused-ignore]
    with gloo_interface(address):
        return gloo(store, rank, world_size, timeout)


@contextmanager
def gloo_interface(address: str) -> Iterator[None]:
    """Have gloo's default device listen on loopback while groups that meet there are made."""
    variable = "GLOO_SOCKET_IFNAME"
    if not is_loopback(address) or variable in os.environ:
        yield
        return
    os.environ[variable] = "lo0" if sys.platform == "darwin" else "lo"
    try:
        yield
    finally:
        del os.environ[variable]
