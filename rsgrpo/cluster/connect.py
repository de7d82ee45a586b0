"""The one place that starts Ray or joins a cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import ray

from rewards.namesakes import namesakes
from rollout.errors import leave_at_once
from rsgrpo.errors import RsgrpoError

STARTS = 3
"""Attempts to start Ray, which gives a node 30 s: too little on a machine that is busy for a moment."""

log = logging.getLogger(__name__)

_abandoned = False
"""Whether this process has lost its Ray, which it cannot start a second time."""


def connect_ray(address: str, *, num_cpus: int, object_store_bytes: int, log_to_driver: bool = True) -> bool:
    """Join the Ray cluster at `address`, or start one for this process if it is "".

    Args:
        num_cpus, object_store_bytes: of a Ray that is started here.

    Returns:
        Whether this call connected; False in a process that was connected already, such as a notebook or a sweep.

    Raises:
        RsgrpoError: there is no such cluster, or Ray failed to start.
    """
    if _abandoned:
        raise RsgrpoError("Ray has stopped answering in this process. Run the same command to resume.")
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:
        require_token()
    # "local": without an address Ray would join a cluster of this machine, if there is one, and refuse these settings.
    own = {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
    own |= {"object_store_memory": object_store_bytes}
    settings = {"address": address, "namespace": "rsgrpo"} if address else own
    # Ray puts the current folder first on the path of every worker.
    first = {"worker_process_setup_hook": "rsgrpo.come_first"} if namesakes(Path.cwd()) else None
    for tries_left in reversed(range(1 if address else STARTS)):
        try:
            with _without_remains(), kept_handlers():
                ray.init(configure_logging=False, log_to_driver=log_to_driver, runtime_env=first, **settings)
            break
        except Exception as error:  # Ray has no class of its own for this
            reason = f"{type(error).__name__}: {str(error).strip()}"
            if address:
                message = f"cannot join the Ray cluster at {address} ({reason}). Run `ray start` on every node first."
            else:
                message = f"Ray failed to start ({reason}). Run `python -m rsgrpo.doctor` to find out why."
            if not tries_left:
                raise RsgrpoError(message) from error
            log.warning("Ray failed to start (%s); trying again", reason)
    return True


@contextlib.contextmanager
def _without_remains() -> Iterator[None]:
    """End the processes that a start of Ray which failed has left behind."""
    before = set(psutil.Process().children(recursive=True))
    try:
        yield
    except BaseException:
        for process in set(psutil.Process().children(recursive=True)) - before:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        raise


def abandon_ray(*, owned: bool) -> None:
    """Give up a Ray that does not answer; one that this process has started is killed, with all its workers."""
    global _abandoned
    _abandoned = True
    leave_at_once()
    for process in psutil.Process().children(recursive=True) if owned else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def require_token() -> None:
    """Let only those who know a token talk to the Ray that this process starts: Ray listens on every interface.

    The token is the user's own (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH) or a new one, which lives as long as this process
    and is in no file. Ray's own default is a file in the home folder that everyone on the machine can read.
    """
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """Restore the current signal handlers afterwards: Ray sets its own in every process that connects to it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
