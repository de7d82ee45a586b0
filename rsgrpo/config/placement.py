"""Which workers share a device: pure arithmetic on the configuration, done before Ray is asked for resources."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rollout.keys import require
from rsgrpo.config.train import TrainConfig


@dataclass(frozen=True, slots=True)
class Seat:
    """What one worker gets: its share of the CPUs and GPUs of one bundle.

    shares_with: learner ranks whose GPUs the worker also uses, without reserving any; they are in the same bundle.
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

    `colocated`: an engine of tensor-parallel size d uses the GPUs of d consecutive learner ranks; all of them are one
    bundle, because a bundle never spans two nodes. `disaggregated`: engines have devices of their own. Reference rank i
    shares the device of learner rank i. Reward workers take CPUs only.

    Raises:
        ConfigError: colocated engines need more GPUs than the learner has ranks.
    """
    cluster, num_ranks, num_engines = config.cluster, config.learner.num_ranks, config.rollout.num_workers
    cpus = cluster.cpus
    colocated = cluster.placement == "colocated"
    degree = config.rollout.vllm.tensor_parallel_size if config.rollout.engine == "vllm" else 1
    shares = has_gpus and colocated
    if shares:
        require(
            num_engines * degree <= num_ranks,
            f"cluster.placement=colocated puts {num_engines} x {degree} = {num_engines * degree} engine GPUs "
            f"(rollout.num_workers x tensor-parallel size) on learner.num_ranks={num_ranks} learner GPUs. Lower "
            "rollout.num_workers or rollout.vllm.tensor_parallel_size, or set cluster.placement=disaggregated.",
        )
    # Ranks beyond the last shared engine have bundles of their own.
    bundle_of_rank = [
        rank // degree if shares and rank < num_engines * degree else rank - shares * num_engines * (degree - 1)
        for rank in range(num_ranks)
    ]
    num_learner_bundles = bundle_of_rank[-1] + 1
    if shares:
        engines = [
            Seat(i, cpus["rollout"], 0.0, tuple(range(i * degree, (i + 1) * degree))) for i in range(num_engines)
        ]
    else:
        first = 0 if colocated else num_learner_bundles
        engines = [Seat(first + i, cpus["rollout"], float(degree if has_gpus else 0)) for i in range(num_engines)]
    first_reward = max(num_learner_bundles, *(seat.bundle + 1 for seat in engines))
    references = range(num_ranks if config.needs_reference_workers else 0)
    return Placement(
        {
            "learner": tuple(Seat(bundle, cpus["learner"], float(has_gpus)) for bundle in bundle_of_rank),
            # Ray may put two halves on one GPU and cannot assign two and a half: so workers that share are told where.
            "reference": tuple(
                Seat(bundle_of_rank[i], cpus["learner"], 0.0, (i,) if has_gpus else ()) for i in references
            ),
            "rollout": tuple(engines),
            "reward": tuple(Seat(first_reward + i, cpus["reward"], 0.0) for i in range(cluster.reward_workers)),
        }
    )


def by_node(placement: Placement, node_of_bundle: Sequence[str]) -> Placement:
    """Return the placement with equal bundles exchanged, so that consecutive ranks are on the same node.

    Ray promises nothing about the order in which it spreads equal bundles over nodes.

    Args:
        node_of_bundle: id of the node that holds each bundle.
    """
    bundles = placement.bundles
    nodes = sorted(set(node_of_bundle), key=list(node_of_bundle).index)  # the node of bundle 0 comes first
    taken: dict[int, int] = {}
    for index, resources in enumerate(bundles):
        equal = [other for other, its in enumerate(bundles) if its == resources and other not in taken.values()]
        taken[index] = min(equal, key=lambda other: (nodes.index(node_of_bundle[other]), other))
    seats = {
        role: tuple(replace(seat, bundle=taken[seat.bundle]) for seat in seats)
        for role, seats in placement.seats.items()
    }
    return Placement(seats)
