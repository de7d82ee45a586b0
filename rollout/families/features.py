"""Image features in memory, keyed by image content, so that engines and learner compute them only once."""

from __future__ import annotations

from collections import OrderedDict

import torch


class FeatureCache:
    """Tensors by image hash; the least recently used are evicted when all together exceed `max_bytes`.

    Attributes:
        hits: successful look-ups.
    """

    def __init__(self, max_bytes: int) -> None:
        self.hits = 0
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def __contains__(self, image_hash: str) -> bool:
        """Tell whether an image is cached without marking it as used; safe from any thread."""
        return image_hash in self._features

    def get(self, image_hash: str) -> torch.Tensor | None:
        """Return (merged tokens, F), or None if they must be computed."""
        features = self._features.get(image_hash)
        if features is not None:
            self.hits += 1
            self._features.move_to_end(image_hash)
        return features

    def put(self, image_hash: str, features: torch.Tensor) -> None:
        """Cache an image's features unless they are larger than the whole cache."""
        if image_hash in self._features or features.nbytes > self._max_bytes:
            return
        self._features[image_hash] = features
        self._num_bytes += features.nbytes
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= self._features.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Drop all features, because the tower has changed."""
        self._features.clear()
        self._num_bytes = 0
