"""What turns pages and queries into vectors: one protocol, the settings, and what every encoder shares.

Knows neither indexes nor how models run: `recipes.retrieval.encoders.choice` opens the module that does.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from recipes.retrieval.pages.store import Page
from rollout.inputs.images import PromptError, decode, smart_resize
from rsgrpo.errors import InputError

VISRAG_QUERY_PREFIX = "Represent this query for retrieving relevant documents: "
POOLINGS = ("weighted_mean", "mean", "last", "cls")
KINDS = ("image", "text", "late", "imported")
ENGINES = ("transformers", "vllm")
DEFAULT_MIN_PIXELS, DEFAULT_MAX_PIXELS = 4 * 28 * 28, 1_280 * 28 * 28
RETRIEVER_FILE = "retriever.json"  # in a trained folder: what its queries and pages go through
_EDGE_BYTES = 1 << 20  # of a weight file, hashed at both ends

PageInput = Image.Image | str
"""A page as a model takes it: resized pixels, or its text."""


class EncoderError(InputError):
    """The encoder cannot be loaded, or not encode what it was given."""


class EncoderIdentity(Protocol):
    """What an index keeps of the encoder that made it.

    fingerprint: the digest of `description`; equal for two encoders exactly when their vectors compare. description:
    what it is made from, for messages. multi_vector: whether an item gives (T, D) instead of (D,).
    """

    @property
    def fingerprint(self) -> str:
        """Return the digest of `description`."""

    @property
    def description(self) -> Mapping[str, Any]:
        """Return what the encoder is made from."""

    @property
    def multi_vector(self) -> bool:
        """Say whether an item gives several vectors."""


class Encoder(EncoderIdentity, Protocol):
    """What turns pages and queries into vectors of length 1 whose inner products compare."""

    def encode_pages(self, pages: Sequence[Page]) -> list[np.ndarray]:
        """Return one float32 array per page."""

    def encode_queries(self, queries: Sequence[str]) -> list[np.ndarray]:
        """Return one float32 array per query."""


@runtime_checkable
class ModelEncoder(Encoder, Protocol):
    """An encoder whose two halves may run apart: processors load pages, a model encodes them."""

    @property
    def loader(self) -> PageLoader:
        """Return what a page goes through first."""

    def encode_loaded(self, inputs: Sequence[PageInput], page_ids: Sequence[str]) -> list[np.ndarray]:
        """Return one float32 array per loaded page."""


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """How an encoder is loaded.

    kind: "image" and "text" read pages as pixels or by their text layer into one vector, "late" as pixels into one
        vector per token; "imported" looks both up in files.
    engine: what runs the model; the vectors are the same, and so is the fingerprint.
    pooling: of a folder that does not fix its own; "" is weighted_mean. query_prefix: None leaves it to the model.
    min_pixels, max_pixels: what a page is resized into, for models that take pages of any size.
    """

    model: str
    kind: Literal["image", "text", "late", "imported"] = "image"
    engine: Literal["transformers", "vllm"] = "transformers"
    pooling: str = ""
    query_prefix: str | None = None
    min_pixels: int = DEFAULT_MIN_PIXELS
    max_pixels: int = DEFAULT_MAX_PIXELS
    batch_size: int = 8
    device: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    revision: str = ""
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"--kind {self.kind}: there are {', '.join(KINDS)}")
        if self.engine not in ENGINES:
            raise InputError(f"--encode-with {self.engine}: there are {', '.join(ENGINES)}")
        if self.engine == "vllm" and self.kind != "image":
            raise InputError(f"--encode-with vllm serves --kind image only, not {self.kind}; leave it out")
        if self.pooling and self.pooling not in POOLINGS:
            raise InputError(f"--pooling {self.pooling}: there are {', '.join(POOLINGS)}")
        if self.batch_size < 1:
            raise InputError(f"--batch-size must be >= 1, got {self.batch_size}")
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise InputError(f"--min-pixels {self.min_pixels} must be in [1, --max-pixels {self.max_pixels}]")


def fingerprint(description: Mapping[str, Any]) -> str:
    """Return the digest of what an encoder is made from."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


