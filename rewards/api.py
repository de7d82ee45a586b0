"""The reward author's whole world: a response, a span of its text, and one decorator.

Owns what a reward sees and returns. Knows nothing of tokens, tensors, groups or training.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_NO_TRUTH: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open range of characters of `Response.text`: `text[start:end]`."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled answer, as a reward sees it.

    text: decoded response, without the end-of-text token.
    truth: the row's gold columns; `answers` (list of str) and `evidence` (list of str, one per image) where given.
    num_tokens: response tokens, end-of-text included.
    truncated: True when sampling stopped at the token limit instead of at end-of-text.
    question: the question as the data set states it.
    images: the page images, as paths or compressed bytes, for judges that look at them.
    """

    text: str
    truth: Mapping[str, Any] = field(default_factory=lambda: _NO_TRUTH)
    num_tokens: int = 0
    truncated: bool = False
    question: str = ""
    images: Sequence[str | bytes] = ()


@dataclass(frozen=True, slots=True)
class Credit:
    """One score on one span; a reward that returns several teaches each span its own score.

    key: scores with the same key are compared across the group (e.g. "slot1").
    span: the characters it teaches; None teaches nothing, but the score still counts in the group's mean.
    """

    key: str
    score: float
    span: Span | None


Score = float | None | Sequence[Credit]
Scope = Callable[[Response], "Span | None"]
RewardFunction = Callable[..., "Score | Awaitable[Score]"]
