"""Encode pages on Ray Data: tasks on any CPU load pages, actors with one model each encode them.

The pages' images must be readable under the same paths on every node.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data

from recipes.retrieval.encoders.base import EncoderError, EncoderSettings, ModelIdentity, PageLoader
from recipes.retrieval.encoders.choice import load_model_encoder
from recipes.retrieval.pages.store import Page
from rsgrpo.cluster.connect import connect_ray
from rsgrpo.errors import InputError, RsgrpoError

MAX_BLOCK_PAGES = 256  # loaded by one task
LOADERS_PER_WORKER = 4  # at most, if there are CPUs
BLOCKS_PER_WORKER = 4  # so that every worker gets some of a small corpus
OBJECT_STORE_BYTES = 2 << 30  # of a Ray that is started here


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
    rows = [asdict(page) if identity.loader.as_text else asdict(page) | {"text": ""} for page in pages]
    if not rows:
        return
    _connect(settings)
    num_gpus = _gpus_per_worker(settings)
    encoder = identity.settings
    num_blocks = _num_blocks(len(rows), encoder.batch_size, settings.num_workers)
    dataset = (
        ray.data.from_items(rows, override_num_blocks=num_blocks)
        .map_batches(
            partial(_load, loader=identity.loader),
            # an explicit size also keeps Ray Data from loading pages inside the models' actors
            compute=ray.data.TaskPoolStrategy(size=min(LOADERS_PER_WORKER * settings.num_workers, num_blocks)),
            batch_size=encoder.batch_size,
        )
        .map_batches(
            _Model,
            fn_constructor_args=(encoder, identity.fingerprint),
            compute=ray.data.ActorPoolStrategy(size=settings.num_workers),
            batch_size=encoder.batch_size,
            num_cpus=0 if num_gpus else 1,
            num_gpus=num_gpus or None,
        )
    )
    try:
        for batch in dataset.iter_batches(batch_size=None):
            yield from zip(batch["page_id"].tolist(), map(pickle.loads, batch["vectors"]), strict=True)
    except (ray.exceptions.RayError, RsgrpoError) as error:
        raise _cause(error) from error


def _num_blocks(num_pages: int, batch_size: int, num_workers: int) -> int:
    """Return into how many blocks pages are cut: every worker gets some, and a block fills a batch."""
    size = -(-num_pages // (BLOCKS_PER_WORKER * num_workers))
    return -(-num_pages // min(MAX_BLOCK_PAGES, max(batch_size, size)))


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
    """Return the number of GPUs per model; InputError if the cluster is too small for all of them."""
    there = ray.cluster_resources()
    chosen = settings.gpus_per_worker
    if chosen is None:
        chosen = 1.0 if there.get("GPU", 0) else 0.0
    kind, needed = ("GPU", settings.num_workers * chosen) if chosen else ("CPU", settings.num_workers + 1)
    if there.get(kind, 0) < needed:
        raise InputError(
            f"--workers {settings.num_workers} needs {needed:g} {kind}s (one CPU loads pages), but the Ray cluster has "
            f"{there.get(kind, 0):g}; lower it"
        )
    return chosen


# Pages and vectors travel pickled: Ray's tables have no type for images, nor for vectors of several shapes.


def _load(pages: dict[str, np.ndarray], loader: PageLoader) -> dict[str, Any]:
    """Load pages, on any node, as 8-bit RGB at the size that the model sees."""
    inputs = []
    for values in zip(*(column.tolist() for column in pages.values()), strict=True):
        loaded = loader(Page(**dict(zip(pages, values, strict=True))))
        inputs.append(pickle.dumps(loaded if isinstance(loaded, str) else loaded.convert("RGB")))
    return {"page_id": pages["page_id"], "input": inputs}


class _Model:
    """One model in an actor."""

    def __init__(self, settings: EncoderSettings, fingerprint: str) -> None:
        self._encoder = load_model_encoder(settings)
        if self._encoder.identity.fingerprint != fingerprint:
            raise EncoderError(f"the folder {settings.model} differs between nodes; copy one version to every node")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return the vectors of loaded pages."""
        inputs = [pickle.loads(content) for content in batch["input"]]
        vectors = self._encoder.encode_loaded(inputs, batch["page_id"].tolist())
        return {"page_id": batch["page_id"], "vectors": [pickle.dumps(vector) for vector in vectors]}


def _cause(error: BaseException) -> BaseException:
    """Return our error if Ray has wrapped one, else Ray's own."""
    inner = getattr(error, "cause", None)
    if isinstance(inner, BaseException):
        return _cause(inner)
    # Ray appends advice about its own settings to our line
    return EncoderError(str(error).splitlines()[0]) if isinstance(error, RsgrpoError) else error
