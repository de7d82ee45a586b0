"""The single-vector vision-language encoder run by vLLM: the vectors of `SentenceEncoder`, pooled here.

vLLM has no position-weighted mean, so its pooling runner returns the last hidden state of every token and `pool` does
the rest. It supports models that cut pages into patches (the Qwen-VL families), as plain folders or saved by
sentence-transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from recipes.retrieval.encoders.base import EncoderError, EncoderSettings, ModelEncoder, PageInput, unit_rows
from rollout.config import ConfigError, VllmConfig
from rollout.vllm.launch import CPU_BLOCK_SIZE, child_environment, environment, on_cpu

MAX_TEXT_TOKENS = 2_048  # of a query, and of the chat template around a page
CPU_CACHE_BYTES = 1 << 30
MIN_BATCHED_TOKENS = 8_192
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
    """A vision-language model of one vector per item. Create it once; `close` it in a process that continues."""

    def __init__(self, settings: EncoderSettings) -> None:
        from transformers import AutoConfig, AutoProcessor

        super().__init__(settings)
        loader, folder = self.identity.loader, self.identity.folder
        self._pooling = folder_pooling(folder, self.identity.settings)
        if not loader.factor:
            raise EncoderError(
                f"--encode-with vllm supports models that cut pages into patches (Qwen-VL), not {folder}"
            )
        consent = {"trust_remote_code": settings.trust_remote_code}
        self._processor: Any = AutoProcessor.from_pretrained(folder, **consent)
        self._page_ids = self._token_ids([{"type": "image"}])
        text_config = AutoConfig.from_pretrained(folder, **consent).get_text_config()
        image_tokens = loader.max_pixels // loader.factor**2
        self._max_tokens = min(image_tokens + MAX_TEXT_TOKENS, text_config.max_position_embeddings)
        self._llm = self._start()

    def _start(self) -> Any:
        """Return vLLM's pooling runner, which returns the last hidden state of every token of a prompt."""
        settings, loader = self.identity.settings, self.identity.loader
        try:
            cpu = on_cpu(settings.device or "auto")
        except ConfigError as error:
            raise EncoderError(str(error)) from error
        from vllm import LLM
        from vllm.config import PoolerConfig

        arguments: dict[str, Any] = {
            "model": str(self.identity.folder),
            "runner": "pooling",
            "convert": "embed",
            "dtype": settings.dtype,
            "max_model_len": self._max_tokens,
            # a prompt's states are returned by one step, and none of its cache is reused
            "max_num_batched_tokens": max(MIN_BATCHED_TOKENS, self._max_tokens),
            "enable_chunked_prefill": False,
            "enable_prefix_caching": False,
            "pooler_config": PoolerConfig(task="token_embed", pooling_type="ALL", use_activation=False),
            "limit_mm_per_prompt": {"image": 1, "video": 0},
            "mm_processor_kwargs": {
                "do_resize": False,  # images arrive resized
                "size": {"shortest_edge": loader.min_pixels, "longest_edge": loader.max_pixels},
            },
            "trust_remote_code": settings.trust_remote_code,
            "disable_log_stats": True,
        }
        if cpu:
            arguments |= {
                "enforce_eager": True,
                "block_size": CPU_BLOCK_SIZE,
                "kv_cache_memory_bytes": CPU_CACHE_BYTES,
                "distributed_executor_backend": "uni",
            }
        with environment(child_environment(VllmConfig(), cpu=cpu, backend="", num_threads=0)):
            try:
                return LLM(**arguments)
            except (ValueError, NotImplementedError, RuntimeError) as error:
                raise EncoderError(f"vLLM cannot pool {self.identity.folder}: {error}") from error

    def encode_loaded(self, inputs: Sequence[PageInput], page_ids: Sequence[str]) -> list[np.ndarray]:
        """Return (D,) per loaded page."""
        prompts, num_tokens = [], []
        for image in inputs:
            assert isinstance(image, Image.Image), "this encoder reads pixels"
            prompts.append({"prompt_token_ids": self._page_ids, "multi_modal_data": {"image": image}})
            image_tokens = image.width * image.height // self.identity.loader.factor**2
            num_tokens.append(len(self._page_ids) - 1 + image_tokens)  # in the prompt, one placeholder is all of them
        return self._vectors(prompts, num_tokens, page_ids)

    def encode_queries(self, queries: Sequence[str]) -> list[np.ndarray]:
        """Return (D,) per query."""
        prefix = self.identity.query_prefix or ""
        token_ids = [self._token_ids([{"type": "text", "text": prefix + query}]) for query in queries]
        num_tokens = [len(ids) for ids in token_ids]
        if max(num_tokens, default=0) > self._max_tokens:
            raise EncoderError(f"a query has {max(num_tokens)} tokens, more than {self._max_tokens}; shorten it")
        return self._vectors([{"prompt_token_ids": ids} for ids in token_ids], num_tokens, queries)

    def close(self) -> None:
        """End vLLM."""
        self._llm.llm_engine.engine_core.shutdown()

    def _vectors(
        self, prompts: list[dict[str, Any]], num_tokens: Sequence[int], names: Sequence[str]
    ) -> list[np.ndarray]:
        """Return the pooled states of prompts, which vLLM must read as the expected numbers of tokens."""
        if not prompts:
            return []
        vectors = []
        found = self._llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        for output, expected in zip(found, num_tokens, strict=True):
            states_TD = output.outputs.data.float().cpu().numpy()
            if len(states_TD) != expected:
                raise EncoderError(
                    f"vLLM reads a prompt of {expected} tokens as {len(states_TD)}: its image processor differs from "
                    "the one in transformers; check the model folder's processor configuration"
                )
            vectors.append(pool(states_TD, self._pooling))
        return unit_rows(np.stack(vectors), names)

    def _token_ids(self, content: list[dict[str, str]]) -> list[int]:
        text = self._processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        return list(self._processor.tokenizer.encode(text, add_special_tokens=False))


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
