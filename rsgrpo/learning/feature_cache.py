"""Image features of a frozen tower by content: in memory over steps, on disk over runs.

The tower's weights never change, so an entry stays right. Knows files and tensors; runs no tower.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

logger = logging.getLogger(__name__)


class FeatureFolder:
    """Features on disk, one file per image; runs and ranks may share the folder. Thread-safe.

    Files that were not used for longest go when `max_bytes` is passed.

    Attributes:
        evicted: files removed for want of room. failures: files that could not be written or read.
    """

    def __init__(self, folder: Path, fingerprint: str, max_bytes: int) -> None:
        self.evicted = self.failures = 0
        self._root = folder
        self._folder = folder / fingerprint[:16]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._max_bytes = max_bytes
        self._num_bytes = sum(size for _, size, _ in self._files())
        self._lock = threading.Lock()

    def get(self, image_hash: str) -> torch.Tensor | None:
        """Return an image's features, or None where there are none that can be read."""
        path = self._path(image_hash)
        try:
            features = load_file(path)["features"]
            os.utime(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            self._failed(path, error)
            path.unlink(missing_ok=True)
            return None
        return features

    def put(self, image_hash: str, features: torch.Tensor) -> None:
        """Write an image's features: whole or not at all."""
        path = self._path(image_hash)
        unfinished = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            save_file({"features": features.contiguous()}, unfinished)
            unfinished.replace(path)
        except (SafetensorError, OSError) as error:
            unfinished.unlink(missing_ok=True)
            self._failed(path, error)
            return
        with self._lock:
            self._num_bytes += features.numel() * features.element_size()
            if self._num_bytes > self._max_bytes:
                self._evict()

    def _path(self, image_hash: str) -> Path:
        return self._folder / f"{image_hash}.safetensors"

    def _files(self) -> list[tuple[float, int, Path]]:
        """Return (time of last use, bytes, path) of every file, whichever tower it belongs to."""
        found = []
        for path in self._root.glob("*/*.safetensors"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another rank has just removed it
                continue
            found.append((stat.st_mtime, stat.st_size, path))
        return found

    def _evict(self) -> None:
        """Remove files until a tenth of the room is free, so that this is rare."""
        files = sorted(self._files())
        self._num_bytes = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._num_bytes <= 0.9 * self._max_bytes:
                return
            path.unlink(missing_ok=True)
            self._num_bytes -= size
            self.evicted += 1

    def _failed(self, path: Path, error: Exception) -> None:
        self.failures += 1
        logger.warning("learner.feature_cache: %s: %s; the tower runs instead", path, error)


class FeatureCache:
    """Features in CPU memory; least recently used ones go when it is full. A folder behind it is asked second.

    Attributes:
        hits, misses: look-ups so far. read: misses that the folder answered.
    """

    def __init__(self, max_bytes: int, folder: FeatureFolder | None = None) -> None:
        self.hits = self.misses = self.read = 0
        self.folder = folder
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()

    def stored(self, image_hash: str) -> torch.Tensor | None:
        """Return what the folder has of an image that memory has not. For other threads than the one that gets."""
        return None if self.folder is None or image_hash in self._features else self.folder.get(image_hash)

    def get(self, image_hash: str, stored: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return (merged tokens, F), or None where it must be computed. stored: what `stored` found before."""
        features = self._features.get(image_hash)
        if features is not None:
            self.hits += 1
            self._features.move_to_end(image_hash)
            return features
        self.misses += 1
        if stored is not None:
            self.read += 1
            self.put(image_hash, stored)
        return stored

    def put(self, image_hash: str, features: torch.Tensor) -> None:
        """Keep features in memory; an image larger than the whole cache is not kept."""
        num_bytes = features.numel() * features.element_size()
        if num_bytes > self._max_bytes or image_hash in self._features:
            return
        self._features[image_hash] = features
        self._num_bytes += num_bytes
        while self._num_bytes > self._max_bytes:
            _, oldest = self._features.popitem(last=False)
            self._num_bytes -= oldest.numel() * oldest.element_size()


def tower_fingerprint(tower: nn.Module, *settings: object) -> str:
    """Return a hash of the tower's weights, their dtype, and what else decides its features."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in tower.state_dict().items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
