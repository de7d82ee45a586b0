"""An environment that answers every turn with an image, so that a check need not wait for a policy to call a tool."""

from __future__ import annotations

from rollout.turns.environment import Reply
from rollout.types import Prompt

PROBE = "rollout.turns.probe"
"""Key of `Prompt.truth`: images of a probe's answers, a sequence per turn. Such a prompt has no other environment."""

TURN_TOKENS = 4
"""Most tokens of each turn."""


class Probe:
    """Answers with the images of the prompt's own truth, turn by turn, whatever the policy writes."""

    max_turn_tokens = TURN_TOKENS

    def __init__(self, prompt: Prompt) -> None:
        self._images = list(prompt.truth[PROBE])

    def step(self, turn: str) -> Reply | None:
        if not self._images:
            return None
        images = tuple(self._images.pop(0))
        return Reply("<image>" * len(images), images)
