"""Load data sets of prompts with a check of every row, and stream batches of them to training without end.

`rsgrpo.data.prompts` turns one row into a prompt; `rsgrpo.data.rows` reads the file formats.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rollout.types import Prompt
from rsgrpo.config.train import DataConfig, PromptConfig
from rsgrpo.data.checked_images import CheckedImages
from rsgrpo.data.faults import OVERLONG, BadRow, counted, explained
from rsgrpo.data.foreign import trainer_of
from rsgrpo.data.prompts import RowChecker, TokenCounter, as_ours
from rsgrpo.data.rows import Row, find_images, image_entries, read_rows
from rsgrpo.errors import InputError

log = logging.getLogger(__name__)

MAX_CHECK_THREADS = 32


class PromptDataset:
    """Prompts that passed every check, in file order.

    dropped: reason -> rows left out because `data.bad_rows` or `data.overlong` says so.
    """

    def __init__(self, prompts: Sequence[Prompt], dropped: Mapping[str, int] | None = None) -> None:
        self._prompts = tuple(prompts)
        self.dropped = dict(dropped or {})

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self._prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)


def load_prompts(
    source: str,
    data: DataConfig,
    prompt: PromptConfig,
    processor: TokenCounter,
    *,
    checked: CheckedImages | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PromptDataset:
    """Read a data source (`rsgrpo.data.rows.read_rows`) and check every row of it.

    A prompt's `truth` is what the reader `data.gold` makes of the row's gold columns, plus its other columns.

    checked: images that need not be decoded again; None decodes all.
    progress: called with (rows checked, rows).

    Raises:
        InputError: the source cannot be read, there are bad rows that are not to be dropped, or no row is left.
    """
    rows, folder = read_rows(source, keep_broken=True)
    good, bad = sort_rows(rows, data, prompt, processor, folder=folder, checked=checked, progress=progress)
    _refuse(bad, data, source, len(rows))
    if note := about_images(rows, data):
        log.warning("%s: %s", source, note)
    if bad:
        log.warning("%s: dropped %d of %d rows (%s)", source, len(bad), len(rows), counted(bad))
    if not good:
        raise InputError(f"data source {source} has no usable row left; the first was dropped because: {bad[0].detail}")
    return PromptDataset(good, Counter(row.reason for row in bad))


def sort_rows(
    rows: Sequence[Row],
    data: DataConfig,
    prompt: PromptConfig,
    processor: TokenCounter,
    *,
    folder: Path,
    checked: CheckedImages | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Prompt], list[BadRow]]:
    """Return the prompts of the rows that can be used, and why the others cannot, both in file order."""
    checker = RowChecker(data, prompt, find_images(folder, data.image_dir), processor, checked)
    outcomes: list[Prompt | BadRow] = []
    with ThreadPoolExecutor(min(MAX_CHECK_THREADS, os.cpu_count() or 1)) as pool:
        for outcome in pool.map(checker.check, rows):
            outcomes.append(outcome)
            if progress is not None:
                progress(len(outcomes), len(rows))
    return _split_outcomes(outcomes, rows)


def about_images(rows: Sequence[Row], data: DataConfig) -> str:
    """Return what is odd about rows without an image; "" if every row has one."""
    column = data.columns["image"]
    without = [row for row in rows if not row.fault and not _has_images(row, data)]
    if not without:
        return ""
    if len(without) < len(rows):
        return f"{len(without)} of {len(rows)} rows have no image and are used as text ({without[0].place} first)"
    if any(column in row.columns for row in rows):
        return "no row has an image: all are used as text"
    if trainer_of(without[0].columns) == "llamafactory":
        return ""  # each of these rows is told how to convert it
    has = ", ".join(without[0].columns)
    return (
        f"no row has a column {column!r}, so all are used as text; they have {has}. Name the images' column as "
        "data.columns.image"
    )


def _has_images(row: Row, data: DataConfig) -> bool:
    try:
        columns = as_ours(row.columns, data)
        return any(
            image_entries(columns.get(name)) for name in (data.columns["image"], data.columns["video"], "videos")
        )
    except ValueError:  # a bad row, which is reported as such
        return True


class PromptStream:
    """Endless prompts of a data set, epoch after epoch; a batch may span the end of one and the start of the next.

    The order is fixed by (seed, epoch); `state` is the stream's position in a few numbers.
    """

    def __init__(self, dataset: PromptDataset, seed: int, shuffle: bool) -> None:
        self._dataset = dataset
        self._seed = seed
        self._shuffle = shuffle
        self._fingerprint = hashlib.sha256("\n".join(prompt.id for prompt in dataset).encode()).hexdigest()[:16]
        self._enter(epoch=0, position=0)

    def next(self, n: int) -> list[Prompt]:
        """Return the next n prompts."""
        batch: list[Prompt] = []
        while len(batch) < n:
            if self._position == len(self._dataset):
                self._enter(self.epoch + 1, position=0)
            taken = self._order[self._position : self._position + n - len(batch)]
            batch += [self._dataset[index] for index in taken]
            self._position += len(taken)
        return batch

    def state(self) -> dict[str, Any]:
        """Return the position of the stream, for a checkpoint (JSON)."""
        return {
            "epoch": self.epoch,
            "position": self._position,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "num_prompts": len(self._dataset),
            "fingerprint": self._fingerprint,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resume where `state` was taken.

        Raises:
            InputError: it was taken from other rows, or in another order of them.
        """
        require_same_rows(state, self.state(), ("num_prompts", "fingerprint", "seed", "shuffle"))
        self._enter(int(state["epoch"]), int(state["position"]))

    def _enter(self, epoch: int, position: int) -> None:
        self.epoch, self._position = epoch, position
        self._order = list(range(len(self._dataset)))
        if self._shuffle:
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)


