"""How an index's encoder was opened, kept beside the index so that no later command need name it again.

It decides nothing: the index's fingerprint still refuses any other encoder.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from recipes.retrieval.encoders.base import EncoderSettings
from recipes.retrieval.pages.store import replace_file, writing
from rsgrpo.errors import InputError

FILE = "encoder.json"  # in the index's folder
KEPT = ("model", "kind", "pooling", "query_prefix", "min_pixels", "max_pixels", "dtype", "revision")


def remember(index: Path, settings: EncoderSettings) -> None:
    """Write down how the encoder of an index was opened; consent to a model's own code is never kept.

    Raises:
        StoreError: the disk is full.
    """
    kept = {name: getattr(settings, name) for name in KEPT}
    if Path(settings.model).is_dir():
        kept["model"] = str(Path(settings.model).absolute())
    with writing(index):
        replace_file(index / FILE, (json.dumps(kept, indent=1) + "\n").encode())


def recall(index: Path, asked: EncoderSettings) -> EncoderSettings:
    """Return how the encoder of an index is opened, but for what `asked` sets to anything else than the default.

    Raises:
        InputError: the index does not say, or its model is gone.
    """
    try:
        kept = json.loads((index / FILE).read_text())
        settings = EncoderSettings(**{name: kept[name] for name in KEPT})
    except FileNotFoundError as error:
        if not index.exists():
            raise InputError(
                f"there is no index {index} yet; `python -m recipes.retrieve index STORE --model MODEL` makes it, or "
                "name the retriever with --model"
            ) from error
        raise InputError(
            f"{index} does not say which model made it; name the retriever with --model (a folder or hub name)"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index / FILE} cannot be read: {error}; name the retriever with --model") from error
    if Path(settings.model).is_absolute() and not Path(settings.model).is_dir():
        raise InputError(f"{index} was made with {settings.model}, which is gone; name the retriever with --model")
    default = EncoderSettings("")
    names = set(EncoderSettings.__slots__) - {"model"}
    changes = {name: getattr(asked, name) for name in names if getattr(asked, name) != getattr(default, name)}
    return replace(settings, **changes)
