"""Image features of a frozen tower on disk, shared by runs. The tower never changes, so an entry stays valid."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rollout.files import replaced

logger = logging.getLogger(__name__)


class FeatureFolder:
    """Features on disk, one file per image; runs and ranks may share the folder. Thread-safe.

    The least recently used files are removed when together they exceed `max_bytes`.

    Attributes:
        evicted: files removed to make room. failures: files that could not be written or read.
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
        """Return an image's features, or None where no readable file has them."""
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
        with self._lock:
            try:
                with replaced(path) as unfinished:
                    save_file({"features": features.contiguous()}, unfinished)
            except (SafetensorError, OSError) as error:
                self._failed(path, error)
                return
            self._num_bytes += features.nbytes
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
        logger.warning("learner.feature_cache: %s: %s; computing these features again", path, error)


def tower_fingerprint(tower: nn.Module, *settings: object) -> str:
    """Return a hash of the tower's weights, their dtype, and whatever else its features depend on."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in tower.state_dict().items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
