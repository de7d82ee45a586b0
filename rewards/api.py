"""All that a reward author needs: a response, a span of its text, and one decorator."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast, overload

from rewards.loading import bind_reward, load_reward, response_parameter
from rewards.types import (
    Credit,
    Determined,
    Response,
    Reward,
    RewardError,
    RewardFunction,
    Scope,
    Score,
    Span,
    Turn,
    check_score,
)

__all__ = [
    "Between",
    "Closed",
    "Credit",
    "Determined",
    "Response",
    "Reward",
    "RewardError",
    "RewardFunction",
    "Scope",
    "Score",
    "Span",
    "Turn",
    "between",
    "bind_reward",
    "check_score",
    "closed",
    "load_reward",
    "reward",
    "whole",
]


@dataclass(frozen=True, slots=True)
class Between:
    """The scope from the first `start` marker to the first `end` marker; None is the start or the end of the text."""

    start: str | None
    end: str | None

    def __post_init__(self) -> None:
        """Refuse markers that cannot bound anything."""
        if "" in (self.start, self.end) or (self.start is not None and self.start == self.end):
            raise RewardError(
                f"between({self.start!r}, {self.end!r}): markers must be two different, non-empty strings. "
                "Use None for the start or the end of the text."
            )

    def __call__(self, response: Response) -> Span | None:
        """Return the span, the start marker inside and the end marker outside; None if a marker is missing."""
        start = 0 if self.start is None else response.text.find(self.start)
        end = len(response.text) if self.end is None else response.text.find(self.end)
        return Span(start, end) if 0 <= start <= end else None


def between(start: str | None, end: str | None) -> Between:
    """Return the scope between two markers, found in characters: the first occurrence of each in the whole text.

    The start marker is inside the scope, the end marker outside. A missing marker, or an end marker that comes before
    the start marker, gives None: the scope is missed, and `algorithm.missing_marker` decides what that means.

    >>> between("<think>", None)(Response("<observe></observe><think>so"))
    Span(start=19, end=28)
    """
    return Between(start, end)


whole = between(None, None)
"""The scope of a reward that teaches every token of the response."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The character at which the last of several blocks is closed; None while one of them is not.

    markers: (start, end) of each block. A block is closed by the first end marker behind its first start marker.
    """

    markers: tuple[tuple[str, str], ...]

    def __call__(self, response: Response) -> int | None:
        """Return the character behind the last end marker; None if a block is not opened or not closed."""
        ends = []
        for start, end in self.markers:
            opened = response.text.find(start)
            closed = response.text.find(end, opened + len(start)) if opened >= 0 else -1
            if closed < 0:
                return None
            ends.append(closed + len(end))
        return max(ends)


def closed(*markers: tuple[str, str]) -> Closed:
    """Return where a reward that reads the named blocks is determined: once the last of them is closed.

    A block that is never closed leaves the reward undetermined until the response ends.

    >>> closed(("<answer>", "</answer>"))(Response("<answer>7</answer> and more"))
    18
    """
    return Closed(markers)


@overload
def reward(function: RewardFunction, /) -> Reward: ...
@overload
def reward(
    *, scope: Scope = whole, determined: Determined | None = None, short: str = "", leading: bool = False
) -> Callable[[RewardFunction], Reward]: ...
def reward(
    function: RewardFunction | None = None,
    /,
    *,
    scope: Scope = whole,
    determined: Determined | None = None,
    short: str = "",
    leading: bool = False,
) -> Reward | Callable[[RewardFunction], Reward]:
    """Mark a function of one response as a reward: it stays the same function and gains the attributes of `Reward`.

    Args:
        function: the function, where the decorator is written without parentheses.
        scope: the characters the reward may teach; `between(...)`, `whole`, or any function Response -> Span | None.
        determined: where the score is decided, as a function Response -> character, such as `closed(...)`; None is the
            end of the scope. Read by `algorithm.credit=causal` alone.
        short: an abbreviation for narrow places such as the console's line; "" is the name in the run's configuration.
        leading: whether displays with little room show this reward before others.

    Raises:
        RewardError: the decorated object is not a function of one response, or `scope` is not callable.
    """

    def mark(function: RewardFunction) -> Reward:
        if not inspect.isfunction(function):
            raise RewardError(f"@reward goes above a function, got {function!r}")
        if response_parameter(function) is None:
            raise RewardError(f"@reward: '{function.__name__}' must take the response as its first argument")
        marked = cast(Reward, function)
        marked.name, marked.scope, marked.determined = function.__name__, scope, determined
        marked.short, marked.leading = short, leading
        return marked

    if not callable(scope):
        raise RewardError(f"@reward(scope=...) takes a function of the response, such as between(...), got {scope!r}")
    if determined is not None and not callable(determined):
        raise RewardError(
            f"@reward(determined=...) takes a function of the response, such as closed(...), got {determined!r}"
        )
    return mark if function is None else mark(function)
