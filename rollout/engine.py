"""The protocol of every sampling engine; `rollout.build` chooses among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from rollout.errors import RsgrpoError
from rollout.types import Prompt, RolloutGroup, SamplingParams


class EngineError(RsgrpoError):
    """An engine cannot start, sample as asked, or take the weights it is given."""


class EngineFailed(EngineError):
    """The engine died, stalled or has half-loaded weights: close it, start another and ask again."""


Share = tuple[Sequence[Prompt], SamplingParams]
"""Prompts that one engine samples together, and how."""

NextShare = Callable[[], Share | None]
"""Returns the next share of work; None: there is none now. It is asked again whenever something has arrived."""

Backend = Literal["load", "gloo", "nccl", "ipc"]
"""How weights arrive: by `Engine.load_weights`, or over one of the transports of `rollout.vllm.weights_out`."""


class Engine(Protocol):
    """Samples groups of responses under one version of the weights."""

    weights_version: int
    backend: Backend

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, stop: Callable[[], bool] | None = None
    ) -> Iterator[RolloutGroup]:
        """Yield one group per prompt, in any order, as soon as it is finished.

        stop: asked now and then; once it returns True no further group is yielded.

        A prompt that cannot be sampled (too long, unreadable image, too many images) yields a group with `error`
        set; it never raises and never hangs the others. Vision placeholder tokens are never sampled.
        """
        ...

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite weights by their Hugging Face names. May be called several times for one version."""
        ...

    def finish_weights(self, version: int) -> None:
        """All weights of `version` have arrived: drop caches made under the old ones and sample with the new."""
        ...

    def count_vision(self, prompts: Sequence[Prompt]) -> list[tuple[int, int, int]]:
        """Return, of each prompt as this engine takes it, (tokens, image tokens among them, image features)."""
        ...

    def stats(self) -> dict[str, float]:
        """Return counts of what was sampled since the last call; nothing where the engine keeps none."""
        ...

    def close(self) -> None:
        """Free the engine; it may be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is told in addition to its settings.

    num_threads: CPU threads; 0 takes `rollout.num_threads`.
    device: "cpu", "cuda", or "auto" for CUDA if present (vLLM: for the device that it was built for).
    revision, trust_remote_code: of the model.
    colocated: a learner works on the same devices.
    lora_rank: > 0 prepares vLLM for adapters of that rank, sent in place of whole weights.
    name: of the engine in vLLM's errors.
    """

    num_threads: int = 0
    device: str = "auto"
    revision: str = ""
    trust_remote_code: bool = False
    colocated: bool = False
    lora_rank: int = 0
    name: str = "engine"

    @property
    def source(self) -> dict[str, Any]:
        """Keywords of every `from_pretrained`; no revision is the hub's default branch."""
        revision = {"revision": self.revision} if self.revision else {}
        return {"trust_remote_code": self.trust_remote_code, **revision}


def shares(
    prompts: Sequence[Prompt], group_size: int, max_batch_sequences: int, num_engines: int
) -> list[Sequence[Prompt]]:
    """Cut prompts into equal shares per engine, none larger than what an engine samples at once.

    Rounding depends on what is sampled together, so that every way to run an engine cuts alike.
    """
    at_once = max_batch_sequences // group_size
    num_prompts = max(1, min(at_once, -(-len(prompts) // num_engines)))
    return [prompts[start : start + num_prompts] for start in range(0, len(prompts), num_prompts)]


def check_sampling(sampling: SamplingParams) -> None:
    """Raise EngineError for values that no engine can sample with."""
    limits = {
        "group_size must be >= 1": sampling.group_size >= 1,
        "temperature must be >= 0 (0 is greedy)": sampling.temperature >= 0,
        "top_p must be in (0, 1]": 0 < sampling.top_p <= 1,
        "top_k must be >= 0 (0 is off)": sampling.top_k >= 0,
        "max_tokens must be >= 1": sampling.max_tokens >= 1,
    }
    for rule, holds in limits.items():
        if not holds:
            raise EngineError(f"sampling.{rule}, got {getattr(sampling, rule.split()[0])}")
