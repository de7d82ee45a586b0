"""A whole run in one process (`cluster=inline`) on a GPU: the first step is that of the processor."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("hydra", reason="hydra is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from rsgrpo.config.train import ClusterConfig
from rsgrpo.train import train
from tests.material.training import steps_of, tiny_run, write_rewards, write_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.3)])
def test_a_run_learns_on_policy_beside_its_engine(
    tmp_path, tmp_path_factory, page_images, tiny_model_path, monkeypatch, precision, tolerance
):
    modules = tmp_path_factory.mktemp("rewards")
    write_rewards(modules)
    monkeypatch.syspath_prepend(str(modules))
    rows = write_rows(tmp_path / "rows.jsonl", page_images)
    config = tiny_run(tmp_path / "gpu", rows, tiny_model_path, cluster=ClusterConfig(kind="inline"))
    rollout = dataclasses.replace(config.rollout, dtype=precision)
    learner = dataclasses.replace(config.learner, device="cuda", precision=precision)
    train(dataclasses.replace(config, rollout=rollout, learner=learner))
    found = steps_of(config)
    assert [row["rollout/oldest_weights_version"] for row in found] == [0, 1]
    assert all(row["actor/mismatch_max"] < tolerance for row in found)
    if precision == "float32":
        on_cpu: Any = dataclasses.replace(config, output_dir=str(tmp_path / "cpu"))
        train(on_cpu)
        wanted = steps_of(on_cpu)[0]
        for key in ("reward/vowels/mean", "rollout/num_tokens_mean"):  # the same draws, and so the same responses
            assert found[0][key] == wanted[key]
        assert found[0]["actor/grad_norm"] == pytest.approx(wanted["actor/grad_norm"], rel=1e-2)
