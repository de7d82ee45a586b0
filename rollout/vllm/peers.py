"""The engines as the sender of weights sees them: calls that each engine must answer in time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rollout.errors import RsgrpoError
from rollout.vllm.wire import own_address

Wait = Callable[[float], Any]
"""Returns the result of a call, or raises TimeoutError after this many seconds; it may be called again."""

POLL_S = 0.02


class TransferError(RsgrpoError):
    """A weight sync did not finish, or left different weights. Names the engine, which must be restarted."""


@dataclass(frozen=True)
class Peer:
    """One engine, in this process or behind Ray.

    name: for errors; unique.
    num_workers: its tensor-parallel size.
    call: starts a method of the engine (`VllmEngine.transfer_*`, `load_adapter`, `checksums`) and returns its Wait.
    """

    name: str
    num_workers: int
    call: Callable[[str, tuple[Any, ...]], Wait]


def local_peer(engine: Any) -> Peer:
    """Reach an engine of this process; each call runs on its own thread."""
    return Peer(
        engine.name, engine.num_workers, lambda method, args: _on_thread(lambda: getattr(engine, method)(*args))
    )


class Peers:
    """Calls all engines at once and reports which one failed or did not answer.

    world_size: ranks of a group of the sender and all workers of all engines. address: where they reach the sender.
    """

    def __init__(self, peers: Sequence[Peer], timeout_s: float, address: str = "") -> None:
        """Take engines that are up; `address` "" is that of the interface of this machine's default route."""
        self.peers = peers
        self.timeout_s = timeout_s
        self.address = address or own_address()
        self.world_size = 1 + sum(peer.num_workers for peer in peers)

    def call(self, method: str, *args: Any, meanwhile: Callable[[], None] | None = None) -> list[Any]:
        """Call `method(*args)` on every engine and return the results; `meanwhile` as for `call_each`."""
        return self.call_each(method, [args for _ in self.peers], meanwhile)

    def call_each(
        self, method: str, args_of_peer: Sequence[tuple[Any, ...]], meanwhile: Callable[[], None] | None = None
    ) -> list[Any]:
        """Call `method` on every engine with its own arguments and return the results.

        meanwhile: the sender's part of a collective; it runs on a daemon thread and must finish in time as well.

        Raises:
            TransferError: names the engine that failed, or those that did not answer in time.
        """
        deadline = time.monotonic() + self.timeout_s
        waiting = {peer.name: peer.call(method, args) for peer, args in zip(self.peers, args_of_peer, strict=True)}
        if meanwhile is not None:
            waiting["the sender"] = _on_thread(meanwhile)
        results: dict[str, Any] = {}
        # Poll all of them in turn: when one engine fails, the others wait for it until their own timeout.
        while waiting:
            if time.monotonic() > deadline:
                raise TransferError(
                    f"weight sync: no answer to {method} from {', '.join(waiting)} within {self.timeout_s:g} s"
                )
            for name, wait in list(waiting.items()):
                try:
                    results[name] = wait(POLL_S)
                except TimeoutError:
                    continue
                except Exception as error:
                    others = ", ".join(other for other in waiting if other != name)
                    silent = f" (no answer yet from {others})" if others else ""
                    raise TransferError(f"weight sync: {method} failed on {name}{silent}: {error}") from error
                del waiting[name]
        return [results[peer.name] for peer in self.peers]


def _on_thread(work: Callable[[], Any]) -> Wait:
    """Run `work` on a daemon thread: a collective that never returns must not keep the process alive."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="weight-sync").start()
    return future.result
