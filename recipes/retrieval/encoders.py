"""From pages and queries to vectors, behind one protocol; the models themselves come through sentence-transformers.

Knows nothing of indexes. A vision-language folder without `modules.json` becomes VisRAG's retriever: pages and queries
through the chat template, one pooling over all tokens, length 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from recipes.retrieval.store import Page
from rollout.images import PromptError, decode, smart_resize
from rsgrpo.errors import InputError

VISRAG_QUERY_PREFIX = "Represent this query for retrieving relevant documents: "
POOLINGS = {"weighted_mean": "weightedmean", "mean": "mean", "last": "lasttoken", "cls": "cls"}
DEFAULT_MIN_PIXELS, DEFAULT_MAX_PIXELS = 4 * 28 * 28, 1_280 * 28 * 28
KINDS = ("image", "text", "late", "imported")
RETRIEVER_FILE = "retriever.json"  # in a trained folder: what its queries and pages go through
_EDGE_BYTES = 1 << 20  # of a weight file, hashed at both ends


class EncoderError(InputError):
    """The encoder cannot be loaded, or not encode what it was given."""


class Encoder(Protocol):
    """What turns pages and queries into vectors of length 1 whose inner products compare.

    fingerprint: equal for two encoders exactly when their vectors compare. description: what it is made from, for
    messages. multi_vector: whether an item gives (T, D) instead of (D,).
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

    def encode_pages(self, pages: Sequence[Page]) -> list[np.ndarray]:
        """Return one float32 array per page."""

    def encode_queries(self, queries: Sequence[str]) -> list[np.ndarray]:
        """Return one float32 array per query."""


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """How an encoder is loaded.

    kind: "image" and "text" read pages as pixels or by their text layer into one vector, "late" as pixels into one
        vector per token; "imported" looks both up in files.
    pooling: of a folder that does not fix its own; "" is weighted_mean. query_prefix: None leaves it to the model.
    min_pixels, max_pixels: what a page is resized into, for models that take pages of any size.
    """

    model: str
    kind: Literal["image", "text", "late", "imported"] = "image"
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
        if self.pooling and self.pooling not in POOLINGS:
            raise InputError(f"--pooling {self.pooling}: there are {', '.join(POOLINGS)}")
        if self.batch_size < 1:
            raise InputError(f"--batch-size must be >= 1, got {self.batch_size}")
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise InputError(f"--min-pixels {self.min_pixels} must be in [1, --max-pixels {self.max_pixels}]")


_DEFAULTS = {"query_prefix": None, "min_pixels": DEFAULT_MIN_PIXELS, "max_pixels": DEFAULT_MAX_PIXELS}


