"""Placement groups on real Ray nodes whose GPUs are only counted."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from rsgrpo.cluster.reservation import Reservation
from tests.rsgrpo.cluster.nodes import RayNodes
from tests.rsgrpo.config.test_placement import KINDS, layout

OWN_RAY = """
from rsgrpo.cluster.connect import connect_ray
connect_ray("", num_cpus=1, object_store_bytes=100 << 20)
import ray
print(ray.cluster_resources()["CPU"])
"""
NODE: dict[str, Any] = {"num_cpus": 64, "num_gpus": 8, "object_store_memory": 80 << 20}


@pytest.fixture
def nodes(request) -> Iterator[int]:
    """A Ray cluster of nodes with 8 GPUs each; their number is the test's parameter."""
    cluster = RayNodes(**NODE)
    for _ in range(request.param - 1):
        cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    yield request.param
    ray.shutdown()
    cluster.shutdown()


class Seated:
    """An actor that only says where it is."""

    def where(self) -> tuple[str, str, list[str]]:
        import os

        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        return ray.get_runtime_context().get_node_id(), visible, [str(gpu) for gpu in ray.get_gpu_ids()]


def seated(seats: Reservation, role: str, index: int) -> Any:
    return ray.remote(Seated).options(**seats.options(role, index)).remote()


def nodes_of(seats: Reservation) -> dict[str, list[str]]:
    """Return, of each role, the node of every worker, as Ray has reserved it."""
    node_of = seats._nodes()
    return {role: [node_of[seat.bundle] for seat in its] for role, its in seats.placement.seats.items()}


def require_whole_engines(seats: Reservation) -> None:
    where = nodes_of(seats)
    for index, seat in enumerate(seats.placement.seats["rollout"]):
        assert {where["learner"][rank] for rank in seat.shares_with} <= {where["rollout"][index]}
    for index in range(len(where["reference"])):
        assert where["learner"][index] == where["reference"][index]
    assert where["learner"] == sorted(where["learner"], key=where["learner"].index)


@pytest.mark.parametrize("nodes", [2], indirect=True)
def test_engines_lie_on_one_node_each_and_every_worker_is_told_its_gpus(nodes, caplog):
    for config in (layout("colocated", 2, 2, 8, 0.1), layout("disaggregated", 4, 2, 2, 0.0)):
        seats = Reservation(config, timeout_s=60)
        require_whole_engines(seats)
        seats.release()
    assert "GPUs" not in caplog.text, "these layouts use all GPUs"
    config = layout("colocated", 2, nodes, 1, 0.1)
    config = dataclasses.replace(config, learner=dataclasses.replace(config.learner, num_ranks=3))
    with caplog.at_level(logging.WARNING):
        seats = Reservation(config, timeout_s=60)
    assert "This run uses 3 of the cluster's 16 GPUs" in caplog.text
    held = [seated(seats, "learner", rank) for rank in range(3)]
    learners = ray.get([actor.where.remote() for actor in held])
    assert all(visible == ",".join(gpus) for _, visible, gpus in learners)
    assert len({(node, *gpus) for node, _, gpus in learners}) == 3, "no GPU twice"
    seats.share_gpus([gpus for _, _, gpus in learners])
    others = [seated(seats, "rollout", 0), seated(seats, "reference", 2), seated(seats, "reward", 0)]
    engine, reference, reward = ray.get([actor.where.remote() for actor in others])
    assert engine == (learners[0][0], f"{learners[0][1]},{learners[1][1]}", [])
    assert learners[0][0] == learners[1][0]
    assert reference == (*learners[2][:2], [])
    assert reward[1] == "", "a judge in a reward worker must not find the learner's GPU"
    assert seats.has_room("rollout", 0)
    own = subprocess.run([sys.executable, "-c", OWN_RAY], capture_output=True, text=True, timeout=120)
    assert own.stdout == "1.0\n", f"a run's own Ray must not join the cluster that this machine has: {own.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2, 4], indirect=True)
def test_every_layout_can_be_placed(nodes):
    for kind in KINDS:
        for degree in (1, 2, 4, 8):
            for engines in {1, max(1, 4 * nodes // degree), 8 * nodes // degree}:
                if kind == "colocated" or engines * degree < 8 * nodes:
                    seats = Reservation(layout(kind, degree, nodes, engines, 0.1), timeout_s=60)
                    require_whole_engines(seats)
                    seats.release()
