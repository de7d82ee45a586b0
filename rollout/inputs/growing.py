"""The text of a response while it grows, in pieces for a listener."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence

from rollout.types import Observation, RolloutGroup


def pieces(
    updates: Iterable[Sequence[int] | Observation | RolloutGroup], decode: Callable[[Sequence[int]], str]
) -> Generator[str | Observation | RolloutGroup]:
    """Turn a growing response into the pieces of text that a listener has not heard yet, then its group.

    The pieces together are the group's text; an observation comes between the turns that it separates.

    updates: the token ids of the turn so far, whenever there are more; observations; then the finished group.
    decode: token ids -> their text.
    """
    turn: Sequence[int] = ()
    heard, is_first = "", True
    for update in updates:
        if isinstance(update, RolloutGroup):
            rollout = update.rollouts[0] if update.rollouts else None
            start = rollout.observations[-1].at_char + 1 if rollout and not is_first else 0
            if rollout and (piece := fresh_text(heard, rollout.text[start:], is_whole=True)):
                yield piece
            yield update
            return
        if isinstance(update, Observation):
            if piece := fresh_text(heard, decode(turn), is_whole=True):
                yield piece
            yield update
            if update.token_ids_S:
                yield "\n"
                turn, heard, is_first = (), "", False
            continue
        turn = update
        text = decode(turn)
        if piece := fresh_text(heard, text):
            yield piece
            heard = text


def fresh_text(told: str, text: str, *, is_whole: bool = False) -> str:
    """Return the next piece of a growing response of which `told` was already sent, "" for nothing yet.

    An incomplete character waits for its other bytes, or for the end of the response (`is_whole`): with told "a" and
    text "ab\N{REPLACEMENT CHARACTER}" the result is "" at first.
    """
    waits = text.endswith("\N{REPLACEMENT CHARACTER}") and not is_whole
    return text[len(told) :] if text.startswith(told) and not waits else ""
