"""What a process gives up before it reads a stranger's document. Linux only; elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import os
import signal
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
