"""Which workers share a device: pure arithmetic on the configuration, done before Ray is asked for resources."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rollout.keys import require
from rsgrpo.config.train import TrainConfig


@dataclass(frozen=True, slots=True)
class Seat:
    """What one worker gets: its share of the CPUs and GPUs of one bundle.

    shares_with: learner ranks whose GPUs the worker also uses, without reserving any; it is placed on their node.
    """

    bundle: int
    cpus: float
    gpus: float
    shares_with: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """Seats of every role's workers, role -> one seat per worker."""

    seats: Mapping[str, tuple[Seat, ...]]

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Resources to reserve together, in Ray's words; one bundle never spans two nodes."""
        all_seats = [seat for seats in self.seats.values() for seat in seats]
        bundles = []
        for index in range(max(seat.bundle for seat in all_seats) + 1):
            here = [seat for seat in all_seats if seat.bundle == index]
            # A shared device is reserved whole: thirds do not add up to one in floating point.
            resources = {"CPU": sum(seat.cpus for seat in here), "GPU": math.ceil(sum(seat.gpus for seat in here))}
            bundles.append({kind: amount for kind, amount in resources.items() if amount})
        return bundles

    @property
    def total_cpus(self) -> float:
        """CPUs of all workers."""
        return sum(seat.cpus for seats in self.seats.values() for seat in seats)

    @property
    def total_gpus(self) -> float:
        """GPUs of all workers."""
        return sum(bundle.get("GPU", 0.0) for bundle in self.bundles)

    def describe(self) -> str:
        """Return the arithmetic: "1 learner + 1 rollout + 2 reward workers need 1.2 CPUs and 0 GPUs"."""
        workers = " + ".join(f"{len(seats)} {role}" for role, seats in self.seats.items() if seats)
        return f"{workers} workers need {self.total_cpus:g} CPUs and {self.total_gpus:g} GPUs"


def place(config: TrainConfig, *, has_gpus: bool) -> Placement:
    """Seat every worker of a run.

    `colocated`: learner rank i and reference rank i share device i; an engine of tensor-parallel size d uses those
    of d consecutive ranks. `disaggregated`: engines have devices of their own; the reference still shares the
    learner's. Reward workers take CPUs only.

    Raises:
        ConfigError: colocated engines need more GPUs than the learner has ranks.
    """
    cluster, num_ranks, num_engines = config.cluster, config.learner.num_ranks, config.rollout.num_workers
    cpus = cluster.cpus
    num_references = num_ranks if config.needs_reference_workers else 0
    colocated = cluster.placement == "colocated"
    learner_gpus = (0.5 if num_references else 1.0) if has_gpus else 0.0
    degree = config.rollout.vllm.tensor_parallel_size if config.rollout.engine == "vllm" else 1
    if has_gpus and colocated:
        require(
            num_engines * degree <= num_ranks,
            f"cluster.placement=colocated puts {num_engines} x {degree} = {num_engines * degree} engine GPUs "
            f"(rollout.num_workers x tensor-parallel size) on learner.num_ranks={num_ranks} learner GPUs. Lower "
            "rollout.num_workers or rollout.vllm.tensor_parallel_size, or set cluster.placement=disaggregated.",
        )
        # Ray cannot assign two and a half GPUs, and may put two halves on one: so engines are told which they share.
        shared = [tuple(range(i * degree, (i + 1) * degree)) for i in range(num_engines)]
        engines = [Seat(ranks[0], cpus["rollout"], 0.0, ranks) for ranks in shared]
    else:
        first, gpus = (0 if colocated else num_ranks), float(degree if has_gpus else 0)
        engines = [Seat(first + i, cpus["rollout"], gpus) for i in range(num_engines)]
    first_reward = max(num_ranks, *(seat.bundle + 1 for seat in engines))
    return Placement(
        {
            "learner": tuple(Seat(i, cpus["learner"], learner_gpus) for i in range(num_ranks)),
            "reference": tuple(Seat(i, cpus["learner"], learner_gpus) for i in range(num_references)),
            "rollout": tuple(engines),
            "reward": tuple(Seat(first_reward + i, cpus["reward"], 0.0) for i in range(cluster.reward_workers)),
        }
    )
