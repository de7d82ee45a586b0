"""A learner's state on disk, by torch's distributed checkpoint: it loads onto any number of ranks.

Owns what is in it; the checkpoint as a whole (names, atomic rename, retention) is rsgrpo.running.checkpoint's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from rsgrpo.learning.optimizer import Optimizer
from rsgrpo.learning.policy import Policy
from rsgrpo.types import RsgrpoError

logger = logging.getLogger(__name__)

# Frozen weights are those of model.path, which a run is always resumed with.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)
_COUNTERS = ("step", "updates", "bad_steps")


@contextmanager
def _told_apart(what: str) -> Iterator[None]:
    """Turn torch's failure of a collective, which is no Exception, into one that names each rank's cause."""
    try:
        yield
    except CheckpointException as error:
        causes = [f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in error.failures.items()]
        raise RsgrpoError(f"{what}: {'; '.join(causes)}") from None


def save_state(policy: Policy, optimizer: Optimizer, folder: Path) -> None:
    """Write trained weights, optimiser, counters and every rank's random state into `folder`. Collective.

    Raises:
        RsgrpoError: the folder holds a learner's state already, or could not be written.
    """
    if (folder / ".metadata").exists():
        raise RsgrpoError(f"{folder} holds a learner's state already; save into a new folder")
    model_state, optimizer_state = get_state_dict(policy, optimizer.adamw, options=_OPTIONS)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state, "counters": _counters(optimizer)}
    state[f"random_{dist.get_rank()}"] = _random_state()
    with _told_apart(f"{folder} could not be written"):
        save(state, storage_writer=FileSystemWriter(folder, overwrite=False))


def load_state(policy: Policy, optimizer: Optimizer, folder: Path, *, seed: int) -> None:
    """Read what `save_state` wrote. Collective.

    A rank that the writing run did not have draws its random state from the seed and the step.

    Raises:
        RsgrpoError: the folder could not be read.
    """
    model_state, optimizer_state = get_state_dict(policy, optimizer.adamw, options=_OPTIONS)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state, "counters": _counters(optimizer)}
    key = f"random_{dist.get_rank()}"
    written = FileSystemReader(folder).read_metadata().state_dict_metadata
    has_random_state = any(name.startswith(f"{key}.") for name in written)
    if has_random_state:
        state[key] = _random_state()
    with _told_apart(f"{folder} could not be read"):
        load(state, checkpoint_id=folder)
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


def _counters(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(getattr(optimizer, name)) for name in _COUNTERS}


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
