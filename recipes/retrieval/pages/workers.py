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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from recipes.retrieval.pages.confined import die_with_parent, leave_network
from rollout.errors import one_line

Work = Callable[[Any, Callable[[], None]], Any]
"""Takes a task and a function that reports "still alive"; returns the result, as JSON knows it. Importable by name."""

MAX_RESULT_BYTES = 16 << 20
NONSENSE = "the process that worked on it answered nonsense ({})"


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


@dataclass(frozen=True, slots=True)
class Split:
    """What a task becomes that is too large for one worker: parts, for all of them, and `then` when they have ended.

    The result of `then` is that of the task; if a part fails, its failure is.
    """

    parts: tuple[Any, ...]
    then: Any


Splitter = Callable[[Any, Any], Split | None]
"""Takes a task and its value, as JSON knows it; returns how the task is split, None if the value is its result."""


@dataclass(slots=True)
class _Job:
    """A task that was drawn. ends: when its time is over. num_open: its parts that have not ended."""

    ends: float
    num_open: int = 0
    then: Any = None
    failed: TaskResult | None = None


@dataclass(frozen=True, slots=True)
class _Step:
    """What is given to a worker: a task, or a part of one."""

    task: Any
    job: _Job


class _Queue:
    """Steps that no worker has yet; those of tasks that were split come first, so that a task that was begun ends."""

    def __init__(self, tasks: Iterable[Any], total_s: float, split: Splitter) -> None:
        self._tasks, self._total_s, self._split = iter(tasks), total_s, split
        self._steps: deque[_Step] = deque()

    def next(self) -> _Step | None:
        """Return the next step; None if there is none now."""
        if self._steps:
            return self._steps.popleft()
        task = next(self._tasks, None)
        return None if task is None else _Step(task, _Job(time.monotonic() + self._total_s))

    def settle(self, result: TaskResult, job: _Job) -> TaskResult | None:
        """Take the result of a step; return that of its task if that is over."""
        failed = bool(result.died or result.error_type)
        if job.then is None:
            try:
                split = None if failed else self._split(result.task, result.value)
            except ValueError as error:
                return replace(result, died=NONSENSE.format(error))
            if split is None:
                return result
            job.num_open, job.then = len(split.parts), split.then
            self._steps.extendleft(_Step(part, job) for part in reversed(split.parts))
            return None
        if not job.num_open:
            return result
        job.num_open -= 1
        if failed and job.failed is None:
            job.failed = replace(result, task=job.then)
            kept = [step for step in self._steps if step.job is not job]
            job.num_open -= len(self._steps) - len(kept)
            self._steps = deque(kept)
        if job.num_open:
            return None
        if job.failed is None:
            self._steps.appendleft(_Step(job.then, job))
        return job.failed


class _Worker:
    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_run_worker, args=(work, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.step: _Step | None = None  # while it is idle
        self.timeout_s = self.deadline = 0.0

    def give(self, step: _Step | None, timeout_s: Callable[[Any], float]) -> None:
        self.step = step
        if step is not None:
            self.timeout_s = timeout_s(step.task)
            self.deadline = time.monotonic() + self.timeout_s
            self.connection.send(step.task)

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
    split: Splitter = lambda task, value: None,
) -> Iterator[TaskResult]:
    """Yield the result of every task as it arrives; a task is drawn only when a worker is free for it.

    Processes are started as they are needed.

    Args:
        timeout_s: of a task; a worker that reports nothing for this long is killed.
        on_alive: called here whenever a worker reports that it is still alive.
        total_s: limit of a whole task with its parts, however often it reports.
        split: says, here, which values mean that a task is to be done in parts. ValueError for one that means nothing.
    """
    queue, workers = _Queue(tasks, total_s, split), list[_Worker]()
    try:
        while True:
            _give_out(queue, workers, work, num_workers, timeout_s)
            busy = [(worker, worker.step) for worker in workers if worker.step is not None]
            if not busy:
                return
            wait([worker.connection for worker, _ in busy], timeout=1.0)
            for worker, step in busy:
                result = _received(worker, step, on_alive, total_s)
                if result is None:
                    continue
                worker.step = None
                whole = queue.settle(result, step.job)
                if result.died or (whole is not None and whole.died):
                    worker.stop()
                    workers.remove(worker)
                if whole is not None:
                    yield whole
    finally:
        for worker in workers:
            worker.stop()


def _give_out(
    queue: _Queue, workers: list[_Worker], work: Work, num_workers: int, timeout_s: Callable[[Any], float]
) -> None:
    """Give every idle worker a step, and start workers while there are more steps."""
    for worker in workers:
        if worker.step is None:
            worker.give(queue.next(), timeout_s)
    while len(workers) < num_workers and (step := queue.next()) is not None:
        workers.append(_Worker(work))
        workers[-1].give(step, timeout_s)


def _received(worker: _Worker, step: _Step, on_alive: Callable[[], None], total_s: float) -> TaskResult | None:
    """Read what a worker has reported of its step; None while it works."""
    try:
        while worker.connection.poll():
            message = worker.connection.recv_bytes(MAX_RESULT_BYTES)
            if message:
                return _result(step.task, message)
            worker.deadline = time.monotonic() + worker.timeout_s
            on_alive()
    except (TypeError, ValueError) as error:
        return TaskResult(step.task, died=NONSENSE.format(one_line(error)))
    except (EOFError, OSError):  # recv_bytes closes the connection when a message is longer
        worker.process.join(5)
        return TaskResult(step.task, died=f"the process that worked on it died (exit code {worker.process.exitcode})")
    if time.monotonic() > worker.deadline:
        return TaskResult(step.task, died=no_progress(worker.timeout_s))
    if time.monotonic() > step.job.ends:
        return TaskResult(step.task, died=too_long(total_s))
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
