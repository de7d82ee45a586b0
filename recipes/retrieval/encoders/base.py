"""Encoders of pages and queries: the protocol, the settings, the identity, and what all that run a model share.

`recipes.retrieval.encoders.choice` opens the encoder that the settings name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from recipes.answers.options import check_options
from recipes.retrieval.encoders.digest import edges_digest, folder_digest
from recipes.retrieval.pages.store import Page
from rollout.inputs.images import PromptError, decode, smart_resize
from rollout.keys import key
from rsgrpo.errors import InputError

log = logging.getLogger(__name__)

VISRAG_QUERY_PREFIX = "Represent this query for retrieving relevant documents: "
Kind = Literal["image", "text", "late", "imported"]
EncoderEngine = Literal["transformers", "vllm"]
Dtype = Literal["float32", "bfloat16", "float16"]
Pooling = Literal["", "weighted_mean", "mean", "last", "cls"]
RETRIEVER_FILE = "retriever.json"  # in a trained folder: how its queries and pages are prepared

PageInput = Image.Image | str
"""A page as a model takes it: resized pixels or text."""


class EncoderError(InputError):
    """The encoder cannot be loaded, or cannot encode its input."""


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """How an encoder is loaded.

    kind: "image" and "text" turn a page's pixels or its text layer into one vector, "late" turns pixels into one
        vector per token; "imported" looks vectors up in files.
    encode_with: changes neither the vectors nor the fingerprint.
    """

    model: str
    kind: Kind = key("image", "what the model reads: one vector per page, one per token (late), or vectors from files")
    encode_with: EncoderEngine = key("transformers", "what runs the model")
    pooling: Pooling = key("", "for a model folder that does not fix its own; default: weighted_mean")
    query_prefix: str | None = key(None, "precedes every query; default: the model's own, or VisRAG's")
    min_pixels: int = key(4 * 28 * 28, "smallest area of a resized page", ge=1)
    max_pixels: int = key(1_280 * 28 * 28, "largest area of a resized page", ge=1)
    batch_size: int = key(8, "pages or queries per forward pass", ge=1)
    device: str = key("", "default: a GPU if there is one")
    dtype: Dtype = key("float32", "precision of the model's weights")
    revision: str = key("", "hub commit of the model")
    trust_remote_code: bool = key(False, "run code that comes with the model")

    def __post_init__(self) -> None:
        check_options(self)
        if self.encode_with == "vllm" and self.kind != "image":
            raise InputError(f"--encode-with vllm supports --kind image only, not {self.kind}; omit it")
        if self.min_pixels > self.max_pixels:
            raise InputError(f"--min-pixels {self.min_pixels} must be <= --max-pixels {self.max_pixels}")


def model_folder(model: str, revision: str) -> Path:
    """Return the local folder of a model; a hub name is downloaded first.

    Raises:
        EncoderError: it is neither a folder nor a hub name that can be downloaded.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision or None))
    except (OSError, ValueError) as error:
        raise EncoderError(f"model {model} is not a folder and cannot be downloaded: {error}") from error


@dataclass(frozen=True, slots=True)
class PageLoader:
    """Prepares a page for a model. It is small, because it is sent to the processes that load pages.

    as_text: use the text layer instead of the pixels. factor: both sides become multiples of it, so that the model's
        own processor does not resize again; 0 for models of one fixed size, whose processor resizes.
    min_pixels, max_pixels: bounds of the resized area.
    """

    as_text: bool = False
    factor: int = 0
    min_pixels: int = 1
    max_pixels: int = 1

    @classmethod
    def of(cls, image_processor: Any, settings: EncoderSettings, *, as_text: bool = False) -> PageLoader:
        """Return the loader that fits a model's image processor (None if the model has none)."""
        patch, merge = (getattr(image_processor, name, None) for name in ("patch_size", "merge_size"))
        if not isinstance(patch, int) or not isinstance(merge, int):
            return cls(as_text)
        sizes = getattr(image_processor, "size", None) or {}
        low = max(settings.min_pixels, sizes.get("shortest_edge") or 1)
        high = max(low, min(settings.max_pixels, sizes.get("longest_edge") or math.inf))
        return cls(as_text, patch * merge, low, int(high))

    def resize(self, image: Image.Image) -> Image.Image:
        """Return the image at the size that the model sees."""
        if not self.factor:
            return image
        height, width = smart_resize(image.height, image.width, self.factor, self.min_pixels, self.max_pixels)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def __call__(self, page: Page) -> PageInput:
        """Return a page's input; EncoderError if its image is missing or damaged."""
        if self.as_text:
            return page.text
        try:
            return self.resize(decode(page.image))
        except PromptError as error:
            place, folder = f"page {page.page_id} of {page.document}", Path(page.image).parent
            raise EncoderError(f"{place}: {error}; delete {folder} and ingest again") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderIdentity:
    """What an index keeps of the encoder that made it.

    description: what decides a vector, for messages. multi_vector: whether an item gives (T, D) instead of (D,).
    settings: how the encoder is opened again; None for one that no command can open.
    """

    description: Mapping[str, Any]
    multi_vector: bool = False
    settings: EncoderSettings | None = None

    @property
    def fingerprint(self) -> str:
        """Return the digest of `description`: equal for two encoders exactly when their vectors compare."""
        return _fingerprint(self.description)

    def is_known_as(self, fingerprint: str) -> bool:
        """Whether an index with this fingerprint holds vectors of this encoder."""
        return fingerprint == self.fingerprint


