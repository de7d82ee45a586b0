"""How an index's encoder was opened, kept beside the index so that later commands need not name it.

The index's fingerprint still refuses any other encoder.
"""

from __future__ import annotations

import json
from pathlib import Path

from recipes.retrieval.encoders.base import EncoderSettings, filled
from rollout.files import write_text
from rsgrpo.errors import InputError

FILE = "encoder.json"  # in the index's folder
KEPT = ("model", "kind", "pooling", "query_prefix", "min_pixels", "max_pixels", "dtype", "revision")
NAME_IT = "name the retriever with --model (a folder or hub name)"


def remember(index: Path, settings: EncoderSettings) -> None:
    """Record how the encoder of an index was opened; consent to a model's own code is never kept.

    Raises:
        OSError: the disk is full.
    """
    kept = {name: getattr(settings, name) for name in KEPT}
    if Path(settings.model).is_dir():
        kept["model"] = str(Path(settings.model).absolute())
    write_text(index / FILE, json.dumps(kept, indent=1) + "\n")


def recall(index: Path, asked: EncoderSettings) -> EncoderSettings:
    """Return how the encoder of an index is opened, except for what `asked` sets to a value other than the default.

    Raises:
        InputError: the index does not say, or its model is gone.
    """
    try:
        kept = json.loads((index / FILE).read_text())
        settings = filled(asked, {name: kept[name] for name in KEPT})
    except FileNotFoundError as error:
        if index.exists():
            raise InputError(f"{index} does not say which model made it; {NAME_IT}") from error
        if not index.parent.exists():
            raise InputError(
                f"there is no page store {index.parent}; create it with "
                f"`python -m recipes.retrieve ingest FOLDER --out {index.parent}`"
            ) from error
        create = "create it with `python -m recipes.retrieve index STORE --model MODEL`"
        raise InputError(f"there is no index {index} yet; {create}, or {NAME_IT}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index / FILE} cannot be read: {error}; {NAME_IT}") from error
    if Path(settings.model).is_absolute() and not Path(settings.model).is_dir():
        raise InputError(f"{index} was made with {settings.model}, which is gone; {NAME_IT}")
    return settings
