"""Who shares a device: the arithmetic alone, without Ray."""

from __future__ import annotations

import dataclasses

import pytest

from rollout.config import RolloutConfig, VllmConfig
from rsgrpo.config.placement import place
from rsgrpo.config.train import AlgorithmConfig, ClusterConfig, LearnerConfig, TrainConfig
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
    assert [seat.gpus for seat in placement.seats["reference"]] == [0.5, 0.5]
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
    assert [(seat.bundle, seat.gpus) for seat in engines] == [(0, 0.0), (2, 0.0)]
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


def test_without_gpus_nothing_asks_for_one():
    assert all("GPU" not in bundle for bundle in place(config(), has_gpus=False).bundles)
