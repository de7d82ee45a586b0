"""Scopes of turns and of the calls in them, where they are determined, and one score per turn.

@reward(scope=last_turn)
def accuracy(response): ...                  # teaches the turn that answers

@reward
def cheap_calls(response):                   # each turn its own score, known once the turn has ended
    return per_turn(response, [-0.1 * bool(turn.fault) for turn in turns_of(response)])

A turn ends with its end-of-text, which holds the line break behind it: whoever decides to end a turn decides what
the environment is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from rewards.api import Credit, Response, RewardError, Span, Turn


def place_turns(text: str, answers: Iterable[tuple[int, Turn]]) -> Iterator[Turn]:
    """Yield the turns of a response's text, each with the answer to it.

    answers: in order, the character at which the turn ended that it answers, and a turn with the answer and any span.
    """
    start = 0
    for end, answer in answers:
        yield replace(answer, span=Span(start, end))
        start = end + 1
    if start <= len(text):
        yield Turn(Span(start, len(text)))


def turns_of(response: Response) -> Sequence[Turn]:
    """Return the turns of a response; one made by hand from its text is a single turn."""
    return response.turns or (Turn(Span(0, len(response.text))),)


def end_of(response: Response, turn: Turn) -> int:
    """Return the character behind a turn and its end-of-text."""
    return min(turn.span.end + 1, len(response.text))


@dataclass(frozen=True, slots=True)
class TurnScope:
    """The characters of one turn, its end-of-text included; where it is given, of a block in it, markers included.

    number: from 1; from -1 backwards, the last turn first.
    """

    number: int
    block: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.number == 0:
            raise RewardError("turns are numbered from 1, or from -1 backwards; got 0")
        if self.block is not None and not all(self.block):
            raise RewardError(f"call({self.number}, {self.block[0]!r}, {self.block[1]!r}): markers must not be empty")

    def __call__(self, response: Response) -> Span | None:
        """Return the span; None where there is no such turn, or no such block in it."""
        turn = self.turn(response)
        if turn is None:
            return None
        if self.block is None:
            return Span(turn.span.start, end_of(response, turn))
        start = response.text.find(self.block[0], turn.span.start, turn.span.end)
        behind = start + len(self.block[0])
        end = response.text.find(self.block[1], behind, turn.span.end) if start >= 0 else -1
        return Span(start, end + len(self.block[1])) if end >= 0 else None

    def turn(self, response: Response) -> Turn | None:
        """Return the turn; None where there is none of this number."""
        turns = turns_of(response)
        index = self.number - 1 if self.number > 0 else len(turns) + self.number
        return turns[index] if 0 <= index < len(turns) else None


def turn(number: int) -> TurnScope:
    r"""Return the scope of turn `number`: 1 is the first one, -1 the last.

    >>> two = Response("ab\ncde", turns=[Turn(Span(0, 2)), Turn(Span(3, 6))])
    >>> turn(1)(two), turn(-1)(two), turn(3)(two)
    (Span(start=0, end=3), Span(start=3, end=6), None)
    """
    return TurnScope(number)


def call(number: int, start: str, end: str) -> TurnScope:
    """Return the scope of a call in turn `number`: from the first `start` in it to the next `end`, both included.

    >>> call(1, "<open>", "</open>")(Response("see <open>3</open>"))
    Span(start=4, end=18)
    """
    return TurnScope(number, (start, end))


last_turn = turn(-1)
"""The scope of a reward that teaches the turn that ends a response."""


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """Where a reward is determined that reads no turn behind this one."""

    number: int

    def __call__(self, response: Response) -> int | None:
        """Return the character behind the turn and its end-of-text; None, the response's end, where there is none."""
        found = TurnScope(self.number).turn(response)
        return None if found is None else end_of(response, found)


def turn_end(number: int) -> TurnEnd:
    r"""Return `determined=` of a reward that is known once turn `number` has been answered.

    >>> turn_end(1)(Response("ab\ncde", turns=[Turn(Span(0, 2)), Turn(Span(3, 6))]))
    3
    """
    return TurnEnd(number)


def per_turn(response: Response, scores: Sequence[float | None], key: str = "turn") -> list[Credit]:
    r"""Return one credit per turn, `key` and its number as the key: it teaches the turn and is determined at its end.

    Turns of the same number are compared across the group. With `algorithm.credit=causal` a response that took fewer
    turns counts as 0 in those it did not take, because the policy chose that.

    scores: one per turn; None where a turn has none.

    Raises:
        RewardError: another number of scores than of turns.

    >>> per_turn(Response("ab\ncde", turns=[Turn(Span(0, 2)), Turn(Span(3, 6))]), [0.5, None])
    [Credit(key='turn1', score=0.5, span=Span(start=0, end=3), determined=3)]
    """
    turns = turns_of(response)
    if len(scores) != len(turns):
        raise RewardError(
            f"per_turn got {len(scores)} scores for {len(turns)} turns. Give one per turn, None for none."
        )
    credits = []
    for number, (taken, score) in enumerate(zip(turns, scores, strict=True), start=1):
        if score is not None:
            end = end_of(response, taken)
            credits.append(Credit(f"{key}{number}", float(score), Span(taken.span.start, end), end))
    return credits
