"""Let an answerer look up its pages at the page desk of a store: the environment and its limits."""

from __future__ import annotations

from pathlib import Path

from rollout.config import TurnsConfig

DESK = "recipes.retrieval.desk.environment:Desk"
MAX_TURNS, MAX_OBSERVATION_TOKENS, MAX_IMAGES = 10, 16_384, 20
"""How much a model may look up for one question."""


def desk_turns(store: str | Path, **arguments: object) -> TurnsConfig:
    """Return the settings of the desk over a page store; arguments: of `Desk`, its defaults where not named."""
    given = {"store": str(store), **arguments}
    return TurnsConfig(DESK, given, MAX_TURNS, MAX_OBSERVATION_TOKENS, MAX_IMAGES)
