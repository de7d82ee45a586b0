"""A learner's state on disk, by torch's distributed checkpoint: it loads onto any number of ranks.

Reading one runs no code: torch unpickles the index and the values that are not tensors, and here it may make only the
types that such a checkpoint consists of (SECURITY.md). The checkpoint as a whole is `rsgrpo.running.checkpoint`.
"""

from __future__ import annotations

import io
import logging
import pickle
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from rsgrpo.errors import RsgrpoError
from rsgrpo.learning.optimizer import Optimizer
from rsgrpo.learning.policy import Policy

logger = logging.getLogger(__name__)

# Frozen weights are those of model.path, which a run is always resumed with.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)
_COUNTERS = ("step", "updates", "bad_steps")
_DCP = "torch.distributed.checkpoint"
_INDEX_TYPES = frozenset(
    {f"{_DCP}.filesystem._StorageInfo", "torch.Size", "torch.serialization._get_layout"}
    | {f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath")}
    | {
        f"{_DCP}.metadata.{name}"
        for name in (
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
            "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
        )
    }
    | {f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
)  # fmt: skip


class TypeRefused(RsgrpoError):
    """A pickle asks for something that is not part of a checkpoint; it was not made."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, allowed: Iterable[str]) -> None:
        super().__init__(file)
        self.allowed = frozenset(allowed)

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise TypeRefused(
                f"it asks for {module}.{name}, which is not part of a checkpoint and could run code; nothing of it was "
                "run. Resume from a checkpoint that you or someone you trust has written."
            )
        return super().find_class(module, name)


def read_pickle(file: BinaryIO, allowed: Iterable[str]) -> Any:
    """Unpickle a value that consists of builtin types and of `allowed` ones, each "module.name".

    Raises:
        TypeRefused: it asks for anything else.
    """
    return _Unpickler(file, allowed).load()


class _SafeReader(FileSystemReader):
    """Torch's reader, but for an index that could run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = read_pickle(file, _INDEX_TYPES)
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _SafePlanner(DefaultLoadPlanner):
    """Torch's planner, but for values (learning rates and the like) that could run code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        checked = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


@contextmanager
def _naming_each_rank(what: str) -> Iterator[None]:
    """Turn torch's failure of a collective, which is not an Exception, into one that names each rank's cause."""
    try:
        yield
    except CheckpointException as error:
        causes = [f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in error.failures.items()]
        raise RsgrpoError(f"{what}: {'; '.join(causes)}") from None


def require_room(folder: Path, num_bytes: int, what: str) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        RsgrpoError: with the sum.
    """
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    if free < num_bytes:
        raise RsgrpoError(
            f"No space left for {what} of {num_bytes / 1e9:.3g} GB: {free / 1e9:.3g} GB are free where {folder} is"
        )


def _local_bytes(state: Any) -> int:
    """Return the bytes of tensors of which this rank writes its shard; rank 0 writes those that all ranks hold."""
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    is_first = dist.get_rank() == 0
    return sum(
        tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes * is_first for tensor in tensors
    )


def save_state(policy: Policy, optimizer: Optimizer, folder: Path) -> None:
    """Write trained weights, optimiser, counters and every rank's random state into `folder`. Collective.

    Raises:
        RsgrpoError: the folder holds a learner's state already, or could not be written.
    """
    if (folder / ".metadata").exists():
        raise RsgrpoError(f"{folder} holds a learner's state already; save into a new folder")
    is_fresh = not optimizer.adamw.state
    model_state, optimizer_state = get_state_dict(policy, optimizer.adamw, options=_OPTIONS)
    if is_fresh:  # torch has taken an empty step, to have something to write
        optimizer.adamw.state.clear()
        _forget_steps(optimizer_state)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state, "counters": _counters(optimizer)}
    sizes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, _local_bytes(state))
    require_room(folder, sum(sizes) // optimizer.config.replicas, "a checkpoint")
    state[f"random_{dist.get_rank()}"] = _random_state()
    with _naming_each_rank(f"{folder} could not be written"):
        save(state, storage_writer=FileSystemWriter(folder, overwrite=False))


def load_state(policy: Policy, optimizer: Optimizer, folder: Path, *, seed: int) -> None:
    """Read what `save_state` wrote. Collective.

    A rank that the writing run did not have draws its random state from the seed and the step.

    Raises:
        RsgrpoError: the folder could not be read, or reading it would run code.
    """
    model_state, optimizer_state = get_state_dict(policy, optimizer.adamw, options=_OPTIONS)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state, "counters": _counters(optimizer)}
    key = f"random_{dist.get_rank()}"
    reader = _SafeReader(folder)
    try:
        written = reader.read_metadata().state_dict_metadata
    except TypeRefused as error:
        raise RsgrpoError(f"{folder / '.metadata'} cannot be read: {error}") from error
    except Exception as error:  # a damaged pickle raises nearly everything
        raise RsgrpoError(f"{folder / '.metadata'} is damaged: {type(error).__name__}: {error}") from error
    has_random_state = any(name.startswith(f"{key}.") for name in written)
    if has_random_state:
        state[key] = _random_state()
    with _naming_each_rank(f"{folder} could not be read"):
        load(state, storage_reader=reader, planner=_SafePlanner())
    if not int(state["counters"]["updates"]):  # written before the first update, maybe by an older release
        _forget_steps(state["optimizer"])
    set_state_dict(
        policy,
        optimizer.adamw,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_OPTIONS,
    )
    for name, value in state["counters"].items():
        setattr(optimizer, name, int(value))
    if has_random_state:
        torch.set_rng_state(state[key]["cpu"])
        if "cuda" in state[key]:
            torch.cuda.set_rng_state(state[key]["cuda"])
    else:
        logger.info("no random state of rank %d in %s: drawn from the seed", dist.get_rank(), folder)
        torch.manual_seed(seed + 1_000_003 * optimizer.step + dist.get_rank())


def _forget_steps(optimizer_state: dict[str, Any]) -> None:
    """Set AdamW's count of steps to 0; its moments are zero."""
    for moments in optimizer_state["state"].values():
        moments["step"].zero_()


def _counters(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(getattr(optimizer, name)) for name in _COUNTERS}


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
