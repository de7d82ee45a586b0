"""An environment that answers every turn with an image, so that a check need not wait for a policy to call a tool."""

from __future__ import annotations

from rollout.turns.environment import Reply
from rollout.types import Prompt

PROBE = "rollout.turns.probe"
"""Key of `Prompt.truth`: the images of a probe's answers, one per turn; such a prompt has no other environment."""

TURN_TOKENS = 4


class Probe:
    """Answers with the images of the prompt's own truth, one a turn, whatever the policy writes."""

    max_turn_tokens = TURN_TOKENS

    def __init__(self, prompt: Prompt) -> None:
        self._images = list(prompt.truth[PROBE])

    def step(self, turn: str) -> Reply | None:
        return Reply("<image>", (self._images.pop(0),)) if self._images else None
