"""A lock that is given in the order in which it was asked for.

A plain lock goes to whoever is quickest, which is the thread that has just released it: while pages are encoded batch
by batch, a question would wait for all of them.
"""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """Used as a context manager by several threads; a thread must not enter it twice."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @property
    def num_waiting(self) -> int:
        """Return how many threads are in it or wait for it."""
        return len(self._waiting)

    def __enter__(self) -> None:
        """Wait for one's turn."""
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.wait_for(lambda: self._waiting[0] is ticket)

    def __exit__(self, *_: object) -> None:
        """Let the next one in."""
        with self._changed:
            self._waiting.popleft()
            self._changed.notify_all()
