"""One vLLM engine for all tests of this folder: a start costs more than most of them."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def engine(attentive_model_path):
    """The real vLLM, ready for adapters of rank 4. The transfer tests move its weights; the last of them kills it."""
    from rollout.build import build_engine
    from tests.rollout.parity import INPUTS, ROLLOUT

    engine = build_engine(attentive_model_path, ROLLOUT, INPUTS, lora_rank=4, name="engine 0")
    yield engine
    engine.close()
