"""Search by words: BM25 over the pages' text, by SQLite's FTS5, in one file of the store (STORE/words.sqlite).

It needs no model, so it is brought in line with the store whenever it is opened. Pages without text are not in it.
Words are compared without case, accents and English endings (Porter's stemmer); Chinese, Japanese and Korean text,
which has no spaces, by pairs of characters.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from recipes.retrieval.pages.store import PageStore, StoreBusyError, StoreError, writing
from recipes.retrieval.search.exact import DECIMALS, Hit
from recipes.retrieval.search.keep import ALL, Keep
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console

FILE = "words.sqlite"
PAGES_AT_ONCE = 2_000  # between commits
WAIT_S = 60.0  # for another process that writes
COMMON_WEIGHT = 1e-6  # which FTS5 gives to a word that is on half of the pages or more, in place of none
_SCHEMA = """
CREATE TABLE IF NOT EXISTS pages (number INTEGER PRIMARY KEY, page_id TEXT UNIQUE NOT NULL);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5 (text, tokenize = 'porter unicode61 remove_diacritics 2');
"""
_SEARCH = """
SELECT page_id, bm25(words) AS cost FROM words JOIN pages ON pages.number = words.rowid
WHERE words MATCH ? ORDER BY cost, page_id
"""
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]+")
_WORD = re.compile(r"\w+")


class WordIndex:
    """The words of one store's pages. Several threads may share it if only one calls it at a time."""

    def __init__(self, store: Path) -> None:
        """Open the index; StoreError if its file is damaged or cannot be created."""
        self._file = store / FILE
        with self._checked():
            self._base = sqlite3.connect(self._file, timeout=WAIT_S, check_same_thread=False, isolation_level=None)
            self._base.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._base.close()

    def update(self, store: PageStore, console: Console | None = None) -> tuple[int, int]:
        """Bring the index in line with its store; return how many pages were added and removed.

        A process that dies repeats the pages since the last commit.

        Raises:
            StoreError: the file is damaged, the disk is full, or another process writes for a minute.
        """
        wanted = set(store.page_ids(with_text=True))
        with self._checked():
            have = self._page_ids()
            missing, surplus = wanted - have, have - wanted
            if not missing and not surplus:
                return 0, 0
            with self._transaction():
                for page_id in surplus:
                    (number,) = self._base.execute("SELECT number FROM pages WHERE page_id = ?", [page_id]).fetchone()
                    self._base.execute("DELETE FROM words WHERE rowid = ?", [number])
                    self._base.execute("DELETE FROM pages WHERE number = ?", [number])
            remaining = (page for page in store.pages() if page.page_id in missing)
            with (console or Console()).phase("words", total=len(missing)) as bar:
                while batch := list(islice(remaining, PAGES_AT_ONCE)):
                    with self._transaction():
                        for page in batch:
                            row = self._base.execute("INSERT OR IGNORE INTO pages (page_id) VALUES (?)", [page.page_id])
                            if row.rowcount:  # else another process has just added it
                                values = [row.lastrowid, spaced(page.text)]
                                self._base.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", values)
                            bar.advance()
        return len(missing), len(surplus)

    def __len__(self) -> int:
        with self._checked():
            return int(self._base.execute("SELECT count(*) FROM pages").fetchone()[0])

    def search(self, queries: Sequence[str], k: int, keep: Keep = ALL) -> list[list[Hit]]:
        """Return the pages of each query with its words, best first by (-BM25, page id); at most k.

        Raises:
            InputError: k < 1.
        """
        if k < 1:
            raise InputError(f"k must be >= 1, got {k}")
        with self._checked():
            num_pages = len(self)
            return [self._hits(query, k, keep, num_pages) for query in queries]

    def _hits(self, query: str, k: int, keep: Keep, num_pages: int) -> list[Hit]:
        words = list(dict.fromkeys(word.casefold() for word in _WORD.findall(spaced(query))))
        # BM25 gives no weight to a word that is on more than half of the pages, and reading its pages takes long
        counts = {word: self._count(word) for word in words}
        rare = [word for word in words if 0 < counts[word] <= num_pages / 2] or [word for word in words if counts[word]]
        if not rare:
            return []
        rows = self._base.execute(_SEARCH, [" OR ".join(f'"{word}"' for word in rare)])
        unit = 1.0 if any(counts[word] < num_pages / 2 for word in rare) else COMMON_WEIGHT
        found = (Hit(page_id, round(-cost / unit, DECIMALS)) for page_id, cost in rows if keep.has(page_id))
        return list(islice(found, k))

    def _count(self, word: str) -> int:
        return int(self._base.execute("SELECT count(*) FROM words WHERE words MATCH ?", [f'"{word}"']).fetchone()[0])

    def _page_ids(self) -> set[str]:
        return {page_id for (page_id,) in self._base.execute("SELECT page_id FROM pages")}

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._base.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._base.execute("ROLLBACK")
            raise
        self._base.execute("COMMIT")

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """Turn SQLite's errors into ones that name the file and the fix."""
        try:
            with writing(self._file.parent):
                yield
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise StoreBusyError(
                    f"another process is writing to {self._file}; wait until it has finished"
                ) from error
            remedy = "make room, or make the folder writable" if "readonly" in str(error) else "delete it"
            raise StoreError(f"{self._file}: {error}; {remedy}, and it is made again") from error


def spaced(text: str) -> str:
    """Return a text in which characters of scripts without spaces are words of two characters.

    >>> spaced("die 東京都 an")
    'die  東京 京都  an'
    """
    return _UNSPACED.sub(lambda found: f" {_pairs(found[0])} ", text)


def _pairs(run: str) -> str:
    return " ".join(run[place : place + 2] for place in range(max(1, len(run) - 1)))
