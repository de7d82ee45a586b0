"""Say which rows cannot be used: each once, and a mistake that all rows share once for all of them, with its cause."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rsgrpo.errors import listed

OVERLONG = "over-long prompt"
BROKEN = "broken row"
NO_IMAGE = "missing image"
MARKS = "<image> marks differ from images"
VIDEO_MARKS = "<video> marks differ from videos"
TOO_MANY_VIDEOS = "too many videos"
EMPTY_PROMPT = "empty prompt"
FOREIGN = "row for another trainer"
TOO_MANY_IMAGES = "too many images"
MAX_LISTED_ROWS = 20
CAUSES = {
    NO_IMAGE: "Set data.image_dir to the folder that the paths start from.",
    MARKS: "A template shows the images by {images}, {image_marks} or {numbered_marks}; a row's own prompt by <image>.",
    VIDEO_MARKS: "A template shows the videos by {videos}; a row's own prompt by <video>.",
    TOO_MANY_VIDEOS: "Raise inputs.max_videos.",
    EMPTY_PROMPT: "Name the rows' columns in data.columns, or choose a prompt that fits them.",
    TOO_MANY_IMAGES: "Raise inputs.max_images.",
    OVERLONG: "Raise inputs.max_prompt_tokens, or lower inputs.max_pixels.",
    "no gold answer": "Name the column of the answers as data.columns.answer.",
}
"""Kind of fault -> what to change where every row has it."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """Why a row cannot be used.

    place, id: of the row. reason: one of a few kinds, under which rows are counted. detail: what exactly is wrong.
    """

    place: str
    id: str
    reason: str
    detail: str


def counted(bad: Sequence[BadRow]) -> str:
    """Return reasons with their counts, the most frequent first."""
    return ", ".join(f"{count} x {reason}" for reason, count in Counter(row.reason for row in bad).most_common())


def explained(bad: Sequence[BadRow], num_rows: int, limit: int = MAX_LISTED_ROWS) -> str:
    """Return a line per bad row, at most `limit`; if all rows have the same fault, one example and its cause.

    num_rows: how many rows were checked.
    """
    first = bad[0]
    if is_shared([f"{row.reason}: {row.detail}" for row in bad], num_rows):
        cause = CAUSES.get(first.reason, "")
        return f"  every row: {first.reason}: {first.detail} ({first.place})" + (f"\n  {cause}" if cause else "")
    return listed([f"{row.place}, id {row.id}: {row.reason}: {row.detail}" for row in bad], limit)


def is_shared(details: Sequence[str], num_rows: int) -> bool:
    """Whether every one of several rows has the same fault, whatever its own numbers, paths and values are."""
    return len(details) == num_rows > 1 and len(set(map(_shape, details))) == 1


def _shape(detail: str) -> str:
    """Return a detail without what differs from row to row: numbers, paths and quoted values."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\S*[/\\]\S*|\S+\.\w{3,4}\b|[\d,.]+", "_", detail)
