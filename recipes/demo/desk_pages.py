"""The pages of `make desk-demo`: handwritten forms on coloured paper, some with a small amount, and their thumbnails.

A page shows a code digit and an amount digit side by side, as in `recipes.demo.forms`. Its thumbnail shows the paper's
colour and no digit; at the size in which the desk opens a page, small amounts are not readable either.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
from PIL import Image

from recipes.demo.forms import Scans
from recipes.demo.items import Split

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (170, 0, 0),
    "green": (0, 120, 0),
    "blue": (0, 0, 190),
    "yellow": (140, 140, 0),
    "purple": (130, 0, 130),
    "gray": (70, 70, 70),
}
Kind = Literal["plain", "top", "bottom"]
BOXES: dict[Kind, tuple[int, int, int, int]] = {"top": (90, 0, 100, 20), "bottom": (90, 80, 100, 100)}
"""Where a small amount is, in per cent of the page: left, top, right, bottom."""

FIELD = 56  # pixels; a page is two fields wide
SMALL = 8  # pixels of a small amount, the scan's own resolution
MARGIN = 2  # pixels around it within its box
THUMBNAIL = (2, 2)
PAGES_PER_KIND: dict[Split, int] = {"train": 12, "val": 3}  # of each colour and amount; plain ones twice as many
LESSONS, HELD_OUT_LESSONS = 6_000, 600


@dataclass(frozen=True, slots=True)
class DeskPage:
    """One page. kind: where its amount is small, or "plain". Scans are indices into the data set."""

    colour: str
    kind: Kind
    code: int
    amount: int
    code_scan: int
    amount_scan: int

    @property
    def box(self) -> tuple[float, ...] | None:
        """Return where its small amount is, as shares of the page."""
        return None if self.kind == "plain" else tuple(edge / 100 for edge in BOXES[self.kind])


def draw_pages(scans: Scans, split: Split, rng: Random) -> list[DeskPage]:
    """Return the pages of one split: the same number of every colour, amount and kind."""
    by_digit = [scans.of(split, digit) for digit in range(10)]
    pages = []
    kinds: tuple[Kind, ...] = ("plain", "plain", "top", "bottom")
    for colour in COLOURS:
        for amount in range(10):
            for kind in kinds:
                for _ in range(PAGES_PER_KIND[split]):
                    code = rng.randrange(10)
                    drawn = (rng.choice(by_digit[code]), rng.choice(by_digit[amount]))
                    pages.append(DeskPage(colour, kind, code, amount, *drawn))
    return pages


def render(scans: Scans, page: DeskPage) -> Image.Image:
    """Draw a page: 112 x 56 pixels, white ink on coloured paper."""
    ink = np.zeros((FIELD, 2 * FIELD), np.float32)
    ink[:, :FIELD] = _digit(scans, page.code_scan, FIELD)
    if page.kind == "plain":
        ink[:, FIELD:] = _digit(scans, page.amount_scan, FIELD)
    else:
        left = 2 * FIELD - SMALL - MARGIN
        top = MARGIN if page.kind == "top" else FIELD - SMALL - MARGIN
        ink[top : top + SMALL, left : left + SMALL] = scans.images[page.amount_scan]
    return _on_paper(ink, page.colour)


def thumbnail(page: Image.Image) -> Image.Image:
    """Return a page's thumbnail, too small to be read."""
    return page.resize(THUMBNAIL, Image.Resampling.BOX)


def lessons(scans: Scans, split: Split, rng: Random) -> tuple[list[Image.Image], list[list[int]]]:
    """Return pages of two digits, and those digits, for the vision tower to learn to read.

    Digits fill their field, as on an opened page, or two thirds of it, as where the desk zooms in on a small one.
    """
    by_digit = [scans.of(split, digit) for digit in range(10)]
    side, pages, labels = FIELD // 2, [], []
    for _ in range(LESSONS if split == "train" else HELD_OUT_LESSONS):
        ink, digits = np.zeros((side, 2 * side), np.float32), [rng.randrange(10), rng.randrange(10)]
        for column, digit in enumerate(digits):
            size = side if rng.random() < 0.5 else side * SMALL // (SMALL + 2 * MARGIN)
            spare = side - size
            left = column * side + max(0, min(spare, spare // 2 + rng.randint(-1, 1)))
            top = max(0, min(spare, spare // 2 + rng.randint(-1, 1)))
            ink[top : top + size, left : left + size] = _digit(scans, rng.choice(by_digit[digit]), size)
        pages.append(_on_paper(ink, rng.choice(list(COLOURS))))
        labels.append(digits)
    return pages, labels


def save_page(scans: Scans, page: DeskPage, split: Split, number: int, folder: Path) -> None:
    """Write a page's image and its thumbnail."""
    image = render(scans, page)
    image.save(folder / page_path(split, number))
    thumbnail(image).save(folder / thumbnail_path(split, number))


def page_path(split: Split, number: int) -> str:
    """Return a page's path relative to the data folder."""
    return f"images/{split}-{number:04d}.png"


def thumbnail_path(split: Split, number: int) -> str:
    """Return the path of a page's thumbnail relative to the data folder."""
    return f"images/{split}-{number:04d}-small.png"


def _digit(scans: Scans, scan: int, size: int) -> np.ndarray:
    """Return (size, size) float32 ink, from 0 to 1."""
    small = Image.fromarray(np.round(scans.images[scan] * 255).astype(np.uint8))
    return np.asarray(small.resize((size, size), Image.Resampling.BILINEAR), np.float32) / 255


def _on_paper(ink: np.ndarray, colour: str) -> Image.Image:
    paper = np.array(COLOURS[colour], np.float32)
    return Image.fromarray(np.round(paper + ink[..., None] * (255 - paper)).astype(np.uint8))
