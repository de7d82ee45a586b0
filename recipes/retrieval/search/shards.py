"""One shard of an index: the vectors of some pages, in files that are written once and never changed.

000001.npy           (vectors, D) float16 or float32
000001.ids           one page id per line
000001.offsets.npy   (pages + 1,) int64, for several vectors per page
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rollout.files import replaced, write_bytes

BLOCK_VECTORS = 16_384  # read and scored at a time


@dataclass(frozen=True, slots=True)
class Shard:
    """Some pages' vectors.

    ids_P: (P,) page ids as UTF-8 bytes, a quarter of the memory of strings. vectors_VD: memory-mapped.
    offsets: (P + 1,) where each page's vectors start. alive_P: (P,) False for deleted pages.
    """

    ids_P: np.ndarray
    vectors_VD: np.ndarray
    offsets: np.ndarray
    alive_P: np.ndarray

    def vectors(self, row: int) -> np.ndarray:
        """Return (vectors, D) of one page, float32."""
        return np.asarray(self.vectors_VD[self.offsets[row] : self.offsets[row + 1]], dtype=np.float32)

    def release(self) -> None:
        """Drop vectors that were read from this process's memory; they stay on disk."""
        if isinstance(self.vectors_VD.base, mmap.mmap):
            self.vectors_VD.base.madvise(mmap.MADV_DONTNEED)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the first page of each block and the one after its last; a block has about BLOCK_VECTORS vectors."""
        first, num_pages = 0, len(self.ids_P)
        while first < num_pages:
            limit = self.offsets[first] + BLOCK_VECTORS
            last = max(first + 1, int(np.searchsorted(self.offsets, limit, side="right")) - 1)
            yield first, last
            first = last


def read_shard(stem: Path, dim: int, deleted_N: np.ndarray, *, multi_vector: bool) -> Shard:
    """Open a shard; its vectors stay on disk until they are used.

    Args:
        stem: the path of its files without extension. dim: the length that its vectors must have.
        deleted_N: ids of deleted pages, of this shard or others.

    Raises:
        OSError, ValueError: a file is missing or damaged.
    """
    ids_P = np.array(stem.with_suffix(".ids").read_text().encode().splitlines(), dtype="S")
    vectors_VD = np.load(stem.with_suffix(".npy"), mmap_mode="r")
    offsets = np.load(stem.with_suffix(".offsets.npy")) if multi_vector else np.arange(len(ids_P) + 1)
    if vectors_VD.ndim != 2 or vectors_VD.shape[1] != dim:
        raise ValueError(f"its vectors have shape {vectors_VD.shape}, but the index has length {dim}")
    if len(offsets) != len(ids_P) + 1 or offsets[-1] != len(vectors_VD):
        raise ValueError(f"it has {len(vectors_VD)} vectors for {len(ids_P)} pages")
    return Shard(ids_P, vectors_VD, offsets, ~np.isin(ids_P, deleted_N))


def write_shard(
    stem: Path, page_ids: Sequence[str], rows: Sequence[np.ndarray], dtype: str, *, multi_vector: bool
) -> None:
    """Write the files of a shard. rows: (vectors, D) per page."""
    _save(stem.with_suffix(".npy"), np.concatenate(rows).astype(dtype))
    if multi_vector:
        _save(stem.with_suffix(".offsets.npy"), np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64))
    write_bytes(stem.with_suffix(".ids"), "".join(f"{page_id}\n" for page_id in page_ids).encode())


def _save(file: Path, values: np.ndarray) -> None:
    with replaced(file) as unfinished, open(unfinished, "wb") as stream:
        np.save(stream, values)
