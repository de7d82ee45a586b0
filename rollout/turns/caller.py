"""Ask an environment within a time limit; whatever goes wrong becomes an answer."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from concurrent.futures import Future, wait

from rollout.errors import one_line
from rollout.turns.environment import Environment, Reply

log = logging.getLogger(__name__)

EXCEPTION, TIMEOUT = "exception", "timeout"
"""Faults of an environment that failed, and of one that took too long."""

_LOGGED: set[str] = set()  # kinds of environments whose exceptions this process has logged


class Caller:
    """Calls one environment, one turn at a time."""

    def __init__(self, environment: Environment, timeout_s: float) -> None:
        self._environment, self._timeout_s = environment, timeout_s
        self._running: Future[Reply | None] | None = None

    def ask(self, turn: str) -> Reply | None:
        """Return what the environment says to a turn; None ends the episode."""
        # A call that never returned holds the object: one object answers one turn at a time.
        pending = [self._running] if self._running is not None else []
        if not wait(pending, self._timeout_s).not_done:
            self._running = _started(self._environment, turn)
            if not wait([self._running], self._timeout_s).not_done:
                return self._outcome(self._running)
        return Reply(f"No answer within {self._timeout_s:g} s.", fault=TIMEOUT)

    def _outcome(self, finished: Future[Reply | None]) -> Reply | None:
        try:
            reply = finished.result()
            if reply is not None and not isinstance(reply, Reply):
                raise TypeError(f"step() must return a Reply or None, got {type(reply).__name__}")
            return reply
        except BaseException as error:
            what = type(self._environment).__name__
            if what not in _LOGGED:
                _LOGGED.add(what)
                log.warning("%s failed; logged once, counted in rollout/turns/exception", what, exc_info=error)
            return Reply(f"It failed: {type(error).__name__}: {one_line(error)}", fault=EXCEPTION)


def _started(environment: Environment, turn: str) -> Future[Reply | None]:
    """Call `step` in a thread of its own, which may never return and does not keep the process alive."""
    future: Future[Reply | None] = Future()
    future.set_running_or_notify_cancel()

    async def awaited(answer: object) -> object:
        return await answer  # type: ignore[misc]

    def run() -> None:
        try:
            answer: object = environment.step(turn)
            future.set_result(asyncio.run(awaited(answer)) if inspect.isawaitable(answer) else answer)  # type: ignore[arg-type]
        except BaseException as error:  # sys.exit too: nobody else would see it, and the wait would never end
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="environment").start()
    return future
