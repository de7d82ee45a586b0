"""Proof that the run folder is one and the same on every node: a rank must find there what the driver has written.

A folder that merely exists on every node takes each rank's part of a checkpoint, and no node has all of them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from rsgrpo.errors import ConfigError

WAIT_S = 60.0
"""NFS may show a new file to other machines this much later, by its usual settings."""
POLL_S = 0.5


@contextlib.contextmanager
def token_in(run_dir: Path) -> Iterator[str]:
    """Put an empty file into the run folder for the length of a block and return its name.

    Folders that did not exist before are removed afterwards if nothing else is in them.
    """
    new = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    token = run_dir / f".shared-{secrets.token_hex(8)}"
    token.touch()
    try:
        yield token.name
    finally:
        token.unlink(missing_ok=True)
        for folder in new:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def require_token(run_dir: str, token: str, *, wait_s: float | None = None) -> None:
    """Refuse a run folder that is not the driver's.

    Args:
        wait_s: how long the file may take to appear; None is `WAIT_S`.

    Raises:
        ConfigError: this node has another folder under that path, or none.
    """
    late_at = time.monotonic() + (WAIT_S if wait_s is None else wait_s)
    while not _holds(run_dir, token):
        if time.monotonic() > late_at:
            raise ConfigError(
                f"node {socket.gethostname()} does not see what the run writes to {run_dir}: the folder is not shared "
                "with the node on which the run was started, so checkpoints would be incomplete. Set output_dir to a "
                "folder that all nodes share."
            )
        time.sleep(POLL_S)


def _holds(run_dir: str, token: str) -> bool:
    try:
        return token in os.listdir(run_dir)  # a listing is fresher than a look at one name
    except OSError:
        return False