def require_same_rows(then: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Refuse to resume a stream whose state was taken from other rows, or in another order of them.

    Raises:
        InputError: the states differ in one of the keys.
    """
    for key in keys:
        if then.get(key) != now[key]:
            raise InputError(
                f"the training rows are not those of the checkpoint: {key} was {then.get(key)}, is {now[key]}. Resume "
                "with the same data.train, data.shuffle and seed, or start a new run"
            )


def is_refused(row: BadRow, data: DataConfig) -> bool:
    """Whether a bad row ends the run; otherwise it is dropped and counted."""
    return (data.overlong if row.reason == OVERLONG else data.bad_rows) == "error"


def dropped_by(row: BadRow) -> str:
    """Return the setting that leaves out such a row."""
    return "data.overlong=drop" if row.reason == OVERLONG else "data.bad_rows=drop"


def _split_outcomes(outcomes: Sequence[Prompt | BadRow], rows: Sequence[Row]) -> tuple[list[Prompt], list[BadRow]]:
    """Part prompts from bad rows; of several prompts with one id the first is kept."""
    good: dict[str, Prompt] = {}
    bad: list[BadRow] = []
    places: dict[str, str] = {}
    for outcome, row in zip(outcomes, rows, strict=True):
        if isinstance(outcome, BadRow):
            bad.append(outcome)
        elif outcome.id in good:
            bad.append(BadRow(row.place, outcome.id, "duplicate id", f"also the id of {places[outcome.id]}"))
        else:
            good[outcome.id], places[outcome.id] = outcome, row.place
    return list(good.values()), bad


def _refuse(bad: Sequence[BadRow], data: DataConfig, source: str, num_rows: int) -> None:
    """Raise, listing them, if there are bad rows that the configuration does not drop."""
    refused = [row for row in bad if is_refused(row, data)]
    if not refused:
        return
    keys = sorted({dropped_by(row) for row in refused})
    raise InputError(
        f"{source}: {len(refused)} of {num_rows} rows cannot be used ({counted(refused)}):\n"
        f"{explained(refused, num_rows)}\nFix them, or leave them out with {' '.join(keys)}"
    )