def model_folder(model: str, revision: str) -> Path:
    """Return the local folder of a model, fetching a hub name first.

    Raises:
        EncoderError: neither a folder nor a name that can be fetched.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision or None))
    except (OSError, ValueError) as error:
        raise EncoderError(f"model {model} is no folder and cannot be fetched: {error}") from error


def folder_digest(folder: Path) -> str:
    """Return the digest of a model folder: small files whole, large ones by length and both ends."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.suffix in (".md", ".png") or file.name.startswith("."):
            continue
        num_bytes = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {num_bytes}\n".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(_EDGE_BYTES))
            stream.seek(max(0, num_bytes - _EDGE_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class PageLoader:
    """What a page goes through before a model sees it. Small: it travels to the processes that load pages.

    as_text: the text layer is taken instead of the pixels. factor: sides become multiples of it, and the model's own
    processor then finds nothing left to resize; 0 for models of one fixed size, whose processor knows.
    min_pixels, max_pixels: bounds of the resized area.
    """

    as_text: bool = False
    factor: int = 0
    min_pixels: int = 1
    max_pixels: int = 1

    @classmethod
    def of(cls, image_processor: Any, settings: EncoderSettings, *, as_text: bool = False) -> PageLoader:
        """Return the loader that fits a model's image processor (None where it has none)."""
        patch, merge = (getattr(image_processor, name, None) for name in ("patch_size", "merge_size"))
        if not isinstance(patch, int) or not isinstance(merge, int):
            return cls(as_text)
        sizes = getattr(image_processor, "size", None) or {}
        low = max(settings.min_pixels, sizes.get("shortest_edge") or 1)
        high = max(low, min(settings.max_pixels, sizes.get("longest_edge") or math.inf))
        return cls(as_text, patch * merge, low, int(high))

    def resize(self, image: Image.Image) -> Image.Image:
        """Return the pixels that a model sees."""
        if not self.factor:
            return image
        height, width = smart_resize(image.height, image.width, self.factor, self.min_pixels, self.max_pixels)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def __call__(self, page: Page) -> PageInput:
        """Return a page's input.

        Raises:
            EncoderError: its image is gone or damaged.
        """
        if self.as_text:
            return page.text
        try:
            return self.resize(decode(page.image))
        except PromptError as error:
            folder = Path(page.image).parent
            raise EncoderError(
                f"page {page.page_id} of {page.document}: {error}; delete {folder} and ingest again"
            ) from error


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """All that can be said of a model's encoder without loading its weights.

    settings: with what a trained folder says of itself. query_prefix: None leaves it to the prompts of a
    sentence-transformers folder.
    """

    folder: Path
    settings: EncoderSettings
    query_prefix: str | None
    loader: PageLoader
    description: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Return the digest of `description`."""
        return fingerprint(self.description)

    @property
    def multi_vector(self) -> bool:
        """Say whether an item gives several vectors."""
        return self.settings.kind == "late"


def identify(settings: EncoderSettings) -> ModelIdentity:
    """Return the identity of an encoder that runs a model.

    Raises:
        EncoderError: there is no such folder.
    """
    folder = model_folder(settings.model, settings.revision)
    settings = _with_trained_defaults(settings, folder)
    prefix = settings.query_prefix
    if prefix is None and settings.kind != "late" and not (folder / "modules.json").exists():
        prefix = VISRAG_QUERY_PREFIX
    pixels = {} if settings.kind == "text" else {"pixels": [settings.min_pixels, settings.max_pixels]}
    # what decides a vector; batch size, device and engine do not
    description = pixels | {
        "model": folder_digest(folder),
        "kind": settings.kind,
        "pooling": settings.pooling or "own or weighted_mean",
        "query_prefix": prefix,
        "dtype": settings.dtype,
    }
    processor = None if settings.kind == "text" else _image_processor(folder, settings)
    as_text = settings.kind == "text" or (settings.kind == "late" and processor is None)
    return ModelIdentity(folder, settings, prefix, PageLoader.of(processor, settings, as_text=as_text), description)


def _with_trained_defaults(settings: EncoderSettings, folder: Path) -> EncoderSettings:
    """Fill what is at its default with what a trained folder says of itself."""
    if not (folder / RETRIEVER_FILE).exists():
        return settings
    defaults = {"query_prefix": None, "min_pixels": DEFAULT_MIN_PIXELS, "max_pixels": DEFAULT_MAX_PIXELS}
    try:
        trained = json.loads((folder / RETRIEVER_FILE).read_text())
        taken = {name: trained[name] for name in trained if getattr(settings, name) == defaults[name]}
        return replace(settings, **taken)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EncoderError(f"{folder / RETRIEVER_FILE} cannot be read: {error}; export the retriever again") from error


def _image_processor(folder: Path, settings: EncoderSettings) -> Any:
    """Return what cuts a model's images into patches, or None where it has none in the usual place."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError):
        return None


def unit_rows(vectors_ND: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
    """Return float32 rows of length 1.

    Raises:
        EncoderError: a row is zero or not finite.
    """
    rows_ND = np.asarray(vectors_ND, dtype=np.float32)
    lengths_N = np.linalg.norm(rows_ND, axis=1)
    bad = np.flatnonzero(~(np.isfinite(lengths_N) & (lengths_N > 0)))
    if len(bad):
        raise EncoderError(f"the encoder gave a vector of length {lengths_N[bad[0]]} for {names[bad[0]]!r}")
    return list(rows_ND / lengths_N[:, None])
