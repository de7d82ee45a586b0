"""Call reward functions from an event loop: async ones side by side, plain ones in turn, each within its time limit."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from rewards.api import Response, Reward

MAX_CONCURRENT_CALLS = 96
"""Async rewards (judges), and rewards with a time limit, in flight at once on one event loop.

Below the 100 connections that HTTP clients commonly open at once.
"""


@dataclass(frozen=True, slots=True)
class Lanes:
    """How the rewards of one event loop share it; made inside that loop.

    slots: calls in flight at once. thread: runs the rewards that are not async, one after another, so that they hold up
    no judge; None runs them in the loop itself.
    """

    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_CONCURRENT_CALLS))
    thread: ThreadPoolExecutor | None = None

    async def call(self, function: Reward, response: Response, timeout_s: float) -> object:
        """Return what a reward makes of a response.

        timeout_s: 0 sets none.

        Raises:
            TimeoutError: it took longer.
        """
        if timeout_s > 0:
            async with self.slots, asyncio.timeout(timeout_s):
                value = await _in_daemon_thread(function, response)
                return await value if inspect.isawaitable(value) else value
        if self.thread is None or inspect.iscoroutinefunction(function):
            value = function(response)
        else:
            value = await asyncio.get_running_loop().run_in_executor(self.thread, function, response)
        if not inspect.isawaitable(value):
            return value
        async with self.slots:
            return await value


async def _in_daemon_thread(function: Callable[[Response], object], response: Response) -> object:
    """Run a function that may never return; its thread does not keep the process alive."""
    future: Future[object] = Future()
    future.set_running_or_notify_cancel()  # a time limit cancels the wait for it, not the future itself

    def run() -> None:
        try:
            future.set_result(function(response))
        except BaseException as error:  # sys.exit too: nobody else would see it, and the wait would never end
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="reward").start()
    return await asyncio.wrap_future(future)
