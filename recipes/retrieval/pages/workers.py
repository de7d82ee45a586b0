"""A pool of processes that outlives its members: a worker that crashes or hangs costs one task and is replaced.

A worker reads what strangers made. It has no network where Linux allows that, and answers in JSON, not in pickles: one
that a document has taken over cannot run code here.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from recipes.retrieval.pages.confined import die_with_parent, leave_network
from rollout.errors import one_line

Work = Callable[[Any, Callable[[], None]], Any]
"""Takes a task and a function that reports "still alive"; returns the result, as JSON knows it. Importable by name."""

MAX_RESULT_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class TaskResult:
    """A task's result, or its error, or how the worker that ran it died. task: not None.

    value: as it comes back from JSON. error, error_type: message and class name of what was raised; "" otherwise.
    """

    task: Any
    value: Any = None
    error: str = ""
    error_type: str = ""
    died: str = ""


class _Worker:
    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_run_worker, args=(work, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Any = None  # while it is idle
        self.timeout_s = self.deadline = self.ends = 0.0

    def give(self, task: Any, timeout_s: Callable[[Any], float], total_s: float) -> None:
        self.task = task
        if task is not None:
            self.ends = time.monotonic() + total_s
            self.timeout_s = timeout_s(task)
            self.deadline = time.monotonic() + self.timeout_s
            self.connection.send(task)

    def stop(self) -> None:
        _kill_session(self.process.pid)
        self.process.kill()
        self.process.join()
        self.connection.close()


def no_progress(timeout_s: float) -> str:
    """Return what is said of a task whose worker reported nothing for this long."""
    return f"no progress for {timeout_s:g} s; the process was stopped"


def too_long(total_s: float) -> str:
    """Return what is said of a task that took longer than this as a whole."""
    return f"not finished after {total_s:g} s; the process was stopped"


def run_tasks(
    work: Work,
    tasks: Iterable[Any],
    *,
    num_workers: int,
    timeout_s: Callable[[Any], float],
    on_alive: Callable[[], None],
    total_s: float = math.inf,
) -> Iterator[TaskResult]:
    """Yield the result of every task as it arrives; a task is drawn only when a worker is free for it.

    Args:
        timeout_s: of a task; a worker that reports nothing for this long is killed.
        on_alive: called here whenever a worker reports that it is still alive.
        total_s: limit of a whole task, however often it reports.
    """
    queue = iter(tasks)
    workers = [_Worker(work) for _ in range(num_workers)]
    try:
        for worker in workers:
            worker.give(next(queue, None), timeout_s, total_s)
        while any(worker.task is not None for worker in workers):
            wait([w.connection for w in workers if w.task is not None], timeout=1.0)
            for index, worker in enumerate(workers):
                result = None if worker.task is None else _received(worker, on_alive, total_s)
                if result is None:
                    continue
                yield result
                if result.died:
                    worker.stop()
                    workers[index] = worker = _Worker(work)
                worker.give(next(queue, None), timeout_s, total_s)
    finally:
        for worker in workers:
            worker.stop()


def _received(worker: _Worker, on_alive: Callable[[], None], total_s: float) -> TaskResult | None:
    """Read what a worker has reported; None while it works."""
    try:
        while worker.connection.poll():
            message = worker.connection.recv_bytes(MAX_RESULT_BYTES)
            if message:
                return _result(worker.task, message)
            worker.deadline = time.monotonic() + worker.timeout_s
            on_alive()
    except (TypeError, ValueError) as error:
        return TaskResult(worker.task, died=f"the process that worked on it answered nonsense ({one_line(error)})")
    except (EOFError, OSError):  # recv_bytes closes the connection when a message is longer
        worker.process.join(5)
        return TaskResult(worker.task, died=f"the process that worked on it died (exit code {worker.process.exitcode})")
    if time.monotonic() > worker.deadline:
        return TaskResult(worker.task, died=no_progress(worker.timeout_s))
    if time.monotonic() > worker.ends:
        return TaskResult(worker.task, died=too_long(total_s))
    return None


def _result(task: Any, message: bytes) -> TaskResult:
    """Read a worker's answer, which is not trusted; TypeError or ValueError if it is not one."""
    value, error, error_type = json.loads(message)
    if not (isinstance(error, str) and isinstance(error_type, str)):
        raise TypeError("an error that is not text")
    return TaskResult(task, value, error, error_type)


def _run_worker(work: Work, connection: Connection) -> None:
    """Run one task after another until the parent is gone."""
    die_with_parent()
    leave_network()
    os.setsid()  # what it starts is found by its session
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent was stopped
        while True:
            task = connection.recv()
            try:
                result = work(task, lambda: connection.send_bytes(b"")), "", ""  # nothing: still alive
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                result = None, str(error) or type(error).__name__, type(error).__name__
            connection.send_bytes(json.dumps(result).encode())


def _kill_session(leader: int | None) -> None:
    """Kill every process of a worker's session but the worker itself: a LibreOffice, whose parents may have ended."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and int(entry.parent.name) != leader:
                os.kill(int(entry.parent.name), signal.SIGKILL)
