"""Training rows read while the run trains: for data sets that bring their images along and do not fit into memory.

Owns passes over a source that can only be read from its start, a shuffle within a buffer, and going on after a stop.
What a source is, is `rsgrpo.data.rows`; what is wrong with a row, `rsgrpo.data.prompts`.
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
from rsgrpo.data.dataset import PromptDataset
from rsgrpo.data.prompts import OVERLONG, BadRow, RowChecker, TokenCounter, read_template
from rsgrpo.data.rows import ImageFolder, Row, find_images, open_rows
from rsgrpo.errors import InputError, RsgrpoError, SourceBroke

log = logging.getLogger(__name__)

NUM_SHOWN_AT_START = 32
ROWS_REMEMBERED = 4096


class StreamedPrompts:
    """Endless prompts of a source, pass after pass; stands where `PromptStream` stands, and holds one buffer of rows.

    dropped: reason -> rows passed over so far because `data.bad_rows` or `data.overlong` says so.
    """

    def __init__(self, data: DataConfig, prompt: PromptConfig, processor: TokenCounter, seed: int) -> None:
        """Open the source.

        Raises:
            InputError: it is not there, or cannot be read row by row.
        """
        self.dropped: Counter[str] = Counter()
        self._data, self._seed = data, seed
        self.epoch = self._position = 0
        self._rows: Iterator[Row]
        self._images: ImageFolder | None = None
        self._broke: SourceBroke | None = None
        self._processor, self._template, self._system = processor, read_template(prompt), prompt.system
        self._enter(epoch=0)

    def next(self, n: int) -> list[Prompt]:
        """Return the next n prompts.

        Raises:
            SourceBroke: no more rows can be read now. The stream stands where it stood before, for a checkpoint.
            RsgrpoError: a row is bad and bad rows are not to be dropped, or a whole pass had no usable row.
        """
        if self._broke is not None:
            raise self._broke
        stood: tuple[int, int] = self.epoch, self._position
        try:
            return self._take(n)
        except SourceBroke as error:
            self._broke = error
            self.epoch, self._position = stood
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
        """Return the first n prompts of the source at most, to look at before a run; the stream does not move."""
        rows, _ = open_rows(self._data.train)
        checker = self._checker()
        good = (prompt for row in rows if isinstance(prompt := checker.check(row), Prompt))
        found = list(islice(good, n))
        if not found:
            raise InputError(f"data source {self._data.train} has no usable row")
        return PromptDataset(found)

    def state(self) -> dict[str, Any]:
        """Return where the stream stands, for a checkpoint (JSON)."""
        kept = {name: getattr(self._data, name) for name in ("train", "shuffle", "shuffle_buffer")}
        return {"streamed": kept, "seed": self._seed, "epoch": self.epoch, "position": self._position}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, by reading and passing over what had been read of that pass.

        Raises:
            InputError: it was taken from another source or another order.
        """
        mine = self.state()
        for key in ("streamed", "seed"):
            if state.get(key) != mine[key]:
                raise InputError(
                    f"the training rows are not those of the checkpoint: {key} was {state.get(key)}, is {mine[key]}; "
                    "resume with the same data and seed, or start a new run"
                )
        self._enter(int(state["epoch"]))
        for _ in range(int(state["position"])):
            if next(self._rows, None) is None:
                raise InputError(f"data source {self._data.train} has fewer rows than when the checkpoint was written")
        self._position, self._num_good = int(state["position"]), 1

    def _enter(self, epoch: int) -> None:
        rows, folder = open_rows(self._data.train)
        self.epoch, self._position, self._num_good = epoch, 0, 0
        self._images = self._images or find_images(folder, self._data.image_dir)
        self._check = self._checker()
        order = random.Random(f"{self._seed}/{epoch}")
        self._rows = shuffled(rows, self._data.shuffle_buffer, order) if self._data.shuffle else iter(rows)

    def _checker(self) -> RowChecker:
        assert self._images is not None, "the source has been opened"
        return RowChecker(self._data, self._template, self._system, self._images, self._processor, CheckedImages())

    def _checked(self, row: Row) -> Prompt | None:
        if self._position % ROWS_REMEMBERED == 0:
            self._check = self._checker()  # it remembers the images of all rows that it checked
        found = self._check.check(row)
        if isinstance(found, BadRow):
            if (self._data.overlong if found.reason == OVERLONG else self._data.bad_rows) == "error":
                raise RsgrpoError(
                    f"{self._data.train}, {found.place}, id {found.id}: {found.reason}: {found.detail}. Mend it, or "
                    "pass over such rows with data.bad_rows=drop (data.overlong=drop)"
                )
            self.dropped[found.reason] += 1
            log.warning("dropped %s, id %s: %s: %s", found.place, found.id, found.reason, found.detail)
            return None
        self._num_good += 1
        return found


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
