"""What a reward is given and what it returns: a response, spans of its text, and scores."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType
from typing import Any, Protocol

_NO_TRUTH: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open range of characters of `Response.text`: `text[start:end]`."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a response, and what an environment answered to it.

    span: its characters of `Response.text`.
    observation: the answer's text, with one `<image>` at the position of each image; "" where none followed.
    images: of the answer, as paths or compressed bytes.
    facts: what the environment noted about the turn.
    fault: one word for why it could not do what the turn asked for; "" where it did.
    """

    span: Span
    observation: str = ""
    images: Sequence[str | bytes] = ()
    facts: Mapping[str, Any] = field(default_factory=lambda: _NO_TRUTH)
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled answer, as a reward sees it.

    text: decoded response, without the end-of-text token. With an environment, the policy's own words of all turns, a
        line break between them; what the environment wrote is in `turns` alone, where no reward can mistake it.
    truth: the row's gold columns; `answers` (list of str) and `evidence` (list of str, one per image) where given.
    num_tokens: response tokens, end-of-text included.
    truncated: True when sampling stopped at the token limit instead of at end-of-text.
    question: the question as the data set states it.
    images: the page images, as paths or compressed bytes, for judges that look at them.
    turns: of a sampled response at least one; empty where a response was made by hand from its text.
    """

    text: str
    truth: Mapping[str, Any] = field(default_factory=lambda: _NO_TRUTH)
    num_tokens: int = 0
    truncated: bool = False
    question: str = ""
    images: Sequence[str | bytes] = ()
    turns: Sequence[Turn] = ()


@dataclass(frozen=True, slots=True)
class Credit:
    """One score on one span; a reward that returns several teaches each span its own score.

    key: scores with the same key are compared across the group (e.g. "slot1").
    span: the characters it teaches; None teaches nothing, but the score still counts in the group's mean.
    determined: the character after which the score cannot change any more (`algorithm.credit=causal` teaches everything
        before it); None is the end of `span`, and of the response where there is no span.
    """

    key: str
    score: float
    span: Span | None
    determined: int | None = None


Score = float | None | Sequence[Credit]


Scope = Callable[[Response], "Span | None"]


Determined = Callable[[Response], "int | None"]


RewardFunction = Callable[..., "Score | Awaitable[Score]"]


class RewardError(ValueError):
    """A reward cannot be loaded, configured or used; the text says what to change."""


class Reward(Protocol):
    """A function that `@reward` has marked: call it with a response, ask it for the characters it may teach."""

    name: str
    scope: Scope
    short: str
    leading: bool
    determined: Determined | None

    def __call__(self, response: Response, /, **arguments: Any) -> Any:
        """Return the score: a number, None (did not apply) or several credits; an awaitable of that if async."""


def check_score(value: object, num_chars: int | None = None) -> float | tuple[Credit, ...] | None:
    """Return a reward's result as a float, None or a tuple of credits.

    A bool counts as 0.0 or 1.0; an empty list of credits as None.

    Args:
        value: the (awaited) return value.
        num_chars: length of the response's text, to check that spans lie inside it, too.

    Raises:
        RewardError: a score is not a finite number, or a credit is malformed.
    """
    if value is None:
        return None
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(_check_credit(credit, num_chars) for credit in value) or None
    return _check_number(value)


def _check_number(value: object) -> float:
    if inspect.isawaitable(value):
        raise RewardError("the reward returned an awaitable inside its result. Await it.")
    if not isinstance(value, Real):
        raise RewardError(
            f"a score must be a number, None or a list of Credit, got {type(value).__name__} {str(value)[:80]!r}. "
            "Return float(...)."
        )
    number = float(value)
    if not math.isfinite(number):
        raise RewardError(f"a score must be finite, got {number}. Return None where the reward does not apply.")
    return number


def _check_credit(credit: object, num_chars: int | None) -> Credit:
    if not isinstance(credit, Credit):
        raise RewardError(f"a reward with several scores must return Credit(key, score, span), got {credit!r:.80}")
    if not isinstance(credit.key, str):
        raise RewardError(f"Credit.key must be a string, got {credit.key!r}")
    score, span = _check_number(credit.score), credit.span
    if span is not None:
        if not isinstance(span, Span):
            raise RewardError(f"Credit.span must be Span(start, end) or None, got {span!r}")
        if not 0 <= span.start <= span.end or (num_chars is not None and span.end > num_chars):
            limit = "" if num_chars is None else f" <= {num_chars}"
            raise RewardError(f"credit '{credit.key}': a span needs 0 <= start <= end{limit}, got {span}")
    where = credit.determined
    if where is not None and not (isinstance(where, int) and 0 <= where <= (where if num_chars is None else num_chars)):
        raise RewardError(
            f"credit '{credit.key}': determined must be a character of the response, 0 to {num_chars}, or None; "
            f"got {where!r}"
        )
    return Credit(credit.key, score, span, where)
