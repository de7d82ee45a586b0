"""Notices what no longer answers: a worker is killed, and so handled as one that died; without Ray the run ends."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import ray

from rollout.workers.worker import kill_worker

log = logging.getLogger(__name__)

RAY_SILENCE_S = 45.0
"""Time in which Ray's head must answer. Ray itself ends a program that lost it after 60 s, without naming the run."""

TICK_S = 1.0
GRACE_S = 3.0
"""Time in which a run that was asked to stop may leave before the end of Ray's daemons counts: both had the signal."""

DAEMONS = ("gcs_server", "raylet")
GONE = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


class Watch:
    """Asks every worker and Ray's head again and again whether they are there, from the start of a run to its end.

    A worker counts from its first answer on; until then the time limit of start-up holds. Time in which this process
    itself was stopped, or the machine slept, does not count.
    """

    def __init__(
        self,
        workers: Callable[[], Mapping[str, Any]],
        lost_ray: Callable[[str], None],
        *,
        silence_s: float,
        owns_ray: bool,
    ) -> None:
        """Begin to ask.

        workers: returns name -> actor of those that there are now, each with a method `alive`.
        lost_ray: called once, in a thread of its own, when Ray is gone or silent; is given what happened.
        silence_s: seconds without an answer after which a worker is killed.
        owns_ray: Ray's daemons are children of this process, so that their end is seen at once.
        """
        self._workers, self._lost_ray, self._silence_s = workers, lost_ray, silence_s
        self._tick_s = min(TICK_S, silence_s / 4)
        self._asks_no_more, self._stopped = threading.Event(), threading.Event()
        self._heard: dict[Any, tuple[float, str]] = {}  # actor -> when it last answered, where it is
        self._asked: dict[Any, tuple[Any, float]] = {}  # actor -> its open call, when that was made
        self._ray_heard = time.monotonic()
        self._daemons = [p for p in psutil.Process().children() if p.name() in DAEMONS] if owns_ray else []
        self._node: str = ray.get_runtime_context().get_node_id()
        # Two threads: a call of Ray may never return, and time must be kept all the same.
        self._threads = [
            threading.Thread(target=work, daemon=True, name=name)
            for name, work in (("ask workers", self._ask), ("watch Ray", self._watch_ray))
        ]
        for thread in self._threads:
            thread.start()

    def stop_asking(self) -> None:
        """Let workers be, since they are going to be stopped; Ray must still end within `RAY_SILENCE_S` from now."""
        self._asks_no_more.set()
        self._threads[0].join(timeout=2 * TICK_S)
        self._ray_heard = time.monotonic()

    def stop(self) -> None:
        """Watch nothing any more."""
        self._asks_no_more.set()
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=2 * TICK_S)

    def _ask(self) -> None:
        untyped: Any = ray
        while not self._asks_no_more.wait(self._tick_s):
            try:
                self._ask_workers()
                alive = {node["NodeID"] for node in untyped.nodes() if node["Alive"]}
            except Exception as error:  # Ray has none of its own for this; its silence tells
                log.debug("Ray did not answer: %s", error)
                continue
            if self._node in alive:
                self._ray_heard = time.monotonic()

    def _ask_workers(self) -> None:
        workers = dict(self._workers())
        self._asked = {actor: call for actor, call in self._asked.items() if actor in workers.values()}
        for actor in workers.values():
            if actor not in self._asked:
                self._asked[actor] = (actor.alive.remote(), time.monotonic())
        calls = {call: actor for actor, (call, _) in self._asked.items()}
        for call in ray.wait(list(calls), num_returns=len(calls), timeout=0)[0] if calls else ():
            actor = calls[call]
            del self._asked[actor]
            try:
                self._heard[actor] = (time.monotonic(), ray.get(call))
            except ray.exceptions.RayError:  # it died: whoever needs it finds out
                self._heard.pop(actor, None)
        for actor in workers.values():
            heard_at, where = self._heard.get(actor, (time.monotonic(), ""))
            silent_s = time.monotonic() - heard_at
            if actor in self._asked and silent_s > self._silence_s:
                del self._heard[actor]
                kill_worker(actor, f"{where} had not answered for {silent_s:.0f} s and was killed")

    def _watch_ray(self) -> None:
        last_tick = all_there = time.monotonic()
        while not self._stopped.wait(self._tick_s):
            now = time.monotonic()
            slept_s, last_tick = now - last_tick - self._tick_s, now
            if slept_s > self._tick_s:  # this process was stopped: it could hear nobody
                self._ray_heard += slept_s
                self._heard = {actor: (at + slept_s, where) for actor, (at, where) in self._heard.items()}
            if all(daemon.is_running() and daemon.status() not in GONE for daemon in self._daemons):
                all_there = now
            silent_s = now - self._ray_heard
            if now - all_there > GRACE_S and not self._asks_no_more.is_set():
                self._lost_ray("a process of Ray on this node is gone (gcs_server or raylet)")
            elif silent_s > RAY_SILENCE_S:
                self._lost_ray(f"Ray's head has not answered for {silent_s:.0f} s, or counts this node as dead")
            else:
                continue
            return
