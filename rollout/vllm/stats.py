"""What vLLM reports while it runs, added up: tokens, prefix-cache hits, and when the last token came."""

from __future__ import annotations

import threading
import time
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class Progress:
    """Counters of one engine; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = False
        self._since = self._last_token = time.monotonic()
        self._busy_s = 0.0
        self._counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "generated_tokens", "preempted"), 0)

    def logger(self, vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
        """Return what vLLM calls after each of its steps."""
        return _Logger(self)

    def start(self) -> None:
        """Sampling begins."""
        with self._lock:
            self._running = True
            self._since = self._last_token = time.monotonic()

    def stop(self) -> None:
        """Sampling is over."""
        with self._lock:
            if self._running:
                self._busy_s += time.monotonic() - self._since
            self._running = False

    def idle_s(self) -> float:
        """Return seconds since the last token, or since sampling began."""
        with self._lock:
            return time.monotonic() - self._last_token

    def add(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        """Take in one step's report."""
        with self._lock:
            if scheduler_stats is not None:
                self._counts["prompt_tokens"] += scheduler_stats.prefix_cache_stats.queries
                self._counts["cached_tokens"] += scheduler_stats.prefix_cache_stats.hits
            if iteration_stats is not None:
                self._counts["generated_tokens"] += iteration_stats.num_generation_tokens
                self._counts["preempted"] += iteration_stats.num_preempted_reqs
                if iteration_stats.num_generation_tokens or iteration_stats.num_prompt_tokens:
                    self._last_token = time.monotonic()

    def take(self) -> dict[str, float]:
        """Return the counts since the last call and begin again."""
        with self._lock:
            now = time.monotonic()
            busy_s = self._busy_s + (now - self._since if self._running else 0.0)
            counts = {name: float(count) for name, count in self._counts.items()}
            self._since, self._busy_s = now, 0.0
            self._counts = dict.fromkeys(self._counts, 0)
        return counts | {
            "seconds": busy_s,
            "tokens_per_s": counts["generated_tokens"] / busy_s if busy_s else 0.0,
            "prefix_cache_hit_rate": counts["cached_tokens"] / counts["prompt_tokens"]
            if counts["prompt_tokens"]
            else 0.0,
        }


class _Logger(StatLoggerBase):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        self._progress.add(scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        pass
