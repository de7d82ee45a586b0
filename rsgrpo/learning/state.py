"""A learner's state on disk, by torch's distributed checkpoint: it loads onto any number of ranks.

Reading one runs no code: torch unpickles the index and the values that are not tensors, and here it may make only the
types that such a checkpoint consists of (SECURITY.md). The checkpoint as a whole is `rsgrpo.running.checkpoint`.
"""

from __future__ import annotations

import io
import logging
import pickle
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from rollout.files import replaced
from rollout.inputs.images import with_bytes
from rsgrpo.errors import RsgrpoError
from rsgrpo.learning.optimizer import Optimizer
from rsgrpo.learning.policy import Policy
from rsgrpo.types import TrainGroup

logger = logging.getLogger(__name__)

# Frozen weights are those of model.path, which a run is always resumed with.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)
MEMORY_SHARE = 0.8
"""Share of a machine's free memory that copies of the state may take."""
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


class Saver:
    """Writes a learner's state beside its further work: only the copy of it holds up a step. One write at a time.

    Where memory does not suffice for a copy, the state is written at once.
    """

    def __init__(self, policy: Policy, optimizer: Optimizer) -> None:
        self._policy, self._optimizer = policy, optimizer
        self._group: Any = None
        self._writing: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def begin(self, folder: Path) -> None:
        """Copy the state and begin to write it into `folder`. Collective.

        Raises:
            RsgrpoError: the folder holds a learner's state, the disk has no room, or the write before failed.
        """
        # A driver asks until rank 0 has written; another rank may return from the last collective a moment later.
        self.is_saved(wait=True)
        state = _state_of(self._policy, self._optimizer, folder)
        if not _has_memory_for(state):
            logger.warning(
                "memory does not suffice for a copy of the learner's state: the step waits for its checkpoint"
            )
            _write(state, folder, None)
            self._writing = Future()
            self._writing.set_result(None)
            return
        if self._group is None:  # the writers talk to each other while training talks by its own groups
            self._group = dist.new_group(backend="gloo")
        stager: Any = DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
            )
        )
        self._writing = self._pool.submit(_write, stager.stage(state), folder, self._group)

    def is_saved(self, *, wait: bool = False) -> bool:
        """Return whether nothing is left to write.

        Raises:
            RsgrpoError: a write failed.
        """
        if self._writing is not None and (wait or self._writing.done()):
            writing, self._writing = self._writing, None
            writing.result()
        return self._writing is None


def _state_of(policy: Policy, optimizer: Optimizer, folder: Path) -> dict[str, Any]:
    """Return trained weights, optimiser, counters and every rank's random state. Collective."""
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
    return state


def _write(state: dict[str, Any], folder: Path, group: Any) -> None:
    with _naming_each_rank(f"{folder} could not be written"):
        save(state, storage_writer=FileSystemWriter(folder, overwrite=False), process_group=group)


def _has_memory_for(state: Any) -> bool:
    """Return whether every machine has memory for copies of what its ranks hold; the same on all ranks. Collective."""
    held = sum(
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
        for tensor in tree_leaves(state)
        if isinstance(tensor, torch.Tensor)
    )
    machines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(machines, (socket.gethostname(), held, psutil.virtual_memory().available))
    return all(
        sum(num_bytes for name, num_bytes, _ in machines if name == host) < MEMORY_SHARE * available
        for host, _, available in machines
    )


def load_state(policy: Policy, optimizer: Optimizer, folder: Path, *, seed: int) -> None:
    """Read what a `Saver` wrote. Collective.

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


def keep_groups(groups: Sequence[TrainGroup], path: Path) -> None:
    """Write groups with the bytes of their images, to look at them later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as unfinished:
        torch.save({"groups": [replace(group, prompt=with_bytes(group.prompt)) for group in groups]}, unfinished)
