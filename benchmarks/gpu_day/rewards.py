"""A reward with signal on any text, for models with random weights."""

from __future__ import annotations

from rewards.api import Response, reward


@reward
def vowels(response: Response) -> float:
    """Return the share of vowels."""
    return sum(character in "aeiou" for character in response.text) / max(1, len(response.text))