def load_encoder(settings: EncoderSettings) -> Encoder:
    """Load the encoder that the settings name.

    Raises:
        EncoderError: there is no such model, or the settings do not fit it.
    """
    if settings.kind == "imported":
        return ImportedEncoder(Path(settings.model))
    if settings.kind == "late":
        return LateEncoder(settings)
    return SentenceEncoder(settings)


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
        if not file.is_file() or file.suffix in (".md", ".txt~", ".png") or file.name.startswith("."):
            continue
        num_bytes = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {num_bytes}\n".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(_EDGE_BYTES))
            stream.seek(max(0, num_bytes - _EDGE_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()


class SentenceEncoder:
    """A sentence-transformers model of one vector per item, or a vision-language model made one."""

    multi_vector = False

    def __init__(self, settings: EncoderSettings) -> None:
        folder = model_folder(settings.model, settings.revision)
        self.settings = settings = with_trained_defaults(settings, folder)
        self.model = load_sentence_transformer(folder, settings)
        self._query_prefix = settings.query_prefix
        if self._query_prefix is None and not (folder / "modules.json").exists():
            self._query_prefix = VISRAG_QUERY_PREFIX
        if settings.kind == "image" and not self.model.supports("image"):
            raise EncoderError(f"model {settings.model} reads no images; use --kind text for its text layer")
        self._resize = page_resizer(self.model, settings)
        self.description = _describe(folder, settings, self._query_prefix)
        self.fingerprint = fingerprint(self.description)

    def encode_pages(self, pages: Sequence[Page]) -> list[np.ndarray]:
        """Return (D,) per page."""
        inputs: list[Any]
        if self.settings.kind == "text":
            inputs = [page.text for page in pages]
        else:
            inputs = [load_page(page, self._resize) for page in pages]
        vectors_ND = self.model.encode_document(inputs, batch_size=self.settings.batch_size, show_progress_bar=False)
        return _unit_rows(vectors_ND, [page.page_id for page in pages])

    def encode_queries(self, queries: Sequence[str]) -> list[np.ndarray]:
        """Return (D,) per query."""
        options: dict[str, Any] = {"batch_size": self.settings.batch_size, "show_progress_bar": False}
        if self._query_prefix is None:
            vectors_ND = self.model.encode_query(list(queries), **options)
        else:
            vectors_ND = self.model.encode([self._query_prefix + query for query in queries], **options)
        return _unit_rows(vectors_ND, queries)


class LateEncoder:
    """A sentence-transformers multi-vector model (ColPali, ColQwen): one vector per token, compared by MaxSim."""

    multi_vector = True

    def __init__(self, settings: EncoderSettings) -> None:
        from sentence_transformers import MultiVectorEncoder

        if settings.pooling:
            raise EncoderError(f"--pooling {settings.pooling}: a late-interaction model has none")
        folder = model_folder(settings.model, settings.revision)
        self.settings = settings
        self.model = MultiVectorEncoder(str(folder), **_load_options(settings))
        made_up = [module for module in self.model if type(module).__name__ == "Dense"]
        if made_up and not (folder / "modules.json").exists():
            raise EncoderError(f"{folder} has no trained projection for late interaction; name a ColPali-style model")
        self._resize = page_resizer(self.model, settings)
        self._as_text = not self.model.supports("image")
        self.description = _describe(folder, settings, settings.query_prefix)
        self.fingerprint = fingerprint(self.description)

    def encode_pages(self, pages: Sequence[Page]) -> list[np.ndarray]:
        """Return (T, D) per page."""
        inputs = [page.text if self._as_text else load_page(page, self._resize) for page in pages]
        return self._rows(self.model.encode_document, inputs)

    def encode_queries(self, queries: Sequence[str]) -> list[np.ndarray]:
        """Return (T, D) per query."""
        prefix = self.settings.query_prefix or ""
        return self._rows(self.model.encode_query, [prefix + query for query in queries])

    def _rows(self, encode: Callable[..., Any], inputs: list[Any]) -> list[np.ndarray]:
        found = encode(inputs, batch_size=self.settings.batch_size, show_progress_bar=False, convert_to_numpy=True)
        return [np.stack(_unit_rows(rows_TD, ["a token"] * len(rows_TD))) for rows_TD in found]


class ImportedEncoder:
    """Vectors that another program made, looked up by page id and by query.

    The folder holds `encoder.json` (anything that names the model: it is the fingerprint), `pages.npy` (N, D) with
    `page_ids.txt` (an id a line), and `queries.npy` (M, D) with `queries.jsonl` (a JSON string a line).
    """

    multi_vector = False

    def __init__(self, folder: Path) -> None:
        try:
            self.description = {"imported": json.loads((folder / "encoder.json").read_text())}
            self._pages = self._table(folder, "pages.npy", (folder / "page_ids.txt").read_text().splitlines())
            lines = (folder / "queries.jsonl").read_text().splitlines() if (folder / "queries.jsonl").exists() else []
            queries = [json.loads(line) for line in lines]
            self._queries = self._table(folder, "queries.npy", queries) if queries else ({}, np.zeros((0, 0)))
        except (OSError, ValueError) as error:
            raise EncoderError(
                f"imported embeddings in {folder} cannot be read: {error}; see docs/retrieval.md"
            ) from error
        self.folder = folder
        self.fingerprint = fingerprint(self.description)

    @staticmethod
    def _table(folder: Path, name: str, keys: list[str]) -> tuple[dict[str, int], np.ndarray]:
        vectors_ND = np.load(folder / name, mmap_mode="r")
        if vectors_ND.ndim != 2 or len(vectors_ND) != len(keys):
            raise ValueError(f"{name} has shape {vectors_ND.shape}, but there are {len(keys)} keys")
        return {key: row for row, key in enumerate(keys)}, vectors_ND

    def encode_pages(self, pages: Sequence[Page]) -> list[np.ndarray]:
        """Return (D,) per page."""
        return self._find(self._pages, [page.page_id for page in pages], "page")

    def encode_queries(self, queries: Sequence[str]) -> list[np.ndarray]:
        """Return (D,) per query."""
        return self._find(self._queries, queries, "query")

    def _find(self, table: tuple[dict[str, int], np.ndarray], keys: Sequence[str], what: str) -> list[np.ndarray]:
        rows, vectors_ND = table
        missing = [key for key in keys if key not in rows]
        if missing:
            raise EncoderError(
                f"{self.folder} has no vector for {len(missing)} of {len(keys)} ({what} {missing[0]!r}, ...); "
                "encode them there and add them to the files"
            )
        return _unit_rows(vectors_ND[[rows[key] for key in keys]], keys)


def load_sentence_transformer(folder: Path, settings: EncoderSettings) -> Any:
    """Return a SentenceTransformer; a plain model folder gets pooling and length 1.

    Raises:
        EncoderError: the folder is no model, or it fixes a pooling and another one is asked for.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    options = _load_options(settings)
    if (folder / "modules.json").exists():
        if settings.pooling:
            raise EncoderError(f"--pooling {settings.pooling}: {folder} has modules.json, which fixes the pooling")
        return SentenceTransformer(str(folder), **options)
    if not (folder / "config.json").exists():
        raise EncoderError(f"{folder} is no model folder: it has neither modules.json nor config.json")
    consent = {"trust_remote_code": settings.trust_remote_code}
    transformer = Transformer(
        str(folder), model_kwargs=options["model_kwargs"] | consent, config_kwargs=consent, processor_kwargs=consent
    )
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=POOLINGS[settings.pooling or "weighted_mean"])
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device=settings.device or None)


def with_trained_defaults(settings: EncoderSettings, folder: Path) -> EncoderSettings:
    """Fill what is at its default with what a trained folder says of itself."""
    if not (folder / RETRIEVER_FILE).exists():
        return settings
    trained = json.loads((folder / RETRIEVER_FILE).read_text())
    changes = {name: value for name, value in trained.items() if getattr(settings, name) == _DEFAULTS[name]}
    return replace(settings, **changes)


def page_resizer(model: Any, settings: EncoderSettings) -> Callable[[Image.Image], Image.Image]:
    """Return the resize that a page goes through; the model's own processor then finds nothing left to resize."""
    processor = getattr(getattr(model[0], "processor", None), "image_processor", None)
    patch, merge = getattr(processor, "patch_size", None), getattr(processor, "merge_size", None)
    if not isinstance(patch, int) or not isinstance(merge, int):
        return lambda image: image  # a model of one fixed size: its processor knows
    sizes = getattr(processor, "size", None) or {}
    low = max(settings.min_pixels, sizes.get("shortest_edge") or 1)
    high = max(low, min(settings.max_pixels, sizes.get("longest_edge") or math.inf))

    def resize(image: Image.Image) -> Image.Image:
        height, width = smart_resize(image.height, image.width, patch * merge, low, int(high))
        return image.resize((width, height), Image.Resampling.BICUBIC)

    return resize


def load_page(page: Page, resize: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Return a page's pixels as a model sees them.

    Raises:
        EncoderError: the image is gone or damaged.
    """
    try:
        return resize(decode(page.image))
    except PromptError as error:
        folder = Path(page.image).parent
        raise EncoderError(
            f"page {page.page_id} of {page.document}: {error}; delete {folder} and ingest again"
        ) from error


def _load_options(settings: EncoderSettings) -> dict[str, Any]:
    return {
        "device": settings.device or None,
        "trust_remote_code": settings.trust_remote_code,
        "model_kwargs": {"dtype": settings.dtype},
    }


def _describe(folder: Path, settings: EncoderSettings, query_prefix: str | None) -> dict[str, Any]:
    """Return what decides a vector; batch size and device do not."""
    pixels = {} if settings.kind == "text" else {"pixels": [settings.min_pixels, settings.max_pixels]}
    return pixels | {
        "model": folder_digest(folder),
        "kind": settings.kind,
        "pooling": settings.pooling or "own or weighted_mean",
        "query_prefix": query_prefix,
        "dtype": settings.dtype,
    }


def _unit_rows(vectors_ND: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
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
