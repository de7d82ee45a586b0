"""Encode pages on Ray Data: tasks on any CPU load pages, actors with one model each encode them.

The pages' images must be readable under the same paths on every node.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from PIL import Image

from recipes.retrieval.encoders.base import EncoderError, EncoderSettings, ModelIdentity, PageInput, PageLoader
from recipes.retrieval.encoders.choice import load_model_encoder
from recipes.retrieval.pages.store import Page
from rsgrpo.cluster.connect import connect_ray
from rsgrpo.errors import InputError, RsgrpoError

MAX_BLOCK_PAGES = 256  # loaded by one task
LOADERS_PER_WORKER = 4  # at most, if there are CPUs
BLOCKS_PER_WORKER = 4  # so that every worker gets some of a small corpus
OBJECT_STORE_BYTES = 2 << 30  # of a Ray that is started here
_INPUT_SCHEMA = pa.schema(
    [("page_id", pa.string()), ("text", pa.string()), ("pixels", pa.large_binary()), ("width", pa.int32()),
     ("height", pa.int32())]
)  # fmt: skip
_VECTOR_SCHEMA = pa.schema([("page_id", pa.string()), ("vectors", pa.large_binary()), ("num_vectors", pa.int32())])


@dataclass(frozen=True, slots=True)
class RaySettings:
    """Where models run.

    num_workers: models, each in its own actor. gpus_per_worker: 0 for models on CPU; None is 1 if the cluster has
    GPUs. address: of a running Ray ("auto"); "" starts one that ends with this process.
    """

    num_workers: int
    gpus_per_worker: float | None = None
    address: str = ""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise InputError(f"--workers must be >= 1 on Ray, got {self.num_workers}")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise InputError(f"--gpus-per-worker must be >= 0, got {self.gpus_per_worker}")


def encode_on_ray(
    identity: ModelIdentity, settings: RaySettings, pages: Iterable[Page]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield pages with their vectors in the order in which they arrive.

    Ray Data delays tasks while the models or this process do not keep up, so that memory stays bounded; the rows of
    the pages (without images) are passed at the start.

    Raises:
        InputError: the cluster is too small, or a page or the model cannot be used.
    """
    blocks = _blocks(list(pages), identity, settings)
    if not blocks:
        return
    _connect(settings)
    num_gpus = _gpus_per_worker(settings)
    encoder = identity.settings
    dataset = (
        ray.data.from_arrow(blocks)
        .map_batches(
            partial(_load, loader=identity.loader),
            # an explicit size also keeps Ray Data from loading pages inside the models' actors
            compute=ray.data.TaskPoolStrategy(size=min(LOADERS_PER_WORKER * settings.num_workers, len(blocks))),
            batch_size=encoder.batch_size,
            batch_format="pyarrow",
        )
        .map_batches(
            _Model,
            fn_constructor_args=(encoder, identity.fingerprint),
            compute=ray.data.ActorPoolStrategy(size=settings.num_workers),
            batch_size=encoder.batch_size,
            batch_format="pyarrow",
            num_cpus=0 if num_gpus else 1,
            num_gpus=num_gpus or None,
        )
    )
    try:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from _vectors(table, multi_vector=identity.multi_vector)
    except (ray.exceptions.RayError, RsgrpoError) as error:
        raise _cause(error) from error


def _blocks(pages: list[Page], identity: ModelIdentity, settings: RaySettings) -> list[pa.Table]:
    """Return the rows of the pages in blocks, so that every worker gets some."""
    size = -(-len(pages) // (BLOCKS_PER_WORKER * settings.num_workers))
    size = min(MAX_BLOCK_PAGES, max(identity.settings.batch_size, size))
    remaining = iter(pages)
    blocks = iter(lambda: list(islice(remaining, size)), [])
    keep_text = identity.loader.as_text
    return [
        pa.Table.from_pylist([asdict(p) if keep_text else asdict(p) | {"text": ""} for p in block]) for block in blocks
    ]


def _connect(settings: RaySettings) -> None:
    """Start Ray or join a cluster, unless this process is connected already."""
    connect_ray(
        settings.address,
        num_cpus=max(os.cpu_count() or 1, settings.num_workers + 1),
        object_store_bytes=OBJECT_STORE_BYTES,
        log_to_driver=False,
    )
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it logs every execution; errors are raised here
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # our console shows one bar for all pages
    context.execution_options.preserve_order = False
    context.raise_original_map_exception = True


def _gpus_per_worker(settings: RaySettings) -> float:
    """Return the number of GPUs per model.

    Raises:
        InputError: the cluster is too small for all of them.
    """
    there = ray.cluster_resources()
    chosen = settings.gpus_per_worker
    if chosen is None:
        chosen = 1.0 if there.get("GPU", 0) else 0.0
    kind, needed = ("GPU", settings.num_workers * chosen) if chosen else ("CPU", settings.num_workers + 1)
    if there.get(kind, 0) < needed:
        raise InputError(
            f"--workers {settings.num_workers} need {needed:g} {kind}s (one CPU loads pages), but the Ray cluster has "
            f"{there.get(kind, 0):g}; lower it"
        )
    return chosen


def _load(pages: pa.Table, loader: PageLoader) -> pa.Table:
    """Load pages, on any node, as 8-bit RGB at the size that the model sees."""
    rows = []
    for row in pages.to_pylist():
        loaded = loader(Page(**row))
        if isinstance(loaded, str):
            rows.append({"page_id": row["page_id"], "text": loaded, "pixels": b"", "width": 0, "height": 0})
        else:
            image = loaded.convert("RGB")
            size = {"width": image.width, "height": image.height}
            rows.append({"page_id": row["page_id"], "text": "", "pixels": image.tobytes(), **size})
    return pa.Table.from_pylist(rows, schema=_INPUT_SCHEMA)


class _Model:
    """One model in an actor."""

    def __init__(self, settings: EncoderSettings, fingerprint: str) -> None:
        self._encoder = load_model_encoder(settings)
        if self._encoder.identity.fingerprint != fingerprint:
            raise EncoderError(f"the folder {settings.model} differs between nodes; copy one version to every node")

    def __call__(self, inputs: pa.Table) -> pa.Table:
        """Return the vectors of loaded pages as float32 bytes."""
        rows = inputs.to_pylist()
        page_ids = [row["page_id"] for row in rows]
        vectors = self._encoder.encode_loaded([_input(row) for row in rows], page_ids)
        found = [
            {"page_id": page_id, "vectors": rows_VD.astype(np.float32).tobytes(), "num_vectors": len(rows_VD)}
            for page_id, rows_VD in zip(page_ids, map(np.atleast_2d, vectors), strict=True)
        ]
        return pa.Table.from_pylist(found, schema=_VECTOR_SCHEMA)


def _input(row: dict[str, Any]) -> PageInput:
    if not row["width"]:
        return row["text"]
    return Image.frombytes("RGB", (row["width"], row["height"]), row["pixels"])


def _vectors(table: pa.Table, *, multi_vector: bool) -> Iterator[tuple[str, np.ndarray]]:
    for row in table.to_pylist():
        rows_VD = np.frombuffer(row["vectors"], dtype=np.float32).reshape(row["num_vectors"], -1)
        yield row["page_id"], rows_VD if multi_vector else rows_VD[0]


def _cause(error: BaseException) -> BaseException:
    """Return our error if Ray has wrapped one, else Ray's own."""
    inner = getattr(error, "cause", None)
    if isinstance(inner, BaseException):
        return _cause(inner)
    # Ray appends advice about its own settings to our line
    return EncoderError(str(error).splitlines()[0]) if isinstance(error, RsgrpoError) else error
