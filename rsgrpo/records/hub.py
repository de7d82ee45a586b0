"""Publish an exported folder on the Hugging Face hub, and name what the hub's library raises."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rsgrpo.config.train import ExportConfig
from rsgrpo.errors import InputError, RsgrpoError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Answer = TypeVar("Answer")


def hub_errors() -> tuple[type[Exception], ...]:
    """Return what the hub's library raises when the network, the hub or a name is at fault.

    The library uses httpx or, from version 2, httpx2.
    """
    from huggingface_hub.errors import HfHubHTTPError

    transport = [sys.modules[module].HTTPError for module in ("httpx", "httpx2") if module in sys.modules]
    return (HfHubHTTPError, OSError, ValueError, *transport)


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or the name of its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def require_login(export: ExportConfig) -> None:
    """Refuse to start a run whose model could not be uploaded at its end; nothing is created on the hub yet.

    Raises:
        InputError: the hub cannot be reached, does not know us, or the repository is public and should not be.
    """
    if not export.push_to_hub:
        return
    from huggingface_hub.errors import RepositoryNotFoundError

    api = _api()
    _asked(api.whoami, export, InputError)
    try:
        found = _asked(lambda: api.model_info(export.push_to_hub), export, InputError, RepositoryNotFoundError)
    except RepositoryNotFoundError:
        return  # it is created at the end
    if export.private and not found.private:
        raise InputError(
            f"export.push_to_hub={export.push_to_hub}: the repository exists and is public, but export.private is "
            "true. Make it private, choose another one, or set export.private=false"
        )


def push_folder(folder: Path, export: ExportConfig, message: str) -> str:
    """Upload a model folder whole, creating the repository if needed; return its address.

    Raises:
        RsgrpoError: the hub refused or could not be reached; the folder is unchanged.
    """
    api = _api()

    def upload() -> str:
        address = api.create_repo(export.push_to_hub, private=export.private, exist_ok=True)
        api.upload_folder(repo_id=export.push_to_hub, folder_path=folder, commit_message=message)
        return str(address)

    try:
        return _asked(upload, export, RsgrpoError)
    except RsgrpoError as error:
        raise RsgrpoError(f"{error}. The model is in {folder}: `hf upload {export.push_to_hub} {folder}`") from error


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def _asked(
    ask: Callable[[], Answer], export: ExportConfig, kind: type[RsgrpoError], *passed_on: type[Exception]
) -> Answer:
    """Return the hub's answer; an error becomes one line, except for those that are `passed_on`."""
    try:
        return ask()
    except passed_on:
        raise
    except hub_errors() as error:
        raise kind(
            f"export.push_to_hub={export.push_to_hub}: the hub cannot be written to: {first_line(error)}. Log in with "
            "`hf auth login` (or HF_TOKEN), and check the name, the network and HF_HUB_OFFLINE"
        ) from error
