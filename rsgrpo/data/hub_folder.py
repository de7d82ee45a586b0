"""Data sets on the Hugging Face hub: list their files, and keep a local copy that is downloaded once."""

from __future__ import annotations

import logging
from pathlib import Path

from rsgrpo.errors import ConfigError
from rsgrpo.records.hub import first_line, hub_errors

log = logging.getLogger(__name__)


def published_folder(name: str, *, local: str, setting: str) -> Path:
    """Return the local copy of a hub data set's files; files downloaded earlier need no network.

    local, setting: named by the error: a folder to download it to by hand, and the setting that then finds it.

    Raises:
        ConfigError: it is not on this machine and cannot be downloaded; the text says how to get it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except hub_errors() as error:
        raise ConfigError(
            f"the data set {name} is not on this machine and cannot be downloaded from the hub: {first_line(error)}\n"
            f"On a machine with a network, run `hf download {name} --repo-type dataset --local-dir {local}`; then set "
            f"{setting}"
        ) from error


def published_files(name: str) -> list[str] | None:
    """Return the paths of a hub data set's files; None if the hub cannot tell, which is logged with the reason."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(name, repo_type="dataset")
    except hub_errors() as error:
        log.info("the hub cannot list the files of %s: %s", name, error)
        return None
