"""In which order learner and engines take the GPUs that they share; the GPUs are only counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from rollout.config import RolloutConfig
from rollout.workers.pool import RolloutPool
from rsgrpo.cluster.ray_cluster import RayCluster
from tests.material.training import tiny_run, write_rewards, write_rows


@pytest.fixture
def one_gpu() -> Iterator[None]:
    ray.init(
        "local", num_cpus=2, num_gpus=1, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False
    )
    yield
    ray.shutdown()


def test_on_a_shared_gpu_engines_start_and_wake_after_the_learner_gave_its_memory_back(
    one_gpu, tmp_path, monkeypatch, page_images, tiny_model_path
):
    order: list[str] = []

    def noted(owner: type, method: str) -> None:
        real = getattr(owner, method)

        def note(self, *args):
            result = real(self, *args)
            order.append(method + "".join(f" {arg}" for arg in args if isinstance(arg, str)))
            return result

        monkeypatch.setattr(owner, method, note)

    noted(RayCluster, "_start_engines")
    noted(RayCluster, "_release_memory")
    monkeypatch.setattr(RolloutPool, "wake", lambda self, part: order.append(f"wake {part}"))  # the engine never sleeps
    real_build = RayCluster._build

    def build(self, *args):
        real_build(self, *args)
        order.append("learner has loaded")

    monkeypatch.setattr(RayCluster, "_build", build)
    write_rewards(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tiny_run(
        tmp_path / "runs",
        write_rows(tmp_path / "rows.jsonl", page_images),
        tiny_model_path,
        rollout=RolloutConfig(engine="fake", group_size=4, max_response_tokens=24),
    )
    cluster = RayCluster(config, total_steps=2, run_dir=tmp_path / "runs" / "run", check_stop=lambda: None)
    assert order == ["learner has loaded", "_start_engines"]
    cluster._resting = True
    cluster.sync_weights(1)
    assert order[2:] == ["_release_memory", "wake weights", "wake kv_cache"]
    assert cluster.rollouts.ping()[0]["weights_version"] == 1
    assert cluster.engine_metrics()["rollout/engines"] == 1
    assert set(cluster.memory_mb()) == {"learner", "reward", "rollout"}
    assert not (tmp_path / "runs").exists(), "starting leaves no run folder"
    cluster.close()
