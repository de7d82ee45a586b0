"""What a plan is asked: a training configuration, what the cluster is made of, and what nobody can know beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field

from rsgrpo.config.limits import at_least, one_of, require
from rsgrpo.config.train import ClusterConfig, TrainConfig


@dataclass(frozen=True, slots=True)
class Device:
    """Memory in GiB, dense bfloat16 (CPU: float32) FLOP/s, bytes/s of memory."""

    memory_gib: float
    flops: float
    bandwidth: float


DEVICES = {
    "h100": Device(80, 989e12, 3.35e12),
    "h200": Device(141, 989e12, 4.8e12),
    "b200": Device(180, 2250e12, 8e12),
    "a100": Device(80, 312e12, 2.0e12),
    "a100_40": Device(40, 312e12, 1.55e12),
    "l40s": Device(48, 362e12, 0.86e12),
    "rtx4090": Device(24, 165e12, 1.0e12),
    "cpu": Device(8, 0.1e12, 20e9),
}


@dataclass(frozen=True)
class Assumptions:
    """What a plan cannot know.

    gpu: one of DEVICES. Runs with learner.device=cpu take "cpu".
    mfu: share of the device's FLOP/s that training and prefill reach. decode_bandwidth: share of its bytes/s in decode.
    prompt_fill, response_fill: mean lengths as a share of the limits.
    sync_gb_per_s: weights from learner to engines.
    """

    gpu: str = "h100"
    mfu: float = 0.4
    decode_bandwidth: float = 0.5
    prompt_fill: float = 0.73
    response_fill: float = 0.46
    sync_gb_per_s: float = 20.0

    def __post_init__(self) -> None:
        one_of("plan.gpu", self.gpu, DEVICES)
        for key in ("mfu", "decode_bandwidth", "prompt_fill", "response_fill"):
            require(0 < getattr(self, key) <= 1, f"plan.{key} must be in (0, 1], got {getattr(self, key):g}")


@dataclass(frozen=True)
class PlannedCluster(ClusterConfig):
    """The cluster and what it is made of. gpus_per_node: 0 is as many as the workers take, all on one node."""

    nodes: int = 1
    gpus_per_node: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, cluster__nodes=self.nodes)
        at_least(0, cluster__gpus_per_node=self.gpus_per_node)


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """A training configuration with the assumptions of a plan."""

    cluster: PlannedCluster = field(default_factory=PlannedCluster)
    plan: Assumptions = field(default_factory=Assumptions)


def device_of(config: PlanConfig) -> Device:
    """Return the device that the run is planned for."""
    return DEVICES["cpu" if config.learner.device == "cpu" else config.plan.gpu]
