"""Encoders that sentence-transformers runs: its own folders, and vision-language folders as VisRAG uses them.

A vision-language folder without `modules.json` is made into a VisRAG retriever: pages and queries go through the chat
template, one pooling over all tokens gives one vector, and vectors have length 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.multi_vector_encoder.interpretability import get_n_patches, real_query_token_slice
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from recipes.retrieval.encoders.base import (
    EncoderError,
    EncoderSettings,
    ModelEncoder,
    ModelIdentity,
    PageInput,
    unit_rows,
)
from recipes.retrieval.pages.store import Page

POOLING_MODES = {"weighted_mean": "weightedmean", "mean": "mean", "last": "lasttoken", "cls": "cls"}


class SentenceEncoder(ModelEncoder):
    """A sentence-transformers model of one vector per item, or a vision-language model made into one."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(settings)
        self.model = load_sentence_transformer(self.identity)
        _pad_on_a_harmless_side(self.model)
        if settings.kind == "image" and not self.model.supports("image"):
            raise EncoderError(f"model {settings.model} does not read images; use --kind text for its text layer")
        self._options: dict[str, Any] = {"batch_size": self.identity.settings.batch_size, "show_progress_bar": False}

    def encode_loaded(self, inputs: Sequence[PageInput], page_ids: Sequence[str]) -> list[np.ndarray]:
        """Return (D,) per loaded page."""
        with _blaming(self.identity.folder, "run"):
            vectors_ND = self.model.encode_document(list(inputs), **self._options)
        return unit_rows(vectors_ND, page_ids)

    def encode_queries(self, queries: Sequence[str]) -> list[np.ndarray]:
        """Return (D,) per query."""
        prefix = self.identity.query_prefix
        if prefix is None:
            vectors_ND = self.model.encode_query(list(queries), **self._options)
        else:
            vectors_ND = self.model.encode([prefix + query for query in queries], **self._options)
        return unit_rows(vectors_ND, queries)


class LateEncoder(ModelEncoder):
    """A sentence-transformers multi-vector model (ColPali, ColQwen): one vector per token, compared by MaxSim."""

    def __init__(self, settings: EncoderSettings) -> None:
        if settings.pooling:
            raise EncoderError(f"--pooling {settings.pooling}: a late-interaction model does not pool; omit it")
        super().__init__(settings)
        folder = self.identity.folder
        with _blaming(folder, "loaded"):
            self.model = MultiVectorEncoder(str(folder), **_load_options(self.identity.settings))
        _pad_on_a_harmless_side(self.model)
        if any(type(module).__name__ == "Dense" for module in self.model) and not _has_projection(folder):
            raise EncoderError(
                f"{folder} has no trained projection for late interaction, so a random one would be used; name a "
                "ColPali-style model"
            )

    def encode_loaded(self, inputs: Sequence[PageInput], page_ids: Sequence[str]) -> list[np.ndarray]:
        """Return (T, D) per loaded page."""
        return self._rows(self.model.encode_document, inputs, page_ids)

    def encode_queries(self, queries: Sequence[str]) -> list[np.ndarray]:
        """Return (T, D) per query."""
        prefix = self.identity.query_prefix or ""
        return self._rows(self.model.encode_query, [prefix + query for query in queries], queries)

    def similarity_map(self, query: str, page: Page, page_VD: np.ndarray) -> np.ndarray | None:
        """Return where on a page a query is found; see `PatchEncoder`."""
        image, text = self.identity.loader(page), (self.identity.query_prefix or "") + query
        if isinstance(image, str):
            return None
        try:
            columns, rows = get_n_patches(self.model, image.size)
        except (NotImplementedError, ValueError):  # the tokens of some families are not in the order of a grid
            return None
        is_patch_V = self._patches(image)
        if len(is_patch_V) != len(page_VD) or is_patch_V.sum() != rows * columns:
            return None
        (query_TD,) = self.encode_queries([query])
        words_TD = query_TD[real_query_token_slice(self.model, text)]
        similarities_PT = page_VD[is_patch_V] @ (words_TD if len(words_TD) else query_TD).T
        return similarities_PT.mean(axis=1).reshape(rows, columns).astype(np.float32)

    def _patches(self, image: PageInput) -> np.ndarray:
        """Return (V,) which of a page's vectors are those of image tokens."""
        features = self.model.preprocess([image], prompt=self.model.prompts.get("document"), task="document")
        for module in self.model:
            if isinstance(module, MultiVectorMask):
                features = module(features, task="document")
        image_token = self.model.tokenizer.convert_tokens_to_ids(self.model.processor.image_token)
        is_kept_T = features["attention_mask"][0].bool()
        return np.asarray((features["input_ids"][0] == image_token)[is_kept_T])

    def _rows(self, encode: Callable[..., Any], inputs: Sequence[Any], names: Sequence[str]) -> list[np.ndarray]:
        options = {"batch_size": self.identity.settings.batch_size, "show_progress_bar": False}
        with _blaming(self.identity.folder, "run"):
            found = encode(list(inputs), convert_to_numpy=True, **options)
        return [np.stack(unit_rows(rows_TD, [name] * len(rows_TD))) for rows_TD, name in zip(found, names, strict=True)]


