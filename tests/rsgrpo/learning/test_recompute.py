"""Gradient checkpointing, by whatever policy, and compiled layers change no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rsgrpo.config.train import LearnerConfig, LoraConfig
from rsgrpo.errors import ConfigError
from rsgrpo.learning.learner import Learner
from rsgrpo.types import TrainGroup
from tests.material.learner import learnt, make_learner

WEIGHTS = [1.0, 2.0]
# The frozen tower's own attention runs before, in another thread's stead: it is the same for every policy.
POLICIES = {"none": 0, "full": 2, "attention": 0, "every_n:2": 1}


class AttentionCalls(TorchDispatchMode):
    """Counts forward calls of torch's attention kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.count += "scaled_dot_product" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


def stepped(path: str, groups: list[TrainGroup], **options: Any) -> tuple[Learner, dict[str, float], int]:
    learner = make_learner(path, self_check=False, max_tokens_per_micro_batch=100_000, **options)
    learner.logprobs(groups)  # the tower has then run
    with AttentionCalls() as calls:
        metrics = learner.update(groups, WEIGHTS)
    return learner, metrics, calls.count


@pytest.mark.parametrize("lora", [False, True])
def test_every_policy_takes_the_same_step_and_recomputes_what_it_says(lora, tiny_model_path, groups):
    options = {"lora": LoraConfig(rank=2)} if lora else {}
    kept, expected, once = stepped(tiny_model_path, groups, gradient_checkpointing="none", **options)
    weights = dict(kept.gather_weights())
    segments = sum(1 + len(group.samples) for group in groups)
    assert once == 2 * segments  # two layers
    for how, layers in POLICIES.items():
        learner, metrics, calls = stepped(tiny_model_path, groups, gradient_checkpointing=how, **options)
        assert calls == once + layers * segments, how
        assert learnt(metrics) == pytest.approx(learnt(expected), rel=1e-6), how
        for name, tensor in learner.gather_weights():
            assert torch.equal(tensor, weights[name]), (how, name)


def test_a_trained_tower_is_recomputed_too(tiny_model_path, groups):
    kept, _, _ = stepped(tiny_model_path, groups, gradient_checkpointing="none", freeze_vision=False)
    weights = dict(kept.gather_weights())
    learner, _, _ = stepped(tiny_model_path, groups, gradient_checkpointing="attention", freeze_vision=False)
    for name, tensor in learner.gather_weights():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["every_n:0", "half", "True", "every_n:"])
def test_an_unknown_policy_is_refused(how):
    with pytest.raises(ConfigError, match="gradient_checkpointing must be none, full, attention or every_n:K"):
        LearnerConfig(gradient_checkpointing=how)


def test_compiled_layers_recompute_whole(tiny_model_path):
    with pytest.raises(
        ConfigError, match=r"learner\.compile=true does not work with learner\.gradient_checkpointing=attention"
    ):
        LearnerConfig(compile=True, gradient_checkpointing="attention")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["none", "full"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_layers_take_the_same_step(how, tiny_model_path, groups):
    plain, expected, _ = stepped(tiny_model_path, groups)
    before = dict(make_learner(tiny_model_path).gather_weights())
    weights = dict(plain.gather_weights())
    learner = make_learner(tiny_model_path, self_check=False, compile=True, gradient_checkpointing=how)
    assert learnt(learner.update(groups, WEIGHTS)) == pytest.approx(learnt(expected), rel=1e-4, abs=1e-6)
    for name, tensor in learner.gather_weights():
        step = (weights[name] - before[name]).norm()
        assert (tensor - weights[name]).norm() <= 1e-4 * step + 1e-8, name
