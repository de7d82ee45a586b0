"""Data sets as they are published on the hub: which files they have, and these in a local folder, fetched once.

The home of downloads.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rsgrpo.errors import ConfigError

log = logging.getLogger(__name__)


def published_folder(name: str, *, local: str, setting: str) -> Path:
    """Return the local copy of a hub data set's files; what was fetched before needs no network.

    local, setting: for the message: a folder to download it to by hand, and the setting that then finds it.

    Raises:
        ConfigError: it is not on this machine and cannot be fetched; the text says how to get it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except hub_errors() as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"the data set {name} is not on this machine and cannot be fetched from the hub: {reason}\nWhere there is "
            f"a network: `hf download {name} --repo-type dataset --local-dir {local}`; then set {setting}"
        ) from error


def published_files(name: str) -> list[str] | None:
    """Return the paths of a hub data set's files; None where the hub does not tell, and why is logged."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(name, repo_type="dataset")
    except hub_errors() as error:
        log.info("the hub does not say what is in %s: %s", name, error)
        return None


def hub_errors() -> tuple[type[Exception], ...]:
    """Return what the hub's library raises where something is wrong with the network, the hub or a name.

    It speaks through httpx or, from its second version on, httpx2.
    """
    from huggingface_hub.errors import HfHubHTTPError

    transport = [sys.modules[module].HTTPError for module in ("httpx", "httpx2") if module in sys.modules]
    return (HfHubHTTPError, OSError, ValueError, *transport)
