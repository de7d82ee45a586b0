"""vLLM's pooling runner: the last hidden state of every token of a prompt, for encoders that pool them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from rollout.config import VllmConfig
from rollout.engine import EngineError
from rollout.vllm.launch import CPU_BLOCK_SIZE, child_environment, environment, on_cpu

CPU_CACHE_BYTES = 1 << 30
MIN_BATCHED_TOKENS = 8_192


@dataclass(frozen=True, slots=True)
class PoolingPrompt:
    """One prompt. token_ids: with one placeholder per image. num_tokens: with all of the image's tokens."""

    token_ids: tuple[int, ...]
    image: Image.Image | None
    num_tokens: int


class TokenStates:
    """A model behind vLLM's pooling runner. Create it once; `close` it in a process that continues without it."""

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str,
        max_tokens: int,
        image_pixels: tuple[int, int],
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        """Start the engine.

        Args:
            max_tokens: of the longest prompt.
            image_pixels: smallest and largest area of an image; images arrive resized.

        Raises:
            ConfigError: vLLM is missing, or was built for another kind of device.
            EngineError: vLLM cannot run this model.
        """
        cpu = on_cpu(device)
        from vllm import LLM
        from vllm.config import PoolerConfig

        arguments: dict[str, Any] = {
            "model": model_path,
            "runner": "pooling",
            "convert": "embed",
            "dtype": dtype,
            "max_model_len": max_tokens,
            # a prompt's states are returned by one step, and none of its cache is reused
            "max_num_batched_tokens": max(MIN_BATCHED_TOKENS, max_tokens),
            "enable_chunked_prefill": False,
            "enable_prefix_caching": False,
            "pooler_config": PoolerConfig(task="token_embed", pooling_type="ALL", use_activation=False),
            "limit_mm_per_prompt": {"image": 1, "video": 0},
            "mm_processor_kwargs": {
                "do_resize": False,
                "size": {"shortest_edge": image_pixels[0], "longest_edge": image_pixels[1]},
            },
            "trust_remote_code": trust_remote_code,
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
                self._llm: Any = LLM(**arguments)
            except (ValueError, NotImplementedError, RuntimeError) as error:
                raise EngineError(f"vLLM cannot pool {model_path}: {error}") from error

    def encode(self, prompts: Sequence[PoolingPrompt]) -> list[np.ndarray]:
        """Return (tokens, D) float32 per prompt, in order.

        Raises:
            EngineError: vLLM turns an image into another number of tokens than the caller expects.
        """
        requests = []
        for prompt in prompts:
            request: dict[str, Any] = {"prompt_token_ids": list(prompt.token_ids)}
            if prompt.image is not None:
                request["multi_modal_data"] = {"image": prompt.image}
            requests.append(request)
        found = self._llm.encode(requests, pooling_task="token_embed", use_tqdm=False)
        states = [output.outputs.data.float().cpu().numpy() for output in found]
        for prompt, states_TD in zip(prompts, states, strict=True):
            if len(states_TD) != prompt.num_tokens:
                raise EngineError(
                    f"vLLM reads a prompt of {prompt.num_tokens} tokens as {len(states_TD)}: its image processor "
                    "differs from the one in transformers; check the model folder's processor configuration"
                )
        return states

    def close(self) -> None:
        """End the engine."""
        self._llm.llm_engine.engine_core.shutdown()
