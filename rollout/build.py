"""The choice among sampling engines: only the one that is asked for is imported."""

from __future__ import annotations

import importlib.util
from typing import Any

from rollout.config import InputsConfig, RolloutConfig
from rollout.engine import Engine, EngineError, EngineOptions


def hide_progress_bars() -> None:
    """Keep transformers from drawing bars in this process; whoever drives the engines draws them."""
    from transformers.utils import logging as transformers_logging

    untyped: Any = transformers_logging
    untyped.disable_progress_bar()


def build_engine(model_path: str, rollout: RolloutConfig, inputs: InputsConfig, **options: Any) -> Engine:
    """Start the engine that `rollout.engine` names; only that one is imported.

    Args:
        options: fields of `EngineOptions`.

    Raises:
        EngineError: the engine is not installed, or cannot run this model.
    """
    chosen = EngineOptions(**options)
    if rollout.engine == "hf":
        from rollout.hf.engine import HFEngine

        return HFEngine(
            model_path,
            rollout,
            inputs,
            num_threads=chosen.num_threads,
            device=chosen.device,
            revision=chosen.revision,
            trust_remote_code=chosen.trust_remote_code,
        )
    if rollout.engine == "fake":
        from rollout.fake import FakeEngine

        return FakeEngine(
            model_path, rollout, inputs, revision=chosen.revision, trust_remote_code=chosen.trust_remote_code
        )
    assert rollout.engine == "vllm", rollout.engine
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            "rollout.engine=vllm needs vLLM, which is not installed here: `pip install -e .[gpu]` on a machine with "
            "CUDA (`make` installs its CPU build on Linux x86-64), or choose rollout=hf"
        )
    from rollout.vllm.engine import build_vllm_engine

    return build_vllm_engine(model_path, rollout, inputs, chosen)
