"""What a process gives up before it reads a stranger's document. What needs Linux does nothing elsewhere."""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_network() -> bool:
    """Move this process, which must have a single thread, into a network of its own that has no interface.

    Rights on files stay as they are: root needs no namespace of users for it, and whoever does keeps user and groups.

    Returns:
        Whether the system allows it. Containers often do not.
    """
    if not hasattr(os, "fork"):
        return False
    trial = os.fork()  # a namespace of users that cannot be finished would leave the process without rights
    if trial == 0:
        done = False
        with suppress(BaseException):
            done = _leave_network()
        os._exit(0 if done else 1)
    return os.waitstatus_to_exitcode(os.waitpid(trial, 0)[1]) == 0 and _leave_network()


def _leave_network() -> bool:
    """Do it; False, or an OSError after half of it, where it is not allowed."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None)
    if unshare is None:
        return False
    if unshare(_CLONE_NEWNET) == 0:
        return True
    user, group = os.geteuid(), os.getegid()
    if unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return False
    own = Path("/proc/self")
    (own / "setgroups").write_text("deny")
    (own / "uid_map").write_text(f"{user} {user} 1")
    (own / "gid_map").write_text(f"{group} {group} 1")
    return True


def bound(*, memory_bytes: int, cpu_s: int, file_bytes: int) -> None:
    """Limit a program that is about to start: it ends with its parent, and each of its processes has bounds.

    cpu_s: also where it outlives everyone who could stop it. file_bytes: of a file that it writes.
    """
    die_with_parent()
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        _, hard = resource.getrlimit(kind)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


@functools.cache
def alone() -> tuple[str, ...]:
    """Return the words before a command that runs it without a network and ends all it has started; () where refused.

    In a PID namespace of its own every process ends with the first one, which ends with the one that started it.
    """
    words = ("unshare", "--user", "--map-current-user", "--net", "--pid", "--fork", "--kill-child", "--")
    try:
        allowed = subprocess.run([*words, "true"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        allowed = False
    return words if allowed else ()
