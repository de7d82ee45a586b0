"""The resources of all workers of a run, reserved in Ray together, and the options with which each worker starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rsgrpo.config.placement import by_node, place
from rsgrpo.config.train import TrainConfig
from rsgrpo.errors import InputError, RsgrpoError

log = logging.getLogger(__name__)

WORKER_ENV = {
    "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0"),
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "passive",  # threads of a role that waits must not spin on the cores of the one that works
}

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""For workers that reserve none: Ray hides no GPU from them, and a judge with device="auto" would take the first."""


class Reservation:
    """Seats of all workers (`rsgrpo.config.placement`) in one Ray placement group.

    shares_gpus: whether engines use the learner's GPUs.
    """

    def __init__(self, config: TrainConfig, *, timeout_s: float) -> None:
        """Reserve the resources.

        Raises:
            InputError: the cluster has too few CPUs or GPUs, with the arithmetic.
            RsgrpoError: they are not free within `timeout_s`.
        """
        untyped: Any = ray
        have: dict[str, float] = untyped.cluster_resources()
        cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
        plan = place(config, has_gpus=gpus > 0)
        if plan.total_cpus > cpus + 1e-6 or plan.total_gpus > gpus + 1e-6:
            raise InputError(
                f"{plan.describe()} (cluster.placement={config.cluster.placement}), but the cluster has "
                f"{cpus:g} and {gpus:g}. Lower learner.num_ranks, rollout.num_workers or cluster.cpus, or add nodes."
            )
        if plan.total_gpus < gpus:
            log.warning(
                "This run uses %g of the cluster's %g GPUs. To use more, raise learner.num_ranks and "
                "rollout.num_workers, or set cluster.placement=disaggregated.",
                plan.total_gpus,
                gpus,
            )
        self._group = placement_group(plan.bundles, strategy="PACK")
        if not self._group.wait(timeout_s):
            self.release()
            raise RsgrpoError(
                f"{plan.describe()}, and they could not be placed within {timeout_s:.0f} s "
                f"(cluster.startup_timeout_s={config.cluster.startup_timeout_s:g}): other jobs are using the cluster, "
                f"or no single node has room for each of {plan.bundles}"
            )
        self.placement = by_node(plan, self._nodes())
        self.shares_gpus = any(seat.shares_with for seat in self.placement.seats["rollout"])
        self._visible: dict[tuple[str, int], str] = {}

    def options(self, role: str, index: int) -> dict[str, Any]:
        """Return Ray's options for the actor of one worker.

        A reward worker whose node is gone is not held back until another has room for everything that was there.
        """
        seat = self.placement.seats[role][index]
        env_vars = WORKER_ENV
        if (visible := self._visible.get((role, index))) is not None:
            env_vars = env_vars | {
                "CUDA_VISIBLE_DEVICES": visible,
                "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
            }
        elif role == "reward":
            env_vars = env_vars | NO_GPU
        if role == "reward" and not self.has_room(role, index):
            return {"num_cpus": 0, "runtime_env": {"env_vars": env_vars}}
        return {
            "num_cpus": seat.cpus,
            "num_gpus": seat.gpus,
            "runtime_env": {"env_vars": env_vars},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=seat.bundle
            ),
        }

    def share_gpus(self, gpus_of_rank: Sequence[Sequence[str]]) -> None:
        """Tell workers that share the learner's GPUs which these are.

        Args:
            gpus_of_rank: of each learner rank, the GPUs of its node that Ray gave it.
        """
        for role, seats in self.placement.seats.items():
            for index, seat in enumerate(seats):
                if seat.shares_with:
                    self._visible[role, index] = ",".join(
                        gpu for rank in seat.shares_with for gpu in gpus_of_rank[rank]
                    )

    def has_room(self, role: str, index: int) -> bool:
        """Tell whether a living node holds the worker's resources; Ray moves them to one when it can."""
        return self._nodes()[self.placement.seats[role][index].bundle] != ""

    def release(self) -> None:
        """Give everything back; workers that still have a seat are killed."""
        remove_placement_group(self._group)

    def _nodes(self) -> list[str]:
        """Return the id of the node that holds each bundle, "" where there is none."""
        nodes: dict[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
        return [nodes[bundle] for bundle in sorted(nodes)]
