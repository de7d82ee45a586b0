"""Reward-scoped GRPO for vision-language models that answer over several page images with evidence.

`from rsgrpo import NAME` gives the pieces of the loop; docs/reference/python_api.md puts them together without Ray and
hydra. Nothing heavy is imported before a name is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "rewards.api": ("Credit", "Response", "Span", "between", "reward", "whole"),
    "rollout.config": ("InputsConfig", "RolloutConfig"),
    "rollout.build": ("build_engine",),
    "rollout.engine": ("Engine",),
    "rollout.inputs.processor": ("InputProcessor",),
    "rollout.types": ("Prompt", "Rollout", "RolloutGroup", "SamplingParams"),
    "rsgrpo.algorithm.advantages": ("credit_group", "term_names", "term_weights"),
    "rsgrpo.config.train": (
        "AlgorithmConfig",
        "DataConfig",
        "LearnerConfig",
        "ModelConfig",
        "PromptConfig",
        "TrainConfig",
    ),
    "rsgrpo.algorithm.scoring": ("NamedReward", "RewardSet"),
    "rsgrpo.data.dataset": ("PromptDataset", "PromptStream", "load_prompts"),
    "rsgrpo.errors": ("RsgrpoError",),
    "rsgrpo.learning.learner": ("Learner",),
    "rsgrpo.report.page": ("write_report",),
    "rsgrpo.running.batches": ("Collector",),
    "rsgrpo.types": ("Sample", "ScoredGroup", "TrainGroup"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME_OF]  # noqa: PLE0604 (all of them are strings)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'rsgrpo' has no attribute {name!r}; it has {', '.join(sorted(_HOME_OF))}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
