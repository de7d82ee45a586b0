"""What a policy writes to the page desk, and what is wrong with it.

    <search>words</search>            find pages
    <open>3</open>                    show page [3]
    <zoom>3 0 500 1000 1000</zoom>    show a part of page [3]: left, top, right, bottom

Everything else is an answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Name = Literal["search", "open", "zoom"]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as shares of the page's width and height."""

NAMES: tuple[Name, ...] = ("search", "open", "zoom")
STOP = tuple(f"</{name}>" for name in NAMES)
MAX_QUERY_CHARACTERS = 1_000

_FIRST_TAG = re.compile(r"</?(search|open|zoom|answer)>")
_PAGE = re.compile(r"\s*\[?(\d{1,6})\]?\s*")
_NUMBERS = re.compile(r"\s*\[?(\d{1,6})\]?[\s,:]+\[?\s*(\d+(?:\.\d+)?(?:[\s,]+\d+(?:\.\d+)?){3})\s*\]?\s*")


class BadCall(ValueError):
    """A call cannot be carried out; the text tells the policy what to write instead."""

    def __init__(self, name: Name, text: str) -> None:
        super().__init__(text)
        self.name = name


@dataclass(frozen=True, slots=True)
class Call:
    """One call. query: of a search. number: of a page, as the policy knows it. box: of a zoom."""

    name: Name
    query: str = ""
    number: int = 0
    box: Box | None = None


def parse_call(turn: str, scale: float) -> Call | None:
    """Return the first call of a turn; None for a turn that answers first, or calls nothing.

    scale: what the policy writes for the right or lower edge of a page.

    Raises:
        BadCall: a call is not closed, or not written as it should be.

    >>> parse_call("<think>The second one.</think><zoom>2 0 50 100 100</zoom>", 100)
    Call(name='zoom', query='', number=2, box=(0.0, 0.5, 1.0, 1.0))
    """
    tag = _FIRST_TAG.search(turn)
    if tag is None or tag[1] == "answer":
        return None
    name: Name = tag[1]  # type: ignore[assignment]
    body, closed, _ = turn[tag.end() :].partition(f"</{name}>")
    if tag[0].startswith("</") or not closed:
        raise BadCall(name, f"Write a whole call: {_usage(name, scale)}")
    if name == "search":
        return _search(body)
    if name == "open":
        if page := _PAGE.fullmatch(body):
            return Call("open", number=int(page[1]))
        raise BadCall("open", f"Name one page by its number: {_usage(name, scale)}")
    return _zoom(body, scale)


def without_call(turn: str) -> str:
    """Return what a turn says before its first call or answer.

    >>> without_call("the second one <open>2</open>")
    'the second one '
    """
    tag = _FIRST_TAG.search(turn)
    return turn if tag is None else turn[: tag.start()]


def _search(body: str) -> Call:
    query = " ".join(body.split())
    if not query:
        raise BadCall("search", "Say what to look for: <search>words</search>")
    if len(query) > MAX_QUERY_CHARACTERS:
        raise BadCall("search", f"Search with at most {MAX_QUERY_CHARACTERS} characters.")
    return Call("search", query=query)


def _zoom(body: str, scale: float) -> Call:
    numbers = _NUMBERS.fullmatch(body)
    if numbers is None:
        raise BadCall("zoom", f"Name a page and the box's left, top, right and bottom: {_usage('zoom', scale)}")
    left, top, right, bottom = (float(number) / scale for number in re.split(r"[\s,]+", numbers[2]))
    if not (left < right <= 1 and top < bottom <= 1):
        raise BadCall("zoom", f"A box needs left < right and top < bottom, from 0 to {scale:g}.")
    return Call("zoom", number=int(numbers[1]), box=(left, top, right, bottom))


def _usage(name: Name, scale: float) -> str:
    body = {"search": "words", "open": "3", "zoom": f"3 0 {scale / 2:g} {scale:g} {scale:g}"}[name]
    return f"<{name}>{body}</{name}>"
