"""Totals of what vLLM reports while it runs: tokens, prefix-cache hits, and the time of the last token."""

from __future__ import annotations

import threading
import time
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

COUNTS = ("prompt_tokens", "cached_tokens", "generated_tokens", "preempted")


class Progress(StatLoggerBase):  # type: ignore[misc,unused-ignore]
    """Counters of one engine, updated by vLLM after each of its steps; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_running = 0
        self._since = self._last_token = time.monotonic()
        self._busy_s = 0.0
        self._counts = dict.fromkeys(COUNTS, 0)

    def start(self) -> None:
        """A call that samples begins; calls may overlap."""
        with self._lock:
            if not self._num_running:
                self._since = self._last_token = time.monotonic()
            self._num_running += 1

    def stop(self) -> None:
        """A call that samples is over."""
        with self._lock:
            self._num_running -= 1
            if not self._num_running:
                self._busy_s += time.monotonic() - self._since

    def idle_s(self) -> float:
        """Return seconds since the last token, or since sampling began."""
        with self._lock:
            return time.monotonic() - self._last_token

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Add the report of one step of vLLM."""
        with self._lock:
            if scheduler_stats is not None:
                self._counts["prompt_tokens"] += scheduler_stats.prefix_cache_stats.queries
                self._counts["cached_tokens"] += scheduler_stats.prefix_cache_stats.hits
            if iteration_stats is not None:
                self._counts["generated_tokens"] += iteration_stats.num_generation_tokens
                self._counts["preempted"] += iteration_stats.num_preempted_reqs
                if iteration_stats.num_generation_tokens or iteration_stats.num_prompt_tokens:
                    self._last_token = time.monotonic()

    def log_engine_initialized(self) -> None:
        """Required by vLLM."""

    def take(self) -> dict[str, float]:
        """Return the counts since the last call and reset them."""
        with self._lock:
            now = time.monotonic()
            busy_s = self._busy_s + (now - self._since if self._num_running else 0.0)
            counts = {name: float(count) for name, count in self._counts.items()}
            self._since, self._busy_s = now, 0.0
            self._counts = dict.fromkeys(COUNTS, 0)
        return counts | {
            "seconds": busy_s,
            "tokens_per_s": counts["generated_tokens"] / busy_s if busy_s else 0.0,
            "prefix_cache_hit_rate": counts["cached_tokens"] / (counts["prompt_tokens"] or 1.0),
        }
