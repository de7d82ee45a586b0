"""The engines as the sender of weights sees them: calls that all of them must answer in time.

A `Peer` carries calls to one engine, in this process or through Ray; knows nothing of what is called.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rollout.errors import RsgrpoError

Wait = Callable[[float], Any]
"""Returns a call's result, or raises TimeoutError after so many seconds; it may be asked again."""


POLL_S = 0.02


class TransferError(RsgrpoError):
    """A weight sync did not finish, or left different weights; names the engine. The engine must be started anew."""


@dataclass(frozen=True)
class Peer:
    """One engine, as the sender sees it.

    name: for errors; unique.
    num_workers: its tensor-parallel size.
    call: starts a method of the engine (`VllmEngine.transfer_*`, `load_adapter`, `checksums`) and returns its Wait.
    """

    name: str
    num_workers: int
    call: Callable[[str, tuple[Any, ...]], Wait]


def local_peer(engine: Any) -> Peer:
    """Reach an engine of this process; each call runs on a thread of its own."""

    def call(method: str, args: tuple[Any, ...]) -> Wait:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(getattr(engine, method)(*args))
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True, name=f"call-{method}").start()
        return future.result

    return Peer(engine.name, engine.num_workers, call)


class Engines:
    """Calls all engines at once and says which one failed or did not answer."""

    def __init__(self, peers: Sequence[Peer], timeout_s: float) -> None:
        self.peers = peers
        self.timeout_s = timeout_s

    @property
    def num_workers(self) -> int:
        return sum(peer.num_workers for peer in self.peers)

    def all(self, method: str, *args: Any) -> list[Any]:
        """Call `method(*args)` on every engine and return their results."""
        return self.each(method, [args for _ in self.peers])

    def each(
        self, method: str, args_of_peer: Sequence[tuple[Any, ...]], meanwhile: Callable[[], None] | None = None
    ) -> list[Any]:
        """Call `method` on every engine with its own arguments and return the results.

        meanwhile: the sender's part of a collective; it runs on a daemon thread and must finish too.

        Raises:
            TransferError: names the engine that failed, or those that did not answer in time.
        """
        deadline = time.monotonic() + self.timeout_s
        calls = [(peer.name, peer.call(method, args)) for peer, args in zip(self.peers, args_of_peer, strict=True)]
        if meanwhile is not None:
            calls.append(("the sender", _in_thread(meanwhile)))
        results: dict[str, Any] = {}
        # Ask everybody in turn: one failed engine leaves the others waiting for it until their own timeout.
        while late := [name for name, _ in calls if name not in results]:
            if time.monotonic() > deadline:
                raise TransferError(
                    f"weight sync: no answer to {method} from {', '.join(late)} within {self.timeout_s:g} s"
                )
            for name, call in calls:
                if name in late:
                    try:
                        results[name] = call(POLL_S)
                    except TimeoutError:
                        continue
                    except Exception as error:
                        others = ", ".join(other for other in late if other != name)
                        waiting = f" (no answer yet from {others})" if others else ""
                        raise TransferError(f"weight sync: {method} failed on {name}{waiting}: {error}") from error
        return [results[peer.name] for peer in self.peers]


def _in_thread(work: Callable[[], None]) -> Wait:
    """Run `work` on a daemon thread: a collective that never returns must not keep the process."""
    done = threading.Event()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failure.append(error)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True, name="weight-sync").start()

    def wait(timeout_s: float) -> None:
        if not done.wait(timeout_s):
            raise TimeoutError
        if failure:
            raise failure[0]

    return wait
