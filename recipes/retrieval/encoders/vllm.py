"""The single-vector vision-language encoder run by vLLM: the vectors of `SentenceEncoder`, pooled here.

vLLM has no position-weighted mean, so it returns the last hidden state of every token and `pool` does the rest. It
supports models that cut pages into patches (the Qwen-VL families), as plain folders or saved by sentence-transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from recipes.retrieval.encoders.base import (
    EncoderError,
    EncoderSettings,
    ModelEncoder,
    PageInput,
    unit_rows,
)
from recipes.retrieval.encoders.vllm_pooling import PoolingPrompt, TokenStates
from rollout.config import ConfigError
from rollout.engine import EngineError

MAX_TEXT_TOKENS = 2_048  # of a query, and of the chat template around a page
POOLING_MODES = {"weightedmean": "weighted_mean", "mean": "mean", "lasttoken": "last", "cls": "cls"}


def pool(states_TD: np.ndarray, pooling: str) -> np.ndarray:
    """Return (D,) float32: `weighted_mean` weighs the token at position t, counted from 1, by t.

    >>> pool(np.array([[3.0, 0.0], [0.0, 3.0]]), "weighted_mean")
    array([1., 2.], dtype=float32)
    """
    if pooling == "weighted_mean":
        return np.average(states_TD, axis=0, weights=np.arange(1, len(states_TD) + 1)).astype(np.float32)
    if pooling == "mean":
        return states_TD.mean(axis=0, dtype=np.float64).astype(np.float32)
    return states_TD[-1 if pooling == "last" else 0].astype(np.float32)


class VllmEncoder(ModelEncoder):
    """A vision-language model of one vector per item, run by vLLM."""

    def __init__(self, settings: EncoderSettings) -> None:
        from transformers import AutoConfig, AutoProcessor

        super().__init__(settings)
        loader = self.identity.loader
        folder, consent = self.identity.folder, {"trust_remote_code": settings.trust_remote_code}
        self._pooling = folder_pooling(folder, self.identity.settings)
        if not loader.factor:
            raise EncoderError(
                f"--encode-with vllm supports models that cut pages into patches (Qwen-VL), not {folder}"
            )
        self._processor: Any = AutoProcessor.from_pretrained(folder, **consent)
        self._page_ids = self._token_ids([{"type": "image"}])
        text_config = AutoConfig.from_pretrained(folder, **consent).get_text_config()
        image_tokens = loader.max_pixels // loader.factor**2
        self._max_tokens = min(image_tokens + MAX_TEXT_TOKENS, text_config.max_position_embeddings)
        try:
            self._states = TokenStates(
                str(folder), dtype=self.identity.settings.dtype, max_tokens=self._max_tokens,
                image_pixels=(loader.min_pixels, loader.max_pixels), device=settings.device or "auto",
                **consent,
            )  # fmt: skip
        except (EngineError, ConfigError) as error:
            raise EncoderError(str(error)) from error

    def encode_loaded(self, inputs: Sequence[PageInput], page_ids: Sequence[str]) -> list[np.ndarray]:
        """Return (D,) per loaded page."""
        prompts = []
        for image in inputs:
            assert isinstance(image, Image.Image), "this encoder reads pixels"
            image_tokens = image.width * image.height // self.identity.loader.factor**2
            prompts.append(PoolingPrompt(self._page_ids, image, len(self._page_ids) - 1 + image_tokens))
        return self._vectors(prompts, page_ids)

    def encode_queries(self, queries: Sequence[str]) -> list[np.ndarray]:
        """Return (D,) per query."""
        prompts = []
        for query in queries:
            text = (self.identity.query_prefix or "") + query
            token_ids = self._token_ids([{"type": "text", "text": text}])
            if len(token_ids) > self._max_tokens:
                raise EncoderError(f"a query has {len(token_ids)} tokens, more than {self._max_tokens}; shorten it")
            prompts.append(PoolingPrompt(token_ids, None, len(token_ids)))
        return self._vectors(prompts, queries)

    def close(self) -> None:
        """End vLLM."""
        self._states.close()

    def _vectors(self, prompts: Sequence[PoolingPrompt], names: Sequence[str]) -> list[np.ndarray]:
        if not prompts:
            return []
        try:
            states = self._states.encode(prompts)
        except EngineError as error:
            raise EncoderError(str(error)) from error
        return unit_rows(np.stack([pool(states_TD, self._pooling) for states_TD in states]), names)

    def _token_ids(self, content: list[dict[str, str]]) -> tuple[int, ...]:
        text = self._processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        return tuple(self._processor.tokenizer.encode(text, add_special_tokens=False))


def folder_pooling(folder: Path, settings: EncoderSettings) -> str:
    """Return the pooling of a model folder: its own, or the requested one.

    Raises:
        EncoderError: vLLM cannot give the vectors that sentence-transformers would.
    """
    if (folder / "adapter_config.json").exists():
        raise EncoderError(f"{folder} holds adapters, which --encode-with vllm does not load; omit that option")
    if not (folder / "config.json").exists():
        raise EncoderError(f"{folder} is not a model folder: it has no config.json")
    if not (folder / "modules.json").exists():
        return settings.pooling or "weighted_mean"
    if settings.pooling:
        raise EncoderError(f"--pooling {settings.pooling}: {folder} has modules.json, which fixes the pooling; omit it")
    modules = {entry["type"].rpartition(".")[2]: entry["path"] for entry in _json(folder / "modules.json")}
    if set(modules) != {"Transformer", "Pooling", "Normalize"} or modules["Transformer"]:
        raise EncoderError(
            f"{folder} has {', '.join(modules)}; --encode-with vllm supports only Transformer, Pooling and Normalize"
        )
    mode = _json(folder / modules["Pooling"] / "config.json").get("pooling_mode")
    if mode not in POOLING_MODES:
        raise EncoderError(f"{folder} pools by {mode}; --encode-with vllm supports {', '.join(POOLING_MODES)}")
    prompts = _json(folder / "config_sentence_transformers.json").get("prompts") or {}
    if any(prompts.values()):
        raise EncoderError(
            f"{folder} has prompts of its own, which --encode-with vllm does not apply; omit that option"
        )
    return POOLING_MODES[mode]


def _json(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else {}
