"""The one place that starts Ray or joins a cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import ray

from rewards.namesakes import namesakes
from rollout.errors import leave_at_once
from rsgrpo.errors import RsgrpoError

STARTS = 3
"""Attempts to start Ray that may fail, whatever the reason."""
GCS_WAIT = "RAY_gcs_server_port_wait_time_s"
"""Ray's variable for the seconds that its head may take to come up."""

log = logging.getLogger(__name__)

_abandoned = False
"""Whether this process has lost its Ray, which it cannot start a second time."""


def connect_ray(
    address: str,
    *,
    num_cpus: int,
    object_store_bytes: int,
    log_to_driver: bool = True,
    startup_timeout_s: float = 120.0,
) -> bool:
    """Join the Ray cluster at `address`, or start one for this process if it is "".

    Args:
        num_cpus, object_store_bytes: of a Ray that is started here.
        startup_timeout_s: how long such a Ray may take on a busy machine; its own limits are 30 s.

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
    settings = {"address": address} if address else own  # without a name the namespace is this run's own
    # Ray puts the current folder first on the path of every worker.
    first = {"worker_process_setup_hook": "rsgrpo.come_first"} if namesakes(Path.cwd()) else None
    late_at, tries = time.monotonic() + startup_timeout_s, 0
    while True:
        tries += 1
        try:
            with patient(0 if address else startup_timeout_s), kept_handlers():
                ray.init(configure_logging=False, log_to_driver=log_to_driver, runtime_env=first, **settings)
            break
        except Exception as error:  # Ray has no class of its own for this
            reason = f"{type(error).__name__}: {str(error).strip()}"
            if address:
                message = f"cannot join the Ray cluster at {address} ({reason}). Run `ray start` on every node first."
            else:
                message = f"Ray failed to start ({reason}). Run `python -m rsgrpo.doctor` to find out why."
            is_slow = "timed out" in reason.lower() and time.monotonic() < late_at
            if address or (tries >= STARTS and not is_slow):
                raise RsgrpoError(message) from error
            log.warning("Ray failed to start (%s); trying again", reason)
    return True


@contextlib.contextmanager
def patient(timeout_s: float) -> Iterator[None]:
    """Give the head of a Ray that is started here `timeout_s` to come up; end what a start that fails leaves behind.

    The other limit, 30 s until the node is known to its head, is fixed: who starts Ray tries again.
    """
    before, given = set(psutil.Process().children(recursive=True)), os.environ.get(GCS_WAIT)
    if timeout_s and given is None:
        os.environ[GCS_WAIT] = str(max(30, int(timeout_s)))
    try:
        yield
    except BaseException:
        for process in set(psutil.Process().children(recursive=True)) - before:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        raise
    finally:
        if given is None:
            os.environ.pop(GCS_WAIT, None)


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
