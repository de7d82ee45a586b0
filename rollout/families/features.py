"""Image features by the content of their image, in memory: what an engine and the learner need not compute again."""

from __future__ import annotations

from collections import OrderedDict

import torch


class FeatureCache:
    """Tensors by image hash; the least recently used ones go when together they exceed `max_bytes`.

    Attributes:
        hits: look-ups that found something.
    """

    def __init__(self, max_bytes: int) -> None:
        self.hits = 0
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def __contains__(self, image_hash: str) -> bool:
        """Say whether an image is here, without using it; safe from any thread."""
        return image_hash in self._features

    def get(self, image_hash: str) -> torch.Tensor | None:
        """Return (merged tokens, F), or None where they must be computed."""
        features = self._features.get(image_hash)
        if features is not None:
            self.hits += 1
            self._features.move_to_end(image_hash)
        return features

    def put(self, image_hash: str, features: torch.Tensor) -> None:
        """Keep an image's features; those larger than the whole cache are not kept."""
        if image_hash in self._features or features.nbytes > self._max_bytes:
            return
        self._features[image_hash] = features
        self._num_bytes += features.nbytes
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= self._features.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget all of them, because the tower has changed."""
        self._features.clear()
        self._num_bytes = 0
