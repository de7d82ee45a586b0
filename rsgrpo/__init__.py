"""Reward-scoped GRPO for vision-language models that answer over several page images with evidence.

`from rsgrpo import NAME` gives the pieces of the loop; docs/reference/python_api.md puts them together without Ray and
hydra. Nothing heavy is imported before a name is asked for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("rewards", "rollout", "recipes", "conf")


class OurPackages:
    """A finder that looks for our packages beside this one, whatever comes first on the Python path."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """Return where one of our packages is; None for any other module."""
        return PathFinder.find_spec(name, [str(_ROOT)]) if name in _PACKAGES else None


def come_first() -> None:
    """Find our packages before a user's `rewards.py` or `conf/` in the current folder, where Python looks first.

    Processes that are started from here, such as vLLM's, inherit the path. Ray calls this in every worker.

    Raises:
        ImportError: a module of the same name has been imported before.
    """
    for index, folder in enumerate(sys.path):
        place = Path(folder).resolve()
        if place == _ROOT:
            break
        if any((place / f"{name}{ending}").exists() for name in _PACKAGES for ending in ("", ".py")):
            sys.path.insert(index, str(_ROOT))
            break
    if OurPackages not in sys.meta_path:
        sys.meta_path.insert(0, OurPackages)
    for name in _PACKAGES:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None and not Path(file).resolve().is_relative_to(_ROOT):
            raise ImportError(f"{file} was imported as {name!r}, which is a package of rsgrpo. Rename the file.")


come_first()

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