def load_sentence_transformer(identity: ModelIdentity) -> Any:
    """Return a SentenceTransformer; a plain model folder gets pooling and normalisation.

    Raises:
        EncoderError: the folder is not a model, or it fixes a pooling and another one is requested.
    """
    folder, settings = identity.folder, identity.settings
    options = _load_options(settings)
    if (folder / "modules.json").exists():
        if settings.pooling:
            raise EncoderError(
                f"--pooling {settings.pooling}: {folder} has modules.json, which fixes the pooling; omit it"
            )
        with _blaming(folder, "loaded"):
            return SentenceTransformer(str(folder), **options)
    if not (folder / "config.json").exists():
        raise EncoderError(f"{folder} is not a model folder: it has neither modules.json nor config.json")
    consent = {"trust_remote_code": settings.trust_remote_code}
    with _blaming(folder, "loaded"):
        transformer = Transformer(
            str(folder), model_kwargs=options["model_kwargs"] | consent, config_kwargs=consent, processor_kwargs=consent
        )
        mode = POOLING_MODES[settings.pooling or "weighted_mean"]
        pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=mode)
        return SentenceTransformer(modules=[transformer, pooling, Normalize()], device=settings.device or None)


def _has_projection(folder: Path) -> bool:
    """Say whether a folder has a trained projection of single tokens; one that pools first does not."""
    file = folder / "modules.json"
    names = [module["type"].rpartition(".")[2] for module in json.loads(file.read_text())] if file.exists() else []
    return "Dense" in names and "Pooling" not in names


@contextmanager
def _blaming(folder: Path, what: str) -> Iterator[None]:
    """Turn what libraries raise about a model's files, its device or its memory into one line.

    Raises:
        EncoderError: names the folder.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EncoderError(f"{folder} does not fit into memory; lower --batch-size or --max-pixels") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AssertionError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise EncoderError(f"model {folder} cannot be {what}: {type(error).__name__}: {reason}") from error


def _pad_on_a_harmless_side(model: Any) -> None:
    """Pad on the right if positions are absolute: padding on the left would shift every token's position."""
    config, tokenizer = getattr(model[0], "config", None), getattr(model[0], "tokenizer", None)
    if config is None or tokenizer is None or getattr(config.get_text_config(), "rope_parameters", None):
        return
    tokenizer.padding_side = "right"


def _load_options(settings: EncoderSettings) -> dict[str, Any]:
    return {
        "device": settings.device or None,
        "trust_remote_code": settings.trust_remote_code,
        "model_kwargs": {"dtype": settings.dtype},
    }
