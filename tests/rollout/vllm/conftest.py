"""One vLLM engine for all tests of this folder, and one more where it was killed; most tests cost less than a start."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def engine(attentive_model_path):
    """The real vLLM, ready for adapters of rank 4. The transfer tests move its weights; the last of them kills it."""
    from rollout.build import build_engine
    from tests.rollout.parity import INPUTS, ROLLOUT

    engine = build_engine(attentive_model_path, ROLLOUT, INPUTS, lora_rank=4, name="engine 0")
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def spare(attentive_model_path):
    """Starts a second engine once it is needed, and only once."""
    from rollout.build import build_engine
    from tests.rollout.parity import INPUTS, ROLLOUT

    started: list[Any] = []

    def start():
        if not started:
            started.append(build_engine(attentive_model_path, ROLLOUT, INPUTS, name="engine 1"))
        return started[0]

    yield start
    for engine in started:
        engine.close()


@pytest.fixture
def alive(engine, spare):
    """The shared engine, or a second one where the transfer tests have killed it."""
    return spare() if engine._broken else engine
