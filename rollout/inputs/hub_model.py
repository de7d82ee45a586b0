"""Whether a hub model can be had, asked once, before each of its files is asked for with retries."""

from __future__ import annotations

import os

from rollout.errors import InputError, one_line

CONFIG = "config.json"
PROBE_S = 5.0


def require_reachable(model_path: str, revision: str = "") -> None:
    """Refuse a hub id whose model is not in the cache while the hub does not answer; any answer of it will do.

    Raises:
        InputError: within seconds; it names the model and how to get it.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if os.path.exists(model_path) or constants.HF_HUB_OFFLINE:
        return
    try:
        if isinstance(try_to_load_from_cache(model_path, CONFIG, revision=revision or None), str):
            return
        get_hf_file_metadata(hf_hub_url(model_path, CONFIG, revision=revision or None), timeout=PROBE_S)
    except (HfHubHTTPError, ValueError):
        return  # the hub answered, or the name is none: whoever loads the model has the words for it
    except Exception as error:  # of the library's transport: httpx, or from its version 2 httpx2
        raise InputError(
            f"model.path={model_path} is neither a folder nor in the hub's cache, and {constants.ENDPOINT} cannot be "
            f"reached ({one_line(error)}). Where there is a network, run `hf download {model_path} --local-dir "
            "FOLDER`; then set model.path=FOLDER here."
        ) from error
