"""The one protocol behind which every sampling engine stands, and the choice among them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from rollout.types import Prompt, RolloutGroup, SamplingParams


class Engine(Protocol):
    """Samples groups of responses under one version of the weights."""

    weights_version: int

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[RolloutGroup]:
        """Yield one group per prompt, in any order, as soon as it is finished.

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

    def close(self) -> None:
        """Free the engine; calling it twice is allowed."""
        ...
