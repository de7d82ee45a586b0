"""Read training rows while the run trains, for data sets that contain their images and do not fit into memory.

The source is read from its start, pass after pass, and shuffled within a buffer; a stream can be resumed exactly.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from rollout.types import Prompt
from rsgrpo.config.train import DataConfig, PromptConfig
from rsgrpo.data.checked_images import CheckedImages
from rsgrpo.data.dataset import PromptDataset, dropped_by, is_refused, require_same_rows
from rsgrpo.data.prompts import RowChecker, TokenCounter
from rsgrpo.data.rows import Row, find_images, open_rows
from rsgrpo.errors import InputError, RsgrpoError, SourceBroke

log = logging.getLogger(__name__)

NUM_SHOWN_AT_START = 32
ROWS_REMEMBERED = 4096


class StreamedPrompts:
    """Endless prompts of a source, pass after pass, like `PromptStream` but with one buffer of rows in memory.

    dropped: reason -> rows left out so far because `data.bad_rows` or `data.overlong` says so.
    """

    def __init__(self, data: DataConfig, prompt: PromptConfig, processor: TokenCounter, seed: int) -> None:
        """Open the source.

        Raises:
            InputError: it is not there, or cannot be read row by row.
        """
        self.dropped: Counter[str] = Counter()
        self._data, self._seed = data, seed
        self.epoch = self._position = self._num_good = 0
        self._broke: SourceBroke | None = None
        rows, folder = open_rows(data.train, streamed=True)
        self._checker = RowChecker(data, prompt, find_images(folder, data.image_dir), processor)
        self._enter(0, rows)

    def next(self, n: int) -> list[Prompt]:
        """Return the next n prompts.

        Raises:
            SourceBroke: no more rows can be read now. The stream is where it was before the call, for a checkpoint.
            RsgrpoError: a bad row that is not to be dropped, or a whole pass without a usable row.
        """
        if self._broke is not None:
            raise self._broke
        before = self.epoch, self._position
        try:
            return self._take(n)
        except SourceBroke as error:
            self._broke = error
            self.epoch, self._position = before
            raise

    def _take(self, n: int) -> list[Prompt]:
        batch: list[Prompt] = []
        while len(batch) < n:
            row = next(self._rows, None)
            if row is None:
                if not self._num_good:
                    raise RsgrpoError(f"data source {self._data.train} has no usable row: {dict(self.dropped)}")
                self._enter(self.epoch + 1)
                continue
            self._position += 1
            prompt = self._checked(row)
            if prompt is not None:
                batch.append(prompt)
        return batch

    def first(self, n: int) -> PromptDataset:
        """Return at most the first n prompts of the source, to look at before a run; the stream does not move."""
        rows, _ = open_rows(self._data.train, streamed=True)
        found = list(islice((good for row in rows if isinstance(good := self._checker.check(row), Prompt)), n))
        if not found:
            raise InputError(f"data source {self._data.train} has no usable row")
        return PromptDataset(found)

    def state(self) -> dict[str, Any]:
        """Return the position of the stream, for a checkpoint (JSON)."""
        kept = {name: getattr(self._data, name) for name in ("train", "shuffle", "shuffle_buffer")}
        return {"streamed": kept, "seed": self._seed, "epoch": self.epoch, "position": self._position}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resume where `state` was taken, by reading that pass again up to that point.

        Raises:
            InputError: it was taken from another source or in another order.
        """
        require_same_rows(state, self.state(), ("streamed", "seed"))
        position = int(state["position"])
        self._enter(int(state["epoch"]))
        if sum(1 for _ in islice(self._rows, position)) < position:
            raise InputError(f"data source {self._data.train} has fewer rows than when the checkpoint was written")
        self._position, self._num_good = position, 1

    def _enter(self, epoch: int, rows: Iterator[Row] | None = None) -> None:
        rows = rows or open_rows(self._data.train, streamed=True)[0]
        self.epoch, self._position, self._num_good = epoch, 0, 0
        self._checker.checked = CheckedImages()
        order = random.Random(f"{self._seed}/{epoch}")
        self._rows: Iterator[Row] = shuffled(rows, self._data.shuffle_buffer, order) if self._data.shuffle else rows

    def _checked(self, row: Row) -> Prompt | None:
        if self._position % ROWS_REMEMBERED == 0:
            self._checker.checked = CheckedImages()  # it remembers the images of all rows
        found = self._checker.check(row)
        if isinstance(found, Prompt):
            self._num_good += 1
            return found
        where = f"{found.place}, id {found.id}: {found.reason}: {found.detail}"
        if is_refused(found, self._data):
            raise RsgrpoError(f"{self._data.train}, {where}. Fix it, or set {dropped_by(found)} to leave out such rows")
        self.dropped[found.reason] += 1
        log.warning("dropped %s", where)
        return None


def shuffled(rows: Iterator[Row], buffer_rows: int, order: random.Random) -> Iterator[Row]:
    """Yield all rows, each drawn from a buffer of the next `buffer_rows`; equal `order` gives equal rows."""
    buffer: list[Row] = []
    for row in rows:
        if len(buffer) < buffer_rows:
            buffer.append(row)
            continue
        place = order.randrange(buffer_rows)
        buffer[place], row = row, buffer[place]
        yield row
    order.shuffle(buffer)
    yield from buffer
