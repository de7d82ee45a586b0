"""Law 15 for a learner's checkpoint: what a stranger can write into it is not run."""

from __future__ import annotations

import pickle
import time
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
from tests.material.learner import make_groups, make_learner


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


def test_a_write_in_the_background_holds_what_it_began_with(tiny_model_path, page_images, tmp_path):
    learner, groups = make_learner(tiny_model_path), make_groups(page_images, [1])
    learner.update(groups, [1.0, 1.0])
    before = {name: tensor.clone() for name, tensor in learner.gather_weights()}
    learner.begin_save(tmp_path / "state")
    learner.update(groups, [1.0, 1.0])
    learner.begin_save(tmp_path / "next")  # nobody has asked whether the first is written: it waits for it
    assert (tmp_path / "state" / ".metadata").exists()
    while not learner.is_saved():
        time.sleep(0.01)
    again = make_learner(tiny_model_path)
    again.load(tmp_path / "state")
    after = dict(learner.gather_weights())
    for name, tensor in again.gather_weights():
        assert torch.equal(tensor, before[name])
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_without_memory_for_a_copy_the_state_is_written_at_once(
    tiny_model_path, page_images, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(state, "MEMORY_SHARE", 0.0)
    learner, groups = make_learner(tiny_model_path), make_groups(page_images, [1])
    learner.update(groups, [1.0, 1.0])
    before = {name: tensor.clone() for name, tensor in learner.gather_weights()}
    learner.begin_save(tmp_path / "state")
    assert "memory does not suffice for a copy" in caplog.text
    assert learner.is_saved()
    again = make_learner(tiny_model_path)
    again.load(tmp_path / "state")
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.gather_weights())
