"""Which pages a search may return: all, or those of chosen documents, without pages that are gone from the store."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np

from recipes.answers.options import check_options
from recipes.retrieval.pages.store import ID_CHARACTERS, DocumentRow, PageStore, shown
from rollout.keys import key
from rsgrpo.errors import InputError


@dataclass(frozen=True, slots=True)
class Keep:
    """What a search keeps.

    contents: first digits of the contents whose pages are kept; None keeps all. without: ids of pages that are dropped.
    """

    contents: frozenset[str] | None = None
    without: frozenset[str] = frozenset()

    def has(self, page_id: str) -> bool:
        """Whether a page is kept."""
        return page_id not in self.without and (self.contents is None or page_id[:ID_CHARACTERS] in self.contents)

    def mask(self, ids_P: np.ndarray) -> np.ndarray:
        """Return (P,) whether each page is kept, by ids as bytes."""
        kept_P = np.ones(len(ids_P), bool)
        if self.without:
            kept_P &= ~np.isin(ids_P, np.array([page_id.encode() for page_id in self.without], dtype="S"))
        if self.contents is not None:
            wanted = np.array([content.encode() for content in self.contents], dtype=f"S{ID_CHARACTERS}")
            kept_P &= np.isin(ids_P.astype(f"S{ID_CHARACTERS}"), wanted)
        return kept_P


ALL = Keep()


@dataclass(frozen=True, slots=True)
class Filters:
    """Which documents are searched; a file passes if it meets all of them, and a page if one of its files does."""

    root: str = key("", "only documents of this ingested folder")
    folder: str = key("", "only documents below this folder, or whose names match this pattern (2019/*.pdf)")
    type: str = key("", "only files with these extensions: pdf, or docx,odt")
    since: str = key("", "only files changed on this day or later: 2024-01-31")
    until: str = key("", "only files changed on this day or earlier")

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("since", "until"):
            self._day(name)

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))

    def _day(self, name: str) -> date | None:
        text = getattr(self, name)
        try:
            return date.fromisoformat(text) if text else None
        except ValueError as error:
            raise InputError(f"--{name} must be a day such as 2024-01-31, got {text!r}") from error

    def passes(self, row: DocumentRow) -> bool:
        """Whether a file meets the filters."""
        place = self.folder.strip("/")
        kinds = [kind.strip().lower().lstrip(".") for kind in self.type.split(",") if kind.strip()]
        since, until, time = self._day("since"), self._day("until"), row.modified_ns / 1e9
        return (
            (not self.root or row.root in (self.root, shown(os.path.abspath(self.root))))
            and (not place or row.document.startswith(f"{place}/") or fnmatch.fnmatchcase(row.document, place))
            and (not kinds or Path(row.document).suffix.lower().lstrip(".") in kinds)
            and (since is None or time >= _midnight(since))
            and (until is None or time < _midnight(until + timedelta(days=1)))
        )


NO_FILTERS = Filters()


def contents_of(store: PageStore, filters: Filters) -> frozenset[str] | None:
    """Return the first digits of the contents that pass the filters, None without filters.

    Raises:
        InputError: no document passes.
    """
    if not filters:
        return None
    rows: Iterable[DocumentRow] = [row for row in store.documents() if row.num_pages]
    found = frozenset(row.content[:ID_CHARACTERS] for row in rows if filters.passes(row))
    if not found:
        values = {f"--{field.name}": getattr(filters, field.name) for field in fields(filters)}
        given = ", ".join(f"{option} {value}" for option, value in values.items() if value)
        raise InputError(f"no document passes {given}; `python -m recipes.retrieve list {store.folder}` shows them all")
    return found


def _midnight(day: date) -> float:
    return datetime(day.year, day.month, day.day).timestamp()  # noqa: DTZ001  # days of this machine, as files show them
