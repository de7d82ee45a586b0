"""SIGTERM and SIGINT: what they do while a program starts, and once a run is in progress."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequested(Exception):
    """A signal asked the run to end; the text is its name."""


def leave_on_signals() -> None:
    """End this process with one line and exit code 0 as soon as a signal comes; for a program's first lines.

    There is nothing to save until a `StopSignals` takes over. A thread ends the process, because the main thread may be
    in foreign code: for half a minute if the signal reached the whole process group, and so the daemons that Ray waits
    for. Ray ends what it has started once this process is gone.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(theirs.fileno())

    def watch() -> None:
        while (number := ours.recv(1)[0]) not in SIGNALS:
            pass
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # bars hide it
        name = signal.Signals(number).name
        line = f"{show_cursor}Stopped by {name} before the first step. Run the same command to start again.\n"
        os.write(sys.stderr.fileno(), line.encode())
        theirs.close()
        os._exit(0)

    threading.Thread(target=watch, daemon=True, name="leave on signals").start()


class StopSignals:
    """Remembers the first SIGTERM or SIGINT between `listen` and `close`; a second one raises KeyboardInterrupt.

    requested: the signal that came, or None.
    """

    def __init__(self) -> None:
        """Leave signals as they are until `listen`."""
        self.requested: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Begin to handle signals; a no-op outside the main thread, where Python delivers none."""
        if threading.current_thread() is threading.main_thread():
            self._wakeup_fd = signal.set_wakeup_fd(-1)
            self._handlers = {number: signal.signal(number, self._answer) for number in SIGNALS}

    def check(self) -> None:
        """Raise StopRequested once a signal has come; in other threads do nothing, so that they finish their work."""
        if self.requested is not None and threading.current_thread() is threading.main_thread():
            raise StopRequested(self.requested.name)

    def close(self) -> None:
        """Restore the earlier handlers."""
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup_fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _answer(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)
