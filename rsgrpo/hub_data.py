"""Data sets as they are published on the hub: their files in a local folder, fetched once. The home of downloads."""

from __future__ import annotations

import sys
from pathlib import Path

from rsgrpo.errors import ConfigError


def published_folder(name: str, *, local: str, setting: str) -> Path:
    """Return the local copy of a hub data set's files; what was fetched before needs no network.

    local, setting: for the message: a folder to download it to by hand, and the setting that then finds it.

    Raises:
        ConfigError: it is not on this machine and cannot be fetched; the text says how to get it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # The hub's library speaks through httpx or, from its second version on, httpx2.
    transport = [sys.modules[module].HTTPError for module in ("httpx", "httpx2") if module in sys.modules]
    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except (HfHubHTTPError, OSError, ValueError, *transport) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"the data set {name} is not on this machine and cannot be fetched from the hub: {reason}\nWhere there is "
            f"a network: `hf download {name} --repo-type dataset --local-dir {local}`; then set {setting}"
        ) from error
