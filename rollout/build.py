"""Build the configured sampling engine; the others are never imported."""

from __future__ import annotations

import importlib.util
from typing import Any

from rollout.config import InputsConfig, RolloutConfig
from rollout.engine import Engine, EngineError


def hide_progress_bars() -> None:
    """Stop transformers from drawing progress bars in this process; the driver draws its own."""
    from transformers.utils import logging as transformers_logging

    untyped: Any = transformers_logging
    untyped.disable_progress_bar()


def build_engine(model_path: str, rollout: RolloutConfig, inputs: InputsConfig, **options: Any) -> Engine:
    """Start the engine that `rollout.engine` names.

    Args:
        options: fields of `EngineOptions`.

    Raises:
        EngineError: the engine is not installed, or cannot run this model.
    """
    if rollout.engine == "hf":
        from rollout.hf.engine import HFEngine

        return HFEngine(model_path, rollout, inputs, **options)
    if rollout.engine == "fake":
        from rollout.fake import FakeEngine

        return FakeEngine(model_path, rollout, inputs, **options)
    assert rollout.engine == "vllm", rollout.engine
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            'rollout.engine=vllm needs vLLM, which is not installed here. Run `pip install -e ".[gpu]"` on a machine '
            "with CUDA (`make` installs its CPU build on Linux x86-64), or set rollout.engine=hf."
        )
    from rollout.vllm.engine import VllmEngine

    return VllmEngine(model_path, rollout, inputs, **options)