def _fingerprint(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity(EncoderIdentity):
    """Everything that can be said of a model's encoder without loading its weights.

    settings: with the values that a trained folder sets for itself. query_prefix: None leaves it to the prompts of a
    sentence-transformers folder.
    """

    settings: EncoderSettings
    folder: Path
    query_prefix: str | None
    loader: PageLoader

    def is_known_as(self, fingerprint: str) -> bool:
        """As the base says; also by the fingerprint of earlier releases, which read only the ends of large files."""
        if fingerprint == self.fingerprint:
            return True
        if fingerprint != _fingerprint(dict(self.description) | {"model": edges_digest(self.folder)}):
            return False
        log.warning("the index is of an earlier release, which did not compare all weights of %s", self.folder)
        return True


class PageEncoder(Protocol):
    """Turns pages and queries into unit vectors that are compared by inner product."""

    @property
    def identity(self) -> EncoderIdentity:
        """Return what an index keeps of this encoder."""

    def encode_pages(self, pages: Sequence[Page]) -> list[np.ndarray]:
        """Return one float32 array per page: (D,), or (T, D) for a multi-vector encoder."""

    def encode_queries(self, queries: Sequence[str]) -> list[np.ndarray]:
        """Return one float32 array per query, of the same kind."""


@runtime_checkable
class PatchEncoder(Protocol):
    """An encoder of several vectors per page that knows which patch of the page a vector is of."""

    def similarity_map(self, query: str, page: Page, page_VD: np.ndarray) -> np.ndarray | None:
        """Return (rows, columns) float32: the mean similarity of each patch of a page with the tokens of a query.

        Args:
            page_VD: the page's vectors, as `encode_pages` returns them.

        Returns:
            None if the model reads text, or its patches are not one grid.
        """


class ModelEncoder:
    """Base of the encoders that run a model. `identity.loader` loads a page, here or elsewhere; this encodes it.

    Raises:
        EncoderError: there is no such model, or the settings do not fit it.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        self.identity = identify(settings)

    def encode_pages(self, pages: Sequence[Page]) -> list[np.ndarray]:
        """Load and encode pages; see `PageEncoder`."""
        return self.encode_loaded([self.identity.loader(page) for page in pages], [page.page_id for page in pages])

    def encode_loaded(self, inputs: Sequence[PageInput], page_ids: Sequence[str]) -> list[np.ndarray]:
        """Return one float32 array per loaded page."""
        raise NotImplementedError

    def encode_queries(self, queries: Sequence[str]) -> list[np.ndarray]:
        """Return one float32 array per query; EncoderError if a query is too long."""
        raise NotImplementedError


def identify(settings: EncoderSettings) -> ModelIdentity:
    """Return the identity of an encoder that runs a model; EncoderError if there is no such folder."""
    folder = model_folder(settings.model, settings.revision)
    if (file := folder / RETRIEVER_FILE).exists():
        try:
            settings = filled(settings, json.loads(file.read_text()))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise EncoderError(f"{file} cannot be read: {error}; export the retriever again") from error
    prefix = settings.query_prefix
    if prefix is None and settings.kind != "late" and not (folder / "modules.json").exists():
        prefix = VISRAG_QUERY_PREFIX
    pixels = {} if settings.kind == "text" else {"pixels": [settings.min_pixels, settings.max_pixels]}
    # everything that decides a vector: batch size, device and engine do not
    description = pixels | {
        "model": folder_digest(folder),
        "kind": settings.kind,
        "pooling": settings.pooling or "own or weighted_mean",
        "query_prefix": prefix,
        "dtype": settings.dtype,
    }
    processor = None if settings.kind == "text" else _image_processor(folder, settings)
    as_text = settings.kind == "text" or (settings.kind == "late" and processor is None)
    return ModelIdentity(
        description=description, multi_vector=settings.kind == "late", settings=settings, folder=folder,
        query_prefix=prefix, loader=PageLoader.of(processor, settings, as_text=as_text),
    )  # fmt: skip


def filled(settings: EncoderSettings, kept: Mapping[str, Any]) -> EncoderSettings:
    """Return settings in which every value that is at its default is replaced by that of `kept`."""
    default = EncoderSettings("")
    return replace(settings, **{n: kept[n] for n in kept if getattr(settings, n) == getattr(default, n)})


def _image_processor(folder: Path, settings: EncoderSettings) -> Any:
    """Return what cuts a model's images into patches; None if the folder has no image processor."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError):
        return None


def unit_rows(vectors_ND: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
    """Return float32 rows of length 1; EncoderError if a row is zero or not finite."""
    rows_ND = np.asarray(vectors_ND, dtype=np.float32)
    lengths_N = np.linalg.norm(rows_ND, axis=1)
    bad = np.flatnonzero(~(np.isfinite(lengths_N) & (lengths_N > 0)))
    if len(bad):
        raise EncoderError(f"the encoder returned a vector of length {lengths_N[bad[0]]} for {names[bad[0]]!r}")
    return list(rows_ND / lengths_N[:, None])
