"""The page desk as an environment: `rollout.turns.environment=recipes.retrieval.desk.environment:Desk`.

It answers the calls of `recipes.retrieval.desk.calls`, in process, from a page store or from the pages that a row
names. The same calls get the same answers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from recipes.retrieval.desk.calls import STOP, BadCall, Call, parse_call
from recipes.retrieval.desk.shelf import Sheet, part, small, store_shelf
from recipes.retrieval.search.found import shown_score
from recipes.retrieval.search.retriever import By
from rollout.turns.environment import Reply
from rollout.types import ImageSource, Prompt
from rsgrpo.errors import InputError

BAD_CALL = "bad_call"
"""The fault of a call that is malformed, or names a page that is not on the desk."""


class Desk:
    """One episode at the desk. Pages have numbers: in the order of the row, or in which searches found them.

    What a step did is in its facts: `call`, and where they apply `query`, `numbers`, `pages` and `scores` (of a search,
    in order), `number` and `page` (of an open or a zoom) and `box` (of a zoom, as shares of the page). A page's id is
    its content's in a store, and its name where the row names the pages.
    """

    stop = STOP

    def __init__(
        self,
        prompt: Prompt,
        *,
        store: str = "",
        index: str = "",
        by: By = "words",
        k: int = 4,
        thumbnail_side: int = 256,
        box_scale: float = 1000.0,
        column: str = "pages",
        folder: str = "",
    ) -> None:
        """Begin an episode.

        Args:
            store: a page store to search; "" takes the pages of the row's `column` alone.
            index: the store's index; "" is STORE/index. by: what finds pages, as in `recipes.retrieve search`.
            k: pages that a search shows, as thumbnails of at most `thumbnail_side` pixels per side.
            box_scale: what the policy writes for a page's right or lower edge in a zoom.
            column: of the row, names of page images; the prompt shows their thumbnails as [1], [2], ...
            folder: that those names are relative to; "" is the current one.

        Raises:
            InputError: there is no such store or index, or the row names no pages.
        """
        self._store = (store, index, by, k) if store else None
        if self._store is not None:
            store_shelf(*self._store)
        self._thumbnail_side, self._box_scale = thumbnail_side, box_scale
        self._sheets = [] if store else _named_pages(prompt.truth, column, folder)

    def step(self, turn: str) -> Reply | None:
        """Carry out a turn's call; None for an answer."""
        try:
            call = parse_call(turn, self._box_scale)
            if call is None:
                return None
            return self._search(call) if call.name == "search" else self._show(call)
        except BadCall as error:
            return Reply(str(error), facts={"call": error.name}, fault=BAD_CALL)

    def at_once(self, question: str, most: int) -> list[tuple[str, ImageSource, ImageSource]]:
        """Return (id, thumbnail, page) of what a policy of one turn would be given: the first pages, at most `most`.

        They are the row's pages, in order, or those that a search for the question itself finds.

        Raises:
            InputError: the question cannot be searched.
        """
        sheets: Sequence[Sheet] = self._sheets
        if self._store is not None:
            store, index, by, _ = self._store
            sheets = store_shelf(store, index, by, most).search(question)
        return [(each.page_id, small(each.image, self._thumbnail_side), each.image) for each in sheets[:most]]

    def _search(self, call: Call) -> Reply:
        if self._store is None:
            raise BadCall("search", f"There is nothing to search. {self._known()}")
        try:
            found = store_shelf(*self._store).search(call.query)
        except InputError as error:
            raise BadCall("search", f"This cannot be searched: {error}") from error
        numbers = [self._number_of(sheet) for sheet in found]
        lines = [_line(number, sheet) for number, sheet in zip(numbers, found, strict=True)]
        facts = {"call": "search", "query": call.query, "numbers": numbers}
        facts |= {"pages": [sheet.page_id for sheet in found], "scores": [sheet.score for sheet in found]}
        images = tuple(small(sheet.image, self._thumbnail_side) for sheet in found)
        return Reply("\n".join(lines) or "No page was found. Search with other words.", images, facts)

    def _show(self, call: Call) -> Reply:
        if not 1 <= call.number <= len(self._sheets):
            raise BadCall(call.name, f"There is no page [{call.number}]. {self._known()}")
        sheet = self._sheets[call.number - 1]
        facts: dict[str, Any] = {"call": call.name, "number": call.number, "page": sheet.page_id}
        if call.box is None:
            return Reply(f"[{call.number}]<image>", (sheet.image,), facts)
        return Reply(f"[{call.number}]<image>", (part(sheet.image, call.box),), facts | {"box": list(call.box)})

    def _number_of(self, sheet: Sheet) -> int:
        """Return the page's number, a new one if it was not found before."""
        known = [each.page_id for each in self._sheets]
        if sheet.page_id not in known:
            self._sheets.append(sheet)
            return len(self._sheets)
        return known.index(sheet.page_id) + 1

    def _known(self) -> str:
        last = len(self._sheets)
        if not last:
            return "The desk has no page yet. Search first: <search>words</search>"
        return f"The desk has {'page [1]' if last == 1 else f'pages [1] to [{last}]'}."


def _named_pages(truth: Mapping[str, Any], column: str, folder: str) -> list[Sheet]:
    names = truth.get(column)
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"the row's column '{column}' must be a list of page images, got {names!r:.80}. Write it, or set "
            "rollout.turns.arguments.store to a page store"
        )
    return [Sheet(name, "", os.path.join(folder, name)) for name in names]


def _line(number: int, sheet: Sheet) -> str:
    score = shown_score(sheet.score, 2)
    return f"[{number}] {_plain(sheet.place)}{f' ({score})' if score else ''}<image>"


def _plain(text: str) -> str:
    """Return a name that neither marks an image nor controls the model."""
    return text.replace("<", "(").replace(">", ")")
