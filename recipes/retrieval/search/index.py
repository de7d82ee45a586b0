"""One index: vectors of pages on disk, the encoder that made them, and the searches over them.

    INDEX/manifest.json   the encoder's fingerprint, the shards in order, the deleted pages
    INDEX/encoder.json    how the encoder is opened again; see `origin.py`
    INDEX/shards/         see `shards.py`
    INDEX/faiss-*         see `faiss.py`

A shard counts once the manifest names it, and the manifest is replaced in one step: a process that dies loses the shard
that it was writing and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from recipes.retrieval.encoders.base import EncoderIdentity
from recipes.retrieval.pages.store import remove_unfinished, single_writer, writing
from recipes.retrieval.search.exact import Hit, rank_candidates, scan
from recipes.retrieval.search.faiss import FaissError, FaissKind, open_faiss, state_of, write_faiss
from recipes.retrieval.search.keep import ALL, Keep
from recipes.retrieval.search.origin import remember
from recipes.retrieval.search.shards import Shard, read_shard, write_shard
from rollout.files import write_text
from rsgrpo.errors import InputError

FORMAT = 1
DTYPES = ("float16", "float32")
COMPACT_ABOVE = 0.5  # deleted share of a shard
CANDIDATES = 100
FAISS_MARGIN = 16  # candidates beyond 2k, so that rounding in FAISS does not lose a page that belongs
_MANIFEST: dict[str, type | tuple[type, ...]] = {
    "fingerprint": str, "encoder": dict, "multi_vector": bool, "dtype": str, "dim": (int, type(None)),
    "next_shard": int, "shards": list, "deleted": list,
}  # fmt: skip

Backend = Literal["exact", "flat", "ivf"]


class Search(Protocol):
    """Finds pages by query vectors: (D,) each, or (T, D) each for several vectors per page."""

    def __call__(self, queries: Sequence[np.ndarray], k: int, keep: Keep = ALL) -> list[list[Hit]]:
        """Return the k best pages of each query among those that are kept."""
        ...


class IndexFault(InputError):
    """The index cannot be read, or another encoder made it."""


class VectorIndex:
    """One index. Reading needs no lock; write within `locked`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self._manifest = manifest

    @classmethod
    def open(cls, folder: Path) -> VectorIndex:
        """Open an existing index; IndexFault if there is none, or it has another format."""
        file = folder / "manifest.json"
        try:
            manifest = json.loads(file.read_text())
            found = manifest["format"]
        except FileNotFoundError as error:
            remedy = "create it with: python -m recipes.retrieve index STORE"
            raise IndexFault(f"{folder} is not an index; {remedy}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IndexFault(f"{file} cannot be read: {error}; delete {folder} and index again") from error
        if found != FORMAT:
            raise IndexFault(f"{folder} has format {found}, but this program reads {FORMAT}; index again")
        wrong = _wrong_entry(manifest)
        if wrong:
            raise IndexFault(f"{file} is damaged ({wrong}); delete {folder} and index again")
        return cls(folder, manifest)

    @classmethod
    def create(cls, folder: Path, encoder: EncoderIdentity, dtype: str = "float16") -> VectorIndex:
        """Open an index for writing, or create an empty one, and remember how its encoder is opened.

        Raises:
            IndexFault: another encoder made it.
            StoreError: the disk is full.
        """
        if (folder / "manifest.json").exists():
            index = cls.open(folder)
            index.require(encoder)
        elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise IndexFault(f"{folder} is neither empty nor an index; choose another --index")
        else:
            manifest = {
                "format": FORMAT, "fingerprint": encoder.fingerprint, "encoder": dict(encoder.description),
                "multi_vector": encoder.multi_vector, "dtype": dtype, "dim": None, "next_shard": 1, "shards": [],
                "deleted": [],
            }  # fmt: skip
            index = cls(folder, manifest)
            with writing(folder):
                (folder / "shards").mkdir(parents=True, exist_ok=True)
            index._commit()
        if encoder.settings is not None:
            with writing(folder):
                remember(folder, encoder.settings)
        return index

    def require(self, encoder: EncoderIdentity) -> None:
        """Raise IndexFault for an encoder whose vectors do not compare with those of this index."""
        if encoder.is_known_as(self._manifest["fingerprint"]):
            return
        here, there = self._manifest["encoder"], dict(encoder.description)
        changed = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
        differences = ", ".join(f"{name} {here.get(name)!r} -> {there.get(name)!r}" for name in changed)
        raise IndexFault(
            f"{self.folder} was made by another encoder ({differences}); use that encoder, or create another index "
            "with --index"
        )

    @property
    def multi_vector(self) -> bool:
        """Whether a page has several vectors."""
        return bool(self._manifest["multi_vector"])

    @property
    def reads_text(self) -> bool:
        """Whether its encoder reads the pages' text instead of their pixels."""
        return self._manifest["encoder"].get("kind") == "text"

    @property
    def dim(self) -> int:
        """The vectors' length; 0 while the index is empty."""
        return self._manifest["dim"] or 0

    @property
    def state(self) -> str:
        """Return a digest that changes whenever the set of vectors does."""
        kept = {name: self._manifest[name] for name in ("fingerprint", "shards", "deleted")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return sum(shard["num_pages"] for shard in self._manifest["shards"]) - len(self._manifest["deleted"])

    def page_ids(self) -> Iterator[str]:
        """Yield the ids of all pages that are not deleted."""
        for shard in self.shards:
            yield from (page_id.decode() for page_id in shard.ids_P[shard.alive_P])

    @cached_property
    def shards(self) -> list[Shard]:
        """Return the shards; their vectors stay on disk until they are used."""
        deleted_N = np.array([page_id.encode() for page_id in self._manifest["deleted"]], dtype="S")
        return [self._shard(entry["name"], deleted_N) for entry in self._manifest["shards"]]

    # Searches

    def searcher(self, backend: Backend = "exact", num_probes: int = 32, candidates: int = CANDIDATES) -> Search:
        """Return what finds pages by one back end: a scan of everything, or FAISS's candidates scored exactly.

        Args:
            num_probes: lists that are read per query (ivf).
            candidates: pages of several vectors that are scored per query, at least; they are proposed by pooled ones.

        Raises:
            FaissError: there is no FAISS file of this index as it is now.
        """
        if backend == "exact":
            return self.search
        file = self.folder / f"faiss-{backend}.bin"
        propose = open_faiss(file, self.state, len(self), num_probes, multi_vector=self.multi_vector)

        def search(queries: Sequence[np.ndarray], k: int, keep: Keep = ALL) -> list[list[Hit]]:
            if keep != ALL:
                return self.search(queries, k, keep)  # FAISS might propose none of the pages that are kept
            self._check(queries, k)
            count = 2 * k + FAISS_MARGIN
            proposed = propose(queries, max(count, candidates) if self.multi_vector else count)
            pairs = zip(queries, proposed, strict=True)
            return [rank_candidates(query, self._pages_at(numbers), k) for query, numbers in pairs]

        return search

    def search(self, queries: Sequence[np.ndarray], k: int, keep: Keep = ALL) -> list[list[Hit]]:
        """Scan the whole index; see `Search`.

        Raises:
            IndexFault: a query's vector has another length, or a shard is damaged.
            InputError: k < 1.
        """
        self._check(queries, k)
        return scan(self.shards, queries, k, multi_vector=self.multi_vector, keep=keep)

    def rerank(self, queries: Sequence[np.ndarray], candidates: Sequence[Sequence[str]], k: int) -> list[list[Hit]]:
        """Score only the candidates of each query, exactly; those that are not in this index are dropped.

        Raises:
            As `search`.
        """
        self._check(queries, k)
        return [rank_candidates(query, self.vectors(ids), k) for query, ids in zip(queries, candidates, strict=True)]

    def build_faiss(self, kind: FaissKind, *, only_if_older: bool = False) -> Path:
        """Write the FAISS file of a kind, unless only one that is older is to be replaced.

        Raises:
            FaissError: the index is empty.
            StoreError: another process writes to the index, or the disk is full.
        """
        file = self.folder / f"faiss-{kind}.bin"
        if only_if_older and state_of(file) == self.state:
            return file
        with self.locked():
            if not len(self):
                raise FaissError(f"{self.folder} is empty; index some pages first")
            with writing(self.folder):
                write_faiss(file, kind, self.shards, self.state, multi_vector=self.multi_vector)
        return file

    def vectors(self, page_ids: Iterable[str]) -> dict[str, np.ndarray]:
        """Return the (vectors, D) float32 of those of the pages that are here."""
        ids_N, order_N = self._places[0], self._order
        found: dict[str, np.ndarray] = {}
        for page_id in page_ids:
            row = int(np.searchsorted(ids_N, np.bytes_(page_id.encode()), sorter=order_N))
            if row < len(ids_N) and ids_N[order_N[row]] == page_id.encode():
                found |= self._pages_at([order_N[row]])
        return found

    # Writing

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only writer, and remove what a process that died has left.

        Raises:
            StoreError: another process writes to the index.
            IndexFault: another encoder has made it since it was opened.
        """
        with single_writer(self.folder):
            fresh = self.open(self.folder)
            if fresh._manifest["fingerprint"] != self._manifest["fingerprint"]:
                raise IndexFault(f"another encoder has made {self.folder} since it was opened; run the command again")
            self._manifest = fresh._manifest
            self._forget()
            self.__dict__.pop("_present", None)
            remove_unfinished(self.folder)
            self._remove_unnamed_shards()
            yield

    def missing_pages(self, page_ids: Iterable[str]) -> tuple[set[str], set[str]]:
        """Return the pages that the index lacks, and those that it should not have."""
        wanted, have = set(page_ids), set(self.page_ids())
        return wanted - have, have - wanted

    def add(self, page_ids: Sequence[str], vectors: Sequence[np.ndarray]) -> None:
        """Add pages as one shard; a deleted page comes back with its new vectors.

        Raises:
            IndexFault: a page is here already, or its vectors have another length.
            StoreError: the disk is full; the index is as before.
        """
        if not page_ids:
            return
        twice = self._present.intersection(page_ids)
        if twice or len(set(page_ids)) != len(page_ids):
            raise IndexFault(f"page {min(twice or page_ids)} would be in {self.folder} twice")
        revived = set(page_ids) & set(self._manifest["deleted"])
        if revived:
            self._rewrite(revived)
        rows = [np.atleast_2d(vector) for vector in vectors]
        dim = rows[0].shape[1]
        if self.dim not in (0, dim) or any(row.shape[1] != dim for row in rows):
            raise IndexFault(f"vectors of length {dim} do not fit {self.folder}, whose vectors have length {self.dim}")
        self._manifest["dim"] = dim
        self._write_shard(page_ids, rows)
        self._commit()
        self._present.update(page_ids)

    def remove(self, page_ids: Iterable[str]) -> int:
        """Delete pages; those that are not here are ignored. Return how many were deleted."""
        doomed = self._present.intersection(page_ids)
        if doomed:
            self._manifest["deleted"] = sorted({*self._manifest["deleted"], *doomed})
            self._rewrite(set())
            self._commit()
            self._present.difference_update(doomed)
        return len(doomed)

    def _rewrite(self, drop: set[str]) -> None:
        """Write the shards again that hold a page of `drop` or are mostly deleted; the caller commits."""
        dropped_N = np.array([page_id.encode() for page_id in drop], dtype="S")
        deleted = set(self._manifest["deleted"])
        self._forget()
        for entry, shard in zip(list(self._manifest["shards"]), self.shards, strict=True):
            gone = int((~shard.alive_P).sum())
            if not gone or (gone <= COMPACT_ABOVE * len(shard.ids_P) and not np.isin(dropped_N, shard.ids_P).any()):
                continue
            self._manifest["shards"].remove(entry)
            kept = np.flatnonzero(shard.alive_P)
            if len(kept):
                self._write_shard([shard.ids_P[row].decode() for row in kept], [shard.vectors(row) for row in kept])
            deleted.difference_update(page_id.decode() for page_id in shard.ids_P)
        self._manifest["deleted"] = sorted(deleted)

    def _write_shard(self, page_ids: Sequence[str], rows: list[np.ndarray]) -> None:
        name = f"{self._manifest['next_shard']:06d}"
        with writing(self.folder):
            stem, dtype = self.folder / "shards" / name, self._manifest["dtype"]
            write_shard(stem, page_ids, rows, dtype, multi_vector=self.multi_vector)
        self._manifest["next_shard"] += 1
        self._manifest["shards"].append({"name": name, "num_pages": len(page_ids)})

    def _commit(self) -> None:
        self._forget()
        with writing(self.folder):
            write_text(self.folder / "manifest.json", json.dumps(self._manifest))
        self._remove_unnamed_shards()

    def _remove_unnamed_shards(self) -> None:
        """Remove the files of shards that the manifest does not name."""
        (self.folder / "shards").mkdir(exist_ok=True)
        named = {shard["name"] for shard in self._manifest["shards"]}
        for file in (self.folder / "shards").iterdir():
            if file.name.partition(".")[0] not in named:
                file.unlink()

    # Parts

    def _check(self, queries: Sequence[np.ndarray], k: int) -> None:
        if k < 1:
            raise InputError(f"k must be >= 1, got {k}")
        for query in queries:
            length = query.shape[-1]
            if len(self) and length != self.dim:
                raise IndexFault(f"the query's vector has length {length}, but those of {self.folder} have {self.dim}")

    @cached_property
    def _present(self) -> set[str]:
        return set(self.page_ids())

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the (N,) ids of all living pages in the order of the shards, and their (N, 2) shards and rows."""
        ids, places = [np.zeros(0, "S1")], [np.zeros((0, 2), np.int64)]
        for number, shard in enumerate(self.shards):
            rows = np.flatnonzero(shard.alive_P)
            ids.append(shard.ids_P[rows])
            places.append(np.stack([np.full(len(rows), number), rows], axis=1))
        return np.concatenate(ids), np.concatenate(places)

    @cached_property
    def _order(self) -> np.ndarray:
        """Return the (N,) living pages' numbers sorted by id."""
        return np.argsort(self._places[0])

    def _pages_at(self, numbers: Iterable[int]) -> dict[str, np.ndarray]:
        """Return the (vectors, D) of living pages by their numbers."""
        ids_N, places_N2 = self._places
        rows = [(number, *places_N2[number]) for number in numbers]
        return {ids_N[number].decode(): self.shards[shard].vectors(row) for number, shard, row in rows}

    def _forget(self) -> None:
        """Drop what was derived from the manifest."""
        for name in ("shards", "_places", "_order"):
            self.__dict__.pop(name, None)

    def _shard(self, name: str, deleted_N: np.ndarray) -> Shard:
        stem = self.folder / "shards" / name
        try:
            return read_shard(stem, self.dim, deleted_N, multi_vector=self.multi_vector)
        except (OSError, ValueError, EOFError) as error:
            if self.open(self.folder).state != self.state:
                raise IndexFault(f"{self.folder} has changed while it was read; run the command again") from error
            raise IndexFault(f"shard {stem} is damaged: {error}; delete {self.folder} and index again") from error


def _wrong_entry(manifest: dict[str, Any]) -> str:
    """Return which entry of a manifest is impossible; "" if all are possible."""
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
