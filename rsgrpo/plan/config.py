"""The configuration of a plan: a training configuration, the cluster's size, and the assumptions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from rollout.errors import ConfigError
from rollout.keys import check, key, keys_of, nearest
from rsgrpo.config.train import ClusterConfig, TrainConfig


@dataclass(frozen=True, slots=True)
class Device:
    """Memory in GiB, dense bfloat16 (CPU: float32) FLOP/s, and memory bandwidth in bytes/s."""

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
    """What a plan has to assume."""

    gpu: str = key("h100", "Kind of GPU; runs with learner.device=cpu are planned for a CPU.", one_of=DEVICES)
    gpu_memory_gib: float = key(0.0, "Memory of one GPU where it differs from the kind's; 0 takes the kind's.", ge=0)
    host_memory_gib: float = key(0.0, "Memory of one node; 0 does not check it.", ge=0)
    mfu: float = key(0.4, "Share of the device's FLOP/s that training and prefill reach.", gt=0, le=1)
    decode_bandwidth: float = key(0.5, "Share of the device's memory bandwidth that decoding reaches.", gt=0, le=1)
    prompt_fill: float = key(0.73, "Mean prompt length as a share of inputs.max_prompt_tokens.", gt=0, le=1)
    response_fill: float = key(0.46, "Mean response length as a share of rollout.max_response_tokens.", gt=0, le=1)
    observation_fill: float = key(
        0.5, "Mean share of rollout.turns.max_observation_tokens and max_images that a response reads.", gt=0, le=1
    )
    kept_by_filter: float = key(0.6, "Share of sampled groups that algorithm.filter keeps.", gt=0, le=1)
    disk_gb_per_s: float = key(2.0, "Rate at which a checkpoint is written.", gt=0)
    link_gb_per_s: float = key(
        100.0, "Rate at which a rank is sent the keys of others with learner.context_parallel.", gt=0
    )
    sync_gb_per_s: float = key(20.0, "Rate at which weights go from learner to engines.", gt=0)

    def __post_init__(self) -> None:
        if self.gpu not in DEVICES:
            known, near = keys_of(type(self))["gpu"].bounds, nearest(str(self.gpu), DEVICES) or "."
            raise ConfigError(
                f"plan.gpu must be {known}; got {self.gpu!r}{near} For another GPU, name the one nearest in speed and "
                "set plan.gpu_memory_gib, for example plan.gpu=l40s plan.gpu_memory_gib=48."
            )
        check(self, "plan")


@dataclass(frozen=True)
class PlannedCluster(ClusterConfig):
    """Ray, and the size of the cluster."""

    nodes: int = key(1, "Number of nodes.", ge=1)
    gpus_per_node: int = key(0, "GPUs per node; 0 means as many as the workers need, all on one node.", ge=0)


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """A training configuration with the assumptions of a plan."""

    cluster: PlannedCluster = field(default_factory=PlannedCluster)
    plan: Assumptions = field(default_factory=Assumptions)


def device_of(config: PlanConfig) -> Device:
    """Return the device that the run is planned for."""
    device = DEVICES["cpu" if config.learner.device == "cpu" else config.plan.gpu]
    return dataclasses.replace(device, memory_gib=config.plan.gpu_memory_gib or device.memory_gib)
