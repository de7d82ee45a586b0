"""Who shares a device: the arithmetic alone, without Ray."""

from __future__ import annotations

import dataclasses

import pytest

from rollout.config import RolloutConfig, VllmConfig
from rsgrpo.config.placement import by_node, place
from rsgrpo.config.train import AlgorithmConfig, ClusterConfig, LearnerConfig, PlacementKind, TrainConfig
from rsgrpo.errors import ConfigError


def config(*, kl: float = 0.0, **cluster) -> TrainConfig:
    return TrainConfig(
        algorithm=AlgorithmConfig(kl_coef=kl),
        learner=LearnerConfig(num_ranks=2),
        rollout=RolloutConfig(num_workers=2),
        cluster=ClusterConfig(cpus={"rollout": 0.5, "learner": 0.5, "reward": 0.1}, reward_workers=1, **cluster),
    )


def test_colocated_ranks_and_engines_share_a_bundle_and_its_gpu():
    placement = place(config(), has_gpus=True)
    assert placement.bundles == [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 0.1}]
    assert placement.total_gpus == 2
    assert "2 learner + 2 rollout + 1 reward workers need 2.1 CPUs and 2 GPUs" in placement.describe()


def test_disaggregated_engines_have_their_own_gpus():
    placement = place(config(placement="disaggregated"), has_gpus=True)
    assert [seat.bundle for seat in placement.seats["rollout"]] == [2, 3]
    assert placement.total_gpus == 4


def test_a_reference_shares_the_learners_gpu():
    placement = place(config(kl=0.1, placement="disaggregated"), has_gpus=True)
    assert [(seat.bundle, seat.gpus, seat.shares_with) for seat in placement.seats["reference"]] == [
        (0, 0.0, (0,)),
        (1, 0.0, (1,)),
    ]
    assert placement.total_gpus == 4
    assert place(config(kl=0.1), has_gpus=True).total_gpus == 2


def test_engines_over_several_gpus_use_those_of_consecutive_ranks():
    four = dataclasses.replace(
        config(),
        learner=LearnerConfig(num_ranks=4),
        rollout=RolloutConfig(engine="vllm", num_workers=2, vllm=VllmConfig(tensor_parallel_size=2)),
    )
    engines = place(four, has_gpus=True).seats["rollout"]
    assert [seat.shares_with for seat in engines] == [(0, 1), (2, 3)]
    assert [(seat.bundle, seat.gpus) for seat in engines] == [(0, 0.0), (1, 0.0)]
    assert [seat.bundle for seat in place(four, has_gpus=True).seats["learner"]] == [0, 0, 1, 1]
    assert place(four, has_gpus=True).bundles[:2] == [{"CPU": 1.5, "GPU": 2}] * 2
    assert place(four, has_gpus=True).total_gpus == 4
    apart = dataclasses.replace(four, cluster=dataclasses.replace(four.cluster, placement="disaggregated"))
    placement = place(apart, has_gpus=True)
    assert [(seat.bundle, seat.gpus) for seat in placement.seats["rollout"]] == [(4, 2.0), (5, 2.0)]
    assert placement.total_gpus == 8
    assert placement.bundles[4] == {"CPU": 0.5, "GPU": 2}


def test_colocated_engines_need_as_many_learner_ranks():
    wide = dataclasses.replace(
        config(), rollout=RolloutConfig(engine="vllm", num_workers=2, vllm=VllmConfig(tensor_parallel_size=2))
    )
    with pytest.raises(ConfigError, match=r"2 x 2 = 4 engine GPUs .* on learner.num_ranks=2 learner GPUs"):
        place(wide, has_gpus=True)


KINDS: tuple[PlacementKind, ...] = ("colocated", "disaggregated")
LAYOUTS = [
    (kind, degree, nodes, engines, kl)
    for kind in KINDS
    for degree in (1, 2, 4, 8)
    for nodes in (1, 2, 4)
    for engines in {1, max(1, 4 * nodes // degree), 8 * nodes // degree}
    for kl in (0.0, 0.1)
    if kind == "colocated" or engines * degree < 8 * nodes
]
"""Engines on nodes of 8 GPUs; what they do not use is the learner's, or all of it where both share."""


def layout(kind: PlacementKind, degree: int, nodes: int, engines: int, kl: float) -> TrainConfig:
    return TrainConfig(
        algorithm=AlgorithmConfig(kl_coef=kl),
        learner=LearnerConfig(num_ranks=8 * nodes - (engines * degree if kind == "disaggregated" else 0)),
        rollout=RolloutConfig(engine="vllm", num_workers=engines, vllm=VllmConfig(tensor_parallel_size=degree)),
        cluster=ClusterConfig(placement=kind, cpus={"rollout": 0.5, "learner": 0.2, "reward": 0.1}),
    )


def packed(bundles: list[dict[str, float]], num_nodes: int) -> list[str]:
    """Place bundles as Ray's PACK does: the largest first, one node after the other; equal ones in any order."""
    order = sorted(range(len(bundles)), key=lambda i: (-bundles[i].get("GPU", 0), -bundles[i]["CPU"], i * 7919 % 101))
    free, node_of = [8.0] * num_nodes, [""] * len(bundles)
    for index in order:
        gpus = bundles[index].get("GPU", 0)
        node = next(n for n in range(num_nodes) if free[n] >= gpus)
        free[node] -= gpus
        node_of[index] = f"node {node}"
    return node_of


@pytest.mark.parametrize("chosen", LAYOUTS, ids=str)
def test_every_layout_fills_its_nodes_and_no_engine_lies_on_two(chosen):
    kind, degree, nodes, engines, _ = chosen
    plan = place(layout(*chosen), has_gpus=True)
    assert plan.total_gpus == 8 * nodes
    node_of = packed(plan.bundles, nodes)
    seats = by_node(plan, node_of).seats
    assert by_node(plan, node_of).bundles == plan.bundles
    ranks_on = [node_of[seat.bundle] for seat in seats["learner"]]
    assert ranks_on == sorted(ranks_on, key=ranks_on.index), "consecutive ranks are on one node"
    assert all(node_of[seat.bundle] == ranks_on[seat.shares_with[0]] for seat in seats["reference"])
    for seat in seats["rollout"]:
        if kind == "colocated":
            assert {seats["learner"][rank].bundle for rank in seat.shares_with} == {seat.bundle}
            assert len(seat.shares_with) == degree
        else:
            assert (seat.gpus, plan.bundles[seat.bundle]["GPU"]) == (degree, degree)
    used = [seat.bundle for seat in (*seats["learner"], *seats["rollout"], *seats["reward"])]
    assert set(used) == set(range(len(plan.bundles)))
    assert len({seat.bundle for seat in seats["rollout"]}) == engines


def test_without_gpus_nothing_asks_for_one():
    assert all("GPU" not in bundle for bundle in place(config(), has_gpus=False).bundles)
