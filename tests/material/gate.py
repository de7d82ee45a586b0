"""An engine of this process and a learner, asked as the gate asks a pool and its ranks."""

from __future__ import annotations

from rollout.config import InputsConfig
from rsgrpo.cluster.engine_check import compare_engines
from rsgrpo.config.train import LearnerConfig, ModelConfig
from rsgrpo.learning.learner import Learner


class OneEngine:
    """An engine of this process, asked as a pool is; `seen` is what it sees of a prompt."""

    def __init__(self, engine, seen=lambda prompt: prompt):
        self.engine = engine
        self.seen = seen

    def generate_on_each(self, prompts, sampling):
        groups = {group.prompt.id: group for group in self.engine.generate([self.seen(p) for p in prompts], sampling)}
        return [[groups[prompt.id] for prompt in prompts]]

    def count_vision(self, prompts):
        return [self.engine.count_vision(prompts)]


def one_learner(model_path: str, inputs: InputsConfig):
    """A float32 learner of one rank in this process."""
    settings = LearnerConfig(
        device="cpu", precision="float32", num_threads=1, gradient_checkpointing="none", max_tokens_per_micro_batch=1024
    )
    return Learner(ModelConfig(path=model_path), settings, inputs, total_steps=1)


def run_gate(engines, learner, prompts, version=0):
    return compare_engines(engines, learner, prompts, num_tokens=12, tolerance=1e-4, version=version)


def failures(checks):
    return {check.what for check in checks if not check.holds}
