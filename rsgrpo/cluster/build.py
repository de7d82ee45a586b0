"""Start the cluster that `cluster.kind` names; the other is never imported, so that `inline` needs no Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rsgrpo.cluster.protocol import Cluster
from rsgrpo.config.train import TrainConfig


def build_cluster(config: TrainConfig, *, total_steps: int, run_dir: Path, check_stop: Callable[[], None]) -> Cluster:
    """Start everything and load the model (`rsgrpo.cluster.protocol.StartCluster`)."""
    if config.cluster.kind == "inline":
        from rsgrpo.cluster.local import LocalCluster

        return LocalCluster(config, total_steps=total_steps, run_dir=run_dir, check_stop=check_stop)
    from rsgrpo.cluster.ray_cluster import RayCluster

    return RayCluster(config, total_steps=total_steps, run_dir=run_dir, check_stop=check_stop)
