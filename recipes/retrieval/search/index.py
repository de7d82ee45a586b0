"""Vectors of pages on disk, in shards under a manifest that names their encoder. Knows nothing of models or search.

    INDEX/manifest.json        the encoder's fingerprint, the shards in order, the deleted pages
    INDEX/shards/000001.npy    (vectors, D) float16 or float32
    INDEX/shards/000001.ids    a page id a line
    INDEX/shards/000001.offsets.npy   (pages + 1,) int64, for several vectors a page

A shard counts once the manifest names it, and the manifest is replaced in one step: a process that dies loses the shard
it was at and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.retrieval.encoders.base import EncoderIdentity
from recipes.retrieval.pages.store import replace_file, single_writer, writing
from rsgrpo.errors import InputError

FORMAT = 1
DTYPES = ("float16", "float32")
COMPACT_ABOVE = 0.5  # deleted share of a shard
_MANIFEST: dict[str, type | tuple[type, ...]] = {
    "fingerprint": str, "encoder": dict, "multi_vector": bool, "dtype": str, "dim": (int, type(None)),
    "next_shard": int, "shards": list, "deleted": list,
}  # fmt: skip


class IndexFault(InputError):
    """The index cannot be read, or was made by another encoder."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Some pages' vectors. vectors_VD: memory-mapped. offsets: (pages + 1,) where each page's vectors start.

    alive_P: False for deleted pages.
    """

    page_ids: list[str]
    vectors_VD: np.ndarray
    offsets: np.ndarray
    alive_P: np.ndarray


class VectorIndex:
    """One index. Reading needs nothing; writing goes through `locked`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self._manifest = manifest
        self._known: set[str] | None = None  # the ids of all pages, once they were asked for
        self._places: _Places | None = None  # where each page is, once that was asked for

    @classmethod
    def open(cls, folder: Path) -> VectorIndex:
        """Open an index that is there.

        Raises:
            IndexFault: there is none, or it is of another format.
        """
        file = folder / "manifest.json"
        try:
            manifest = json.loads(file.read_text())
            found = manifest["format"]
        except FileNotFoundError as error:
            raise IndexFault(
                f"{folder} is not an index; make it with: python -m recipes.retrieve index STORE"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IndexFault(f"{file} cannot be read: {error}; delete {folder} and index again") from error
        if found != FORMAT:
            raise IndexFault(f"{folder} has format {found}, this program reads {FORMAT}; make it anew")
        wrong = _wrong_entry(manifest)
        if wrong:
            raise IndexFault(f"{file} is damaged ({wrong}); delete {folder} and index again")
        return cls(folder, manifest)

    @classmethod
    def create(cls, folder: Path, encoder: EncoderIdentity, dtype: str = "float16") -> VectorIndex:
        """Open an index for writing, or make an empty one.

        Raises:
            IndexFault: another encoder made it.
        """
        if (folder / "manifest.json").exists():
            index = cls.open(folder)
            index.require(encoder)
            return index
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise IndexFault(f"{folder} is not empty and not an index; choose another --index")
        manifest = {
            "format": FORMAT, "fingerprint": encoder.fingerprint, "encoder": dict(encoder.description),
            "multi_vector": encoder.multi_vector, "dtype": dtype, "dim": None, "next_shard": 1, "shards": [],
            "deleted": [],
        }  # fmt: skip
        with writing(folder):
            (folder / "shards").mkdir(parents=True, exist_ok=True)
            index = cls(folder, manifest)
            index._commit()
        return index

    def require(self, encoder: EncoderIdentity) -> None:
        """Refuse an encoder whose vectors do not compare with those that are here.

        Raises:
            IndexFault: names what differs.
        """
        if encoder.fingerprint == self._manifest["fingerprint"]:
            return
        here, there = self._manifest["encoder"], dict(encoder.description)
        changed = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
        shown = ", ".join(f"{name} {here.get(name)!r} -> {there.get(name)!r}" for name in changed)
        raise IndexFault(
            f"{self.folder} was made by another encoder ({shown}); use that one, or make another index with --index"
        )

    @property
    def multi_vector(self) -> bool:
        """Whether a page has several vectors."""
        return self._manifest["multi_vector"]

    @property
    def dim(self) -> int:
        """The vectors' length; 0 while the index is empty."""
        return self._manifest["dim"] or 0

    @property
    def state(self) -> str:
        """Return a digest that changes whenever the set of vectors does."""
        kept = {name: self._manifest[name] for name in ("fingerprint", "shards", "deleted")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only writer, and clear away what a process that died left."""
        with single_writer(self.folder):
            self._manifest, self._known, self._places = self.open(self.folder)._manifest, None, None
            for leftover in self.folder.glob(".*.writing"):
                leftover.unlink()
            self._clear_shards()
            yield

    def __len__(self) -> int:
        return sum(shard["num_pages"] for shard in self._manifest["shards"]) - len(self._manifest["deleted"])

    def page_ids(self) -> Iterator[str]:
        """Yield the ids of all pages that are not deleted."""
        deleted = set(self._manifest["deleted"])
        for shard in self._manifest["shards"]:
            yield from (page_id for page_id in self._ids(shard["name"]) if page_id not in deleted)

    def shards(self) -> Iterator[Shard]:
        """Yield the shards; their vectors stay on disk until they are read."""
        deleted = set(self._manifest["deleted"])
        for entry in self._manifest["shards"]:
            yield self._shard(entry["name"], deleted)

    def add(self, page_ids: Sequence[str], vectors: Sequence[np.ndarray]) -> None:
        """Add pages as one shard; a page that was deleted comes back with its new vectors.

        Raises:
            IndexFault: a page is here already, or its vectors have another length.
            StoreError: the disk is full; the index is as before.
        """
        if not page_ids:
            return
        present = self._present().intersection(page_ids)
        if present or len(set(page_ids)) != len(page_ids):
            raise IndexFault(f"page {min(present or page_ids)} would be in {self.folder} twice")
        revived = set(page_ids) & set(self._manifest["deleted"])
        if revived:
            self._rewrite(revived)
        rows = [np.atleast_2d(vector) for vector in vectors]
        dim = rows[0].shape[1]
        if self.dim not in (0, dim) or any(row.shape[1] != dim for row in rows):
            raise IndexFault(f"vectors of length {dim} do not fit {self.folder}, whose length is {self.dim}")
        self._manifest["dim"] = dim
        self._write_shard(page_ids, rows)
        self._commit()
        self._present().update(page_ids)

    def remove(self, page_ids: Iterable[str]) -> int:
        """Delete pages; those that are not here are ignored. Return how many went."""
        doomed = self._present().intersection(page_ids)
        if doomed:
            self._manifest["deleted"] = sorted({*self._manifest["deleted"], *doomed})
            self._rewrite(set())
            self._commit()
            self._present().difference_update(doomed)
        return len(doomed)

    def vectors(self, page_ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the (vectors, D) float32 of those of the pages that are here."""
        if self._places is None:
            self._places = _Places(self.shards())
        found = {}
        for page_id in page_ids:
            place = self._places.find(page_id)
            if place is not None:
                vectors_VD, start, stop = place
                found[page_id] = np.asarray(vectors_VD[start:stop], dtype=np.float32)
        return found

    def _present(self) -> set[str]:
        if self._known is None:
            self._known = set(self.page_ids())
        return self._known

    def _rewrite(self, drop: set[str]) -> None:
        """Write shards anew that hold a page of `drop` or are mostly deleted; the caller commits."""
        deleted = set(self._manifest["deleted"])
        for entry in list(self._manifest["shards"]):
            shard = self._shard(entry["name"], deleted)
            gone = int((~shard.alive_P).sum())
            if not gone or (gone <= COMPACT_ABOVE * len(shard.page_ids) and not drop & set(shard.page_ids)):
                continue
            kept = [row for row in range(len(shard.page_ids)) if shard.alive_P[row]]
            self._manifest["shards"].remove(entry)
            if kept:
                rows = [np.asarray(shard.vectors_VD[shard.offsets[r] : shard.offsets[r + 1]]) for r in kept]
                self._write_shard([shard.page_ids[row] for row in kept], rows)
            deleted -= set(shard.page_ids)
        self._manifest["deleted"] = sorted(deleted)

    def _write_shard(self, page_ids: Sequence[str], rows: list[np.ndarray]) -> None:
        name = f"{self._manifest['next_shard']:06d}"
        stem = self.folder / "shards" / name
        with writing(self.folder):
            save_array(stem.with_suffix(".npy"), np.concatenate(rows).astype(self._manifest["dtype"]))
            if self.multi_vector:
                offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
                save_array(stem.with_suffix(".offsets.npy"), offsets)
            replace_file(stem.with_suffix(".ids"), "".join(f"{page_id}\n" for page_id in page_ids).encode())
        self._manifest["next_shard"] += 1
        self._manifest["shards"].append({"name": name, "num_pages": len(page_ids)})

    def _commit(self) -> None:
        self._places = None
        with writing(self.folder):
            replace_file(self.folder / "manifest.json", json.dumps(self._manifest).encode())
        self._clear_shards()

    def _clear_shards(self) -> None:
        """Remove files of shards that the manifest does not name."""
        (self.folder / "shards").mkdir(exist_ok=True)
        named = {shard["name"] for shard in self._manifest["shards"]}
        for file in (self.folder / "shards").iterdir():
            if file.name.partition(".")[0] not in named:
                file.unlink()

    def _ids(self, name: str) -> list[str]:
        with self._reading(name):
            return (self.folder / "shards" / f"{name}.ids").read_text().splitlines()

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Turn a shard's file that is gone or damaged into an error that says what to do."""
        try:
            yield
        except (OSError, ValueError, EOFError) as error:
            if self.open(self.folder).state != self.state:
                raise IndexFault(f"{self.folder} has changed while it was read; start the command again") from error
            stem = self.folder / "shards" / name
            raise IndexFault(f"shard {stem} is damaged: {error}; delete {self.folder} and index again") from error

    def _shard(self, name: str, deleted: set[str]) -> Shard:
        stem = self.folder / "shards" / name
        ids = self._ids(name)
        with self._reading(name):
            vectors_VD = np.load(stem.with_suffix(".npy"), mmap_mode="r")
            offsets = np.load(stem.with_suffix(".offsets.npy")) if self.multi_vector else np.arange(len(ids) + 1)
            if vectors_VD.ndim != 2 or vectors_VD.shape[1] != self.dim:
                raise ValueError(f"its vectors have shape {vectors_VD.shape}, the index has length {self.dim}")
            if len(offsets) != len(ids) + 1 or offsets[-1] != len(vectors_VD):
                raise ValueError(f"it has {len(vectors_VD)} vectors for {len(ids)} pages")
        alive_P = np.array([page_id not in deleted for page_id in ids]) if deleted else np.ones(len(ids), bool)
        return Shard(ids, vectors_VD, offsets, alive_P)


class _Places:
    """Where every living page's vectors are: its id and three numbers a page, sorted by id."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._arrays: list[np.ndarray] = []  # memory-mapped, one a shard
        ids, numbers = [np.zeros(0, "S1")], [np.zeros((0, 3), np.int64)]
        for shard in shards:
            rows = np.flatnonzero(shard.alive_P)
            spans = np.stack([np.full(len(rows), len(self._arrays)), shard.offsets[rows], shard.offsets[rows + 1]], 1)
            ids.append(id_array(shard.page_ids[row] for row in rows))
            numbers.append(spans)
            self._arrays.append(shard.vectors_VD)
        unsorted = np.concatenate(ids)
        order = np.argsort(unsorted)
        self._ids, self._spans = unsorted[order], np.concatenate(numbers)[order]

    def find(self, page_id: str) -> tuple[np.ndarray, int, int] | None:
        """Return the array that a page is in, and from where to where; None for pages that are not here."""
        wanted = page_id.encode()
        row = int(np.searchsorted(self._ids, np.bytes_(wanted)))
        if row == len(self._ids) or self._ids[row] != wanted:
            return None
        number, start, stop = self._spans[row]
        return self._arrays[number], int(start), int(stop)


def id_array(page_ids: Iterable[str]) -> np.ndarray:
    """Return ids as one array of UTF-8 bytes: a quarter of what a list of them takes."""
    return np.array([page_id.encode() for page_id in page_ids], dtype="S")


def save_array(file: Path, values: np.ndarray) -> None:
    """Write an array and see it to the disk; what it belongs to is named afterwards."""
    with open(file, "wb") as stream:
        np.save(stream, values)
        stream.flush()
        os.fsync(stream.fileno())


def missing_pages(index: VectorIndex, page_ids: Iterable[str]) -> tuple[set[str], set[str]]:
    """Return the pages that the index lacks, and those that it has too many."""
    wanted, have = set(page_ids), set(index.page_ids())
    return wanted - have, have - wanted


def _wrong_entry(manifest: dict[str, Any]) -> str:
    """Return which entry of a manifest cannot be, "" when all can."""
    for name, kind in _MANIFEST.items():
        if name not in manifest or not isinstance(manifest[name], kind):
            return name
    if manifest["dtype"] not in DTYPES:
        return "dtype"
    for shard in manifest["shards"]:
        numbered = isinstance(shard, dict) and str(shard.get("name")).isdigit()  # names become paths
        if not numbered or not isinstance(shard.get("num_pages"), int):
            return "shards"
    return "dim" if manifest["shards"] and not manifest["dim"] else ""
