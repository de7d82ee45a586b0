"""Law 15 for a learner's checkpoint: what a stranger can write into it is not run."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from rsgrpo.errors import RsgrpoError
from rsgrpo.learning import state
from rsgrpo.learning.fsdp import require_process_group


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


def test_an_honest_checkpoint_is_read(tmp_path):
    require_process_group(0, 1, torch.device("cpu"))
    save({"w": torch.arange(3.0), "lr": 0.5, "betas": (0.9, 0.999)}, storage_writer=FileSystemWriter(tmp_path))
    found: dict[str, Any] = {"w": torch.zeros(3), "lr": 0.0, "betas": (0.0, 0.0)}
    load(found, storage_reader=state._SafeReader(tmp_path), planner=state._SafePlanner())
    assert found["w"].tolist() == [0.0, 1.0, 2.0]
    assert (found["lr"], found["betas"]) == (0.5, (0.9, 0.999))


def test_a_value_that_would_run_code_is_refused_unrun(tmp_path):
    require_process_group(0, 1, torch.device("cpu"))
    save({"lr": Hostile()}, storage_writer=FileSystemWriter(tmp_path))
    with pytest.raises(CheckpointException, match="weights_only"):
        load({"lr": 0.0}, storage_reader=state._SafeReader(tmp_path), planner=state._SafePlanner())


def test_an_index_that_would_run_code_is_refused_unrun(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "get_state_dict", lambda *args, **kwargs: ({}, {}))
    require_process_group(0, 1, torch.device("cpu"))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile()))
    parts: Any = SimpleNamespace(adamw=None, step=0, updates=0, bad_steps=0)
    with pytest.raises(RsgrpoError, match=r"\.metadata cannot be read: it asks for builtins\.exec"):
        state.load_state(parts, parts, tmp_path, seed=0)
