"""How far the work on added documents is, for whoever waits for it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rsgrpo.records.console import Bar, Console

Report = Callable[[str, float], None]
"""Takes what is being done, in words, and which share of it is done."""
WORDS = {
    "documents": "{} documents rendered",
    "pages": "{} pages",
    "encode": "{} pages encoded",
    "words": "{} pages read",
}


class ReportingConsole(Console):
    """A console whose phases are also reported; messages go to another one."""

    def __init__(self, console: Console, report: Report) -> None:
        super().__init__(io.StringIO(), live=False)
        self._messages, self._report = console, report
        self._running: dict[str, tuple[int, int | None]] = {}

    def info(self, message: str) -> None:
        """Print one message."""
        self._messages.info(message)

    def warning(self, message: str) -> None:
        """Print one message that stands out."""
        self._messages.warning(message)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Bar]:
        """Report one phase together with those that it is a part of."""
        self._running[name] = (0, total)
        try:
            yield _ReportedBar(lambda count: self._advanced(name, count))
        finally:
            del self._running[name]

    def _advanced(self, name: str, count: int) -> None:
        done, total = self._running[name]
        self._running[name] = (done + count, total)
        shares = [done / total for done, total in self._running.values() if total]
        self._report(", ".join(_said(*entry) for entry in self._running.items()), shares[0] if shares else 0.0)


class _ReportedBar(Bar):
    def __init__(self, advanced: Callable[[int], None]) -> None:
        super().__init__()
        self._advanced = advanced

    def advance(self, count: int = 1) -> None:
        self._advanced(count)


def _said(name: str, state: tuple[int, int | None]) -> str:
    done, total = state
    return WORDS.get(name, f"{{}} {name}").format(f"{done:,}" if total is None else f"{done:,} of {total:,}")
