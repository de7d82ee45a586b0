"""The demo's levels easy, yes_no, two_hop and lookup: handwritten form pages and questions about them.

The handwriting is real: scikit-learn's copy of the UCI optdigits scans (8 x 8 grey levels, 43 writers). A page shows
a code digit and an amount digit side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
from PIL import Image

from recipes.demo.items import MAX_PAGES, MIN_PAGES, Item, Shown, Split, draw_relevant

FormLevel = Literal["easy", "yes_no", "two_hop", "lookup"]

DIGITS = "0123456789"
DIGIT_PIXELS = 28  # one merged vision token of Qwen2.5-VL is 28 x 28 pixels
FIRST_VALIDATION_SCAN = 1400  # scans before it are for training, the others for validation
YES_ABOVE = 4  # half of the ten amounts are above it
PAGES_PER_PAIR: dict[Split, int] = {"train": 30, "val": 4}  # distinct pages for each (code, amount)
TEACHING_COPIES = 2  # of each training page, when the tower learns to read


@dataclass(frozen=True, slots=True)
class FormPage:
    """One page: the digits it shows, and the scans (indices into the data set) that show them."""

    code: int
    amount: int
    code_scan: int
    amount_scan: int


class Scans:
    """The handwritten digits, split by index so that training and validation share none.

    images: (1797, 8, 8) float32, ink from 0 to 1. digits: (1797,) int64.
    """

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        self.images: np.ndarray = (bunch.images / 16.0).astype(np.float32)
        self.digits: np.ndarray = bunch.target.astype(np.int64)

    def of(self, split: Split, digit: int) -> list[int]:
        """Return the scans of one digit in one split."""
        indices = np.flatnonzero(self.digits == digit)
        in_split = indices < FIRST_VALIDATION_SCAN if split == "train" else indices >= FIRST_VALIDATION_SCAN
        return indices[in_split].tolist()

    def render(self, page: FormPage, jitter: Random | None = None) -> Image.Image:
        """Draw a page: 28 x 56 pixels, grey, white ink on black, code left and amount right.

        jitter: moves each digit by up to two pixels either way; None leaves it in the middle.
        """
        sheet = Image.new("L", (2 * DIGIT_PIXELS, DIGIT_PIXELS))
        for column, scan in enumerate((page.code_scan, page.amount_scan)):
            small = Image.fromarray(np.round(self.images[scan] * 255).astype(np.uint8))
            field = Image.new("L", (DIGIT_PIXELS, DIGIT_PIXELS))
            offset = (jitter.randint(-2, 2), jitter.randint(-2, 2)) if jitter else (0, 0)
            field.paste(small.resize(field.size, Image.Resampling.BILINEAR), offset)
            sheet.paste(field, (column * DIGIT_PIXELS, 0))
        return sheet


def draw_pool(scans: Scans, split: Split, pages_per_pair: int, rng: Random) -> list[FormPage]:
    """Draw distinct pages, the same number for each of the hundred (code, amount) pairs, grouped by pair."""
    by_digit = [scans.of(split, digit) for digit in range(10)]
    pool = []
    for code in range(10):
        for amount in range(10):
            pairs: set[tuple[int, int]] = set()
            while len(pairs) < pages_per_pair:
                pairs.add((rng.choice(by_digit[code]), rng.choice(by_digit[amount])))
            pool += [FormPage(code, amount, left, right) for left, right in sorted(pairs)]
    return pool


def draw_item(pool: Sequence[FormPage], level: FormLevel, rng: Random) -> Item:
    """Draw two to four pages with different codes, and a question that one or two of them answer, or none.

    pool: pages as `draw_pool` orders them.
    level: "easy" names a page; "yes_no" asks whether its amount is over 4 (half of all misreadings answer correctly);
        "two_hop" asks for the larger amount of two pages, which a misreading of the smaller one may leave right;
        "lookup" names a code, and the page must be found by reading.
    """
    num_pages = rng.randint(MIN_PAGES, MAX_PAGES)
    codes = rng.sample(range(10), num_pages)
    amounts = [rng.randrange(10) for _ in range(num_pages)]
    hops = 2 if level == "two_hop" else 1
    relevant = draw_relevant(num_pages, rng, hops)
    page_number = 1 + (relevant[0] if relevant else num_pages)
    if level == "easy":
        question = rng.choice([f"what amount is on page {page_number}?", f"amount of page {page_number}?"])
    elif level == "yes_no":
        question = f"is the amount on page {page_number} over {YES_ABOVE}?"
    elif level == "two_hop":
        one, other = relevant or rng.sample((rng.randrange(num_pages), num_pages), 2)
        question = f"which is larger, the amount on page {one + 1} or on page {other + 1}?"
    else:
        absent = [code for code in range(10) if code not in codes]
        code = codes[relevant[0]] if relevant else rng.choice(absent)
        question = rng.choice([f"what amount has code {code}?", f"amount of code {code}?"])
    per_pair = len(pool) // 100
    pairs = list(zip(codes, amounts, strict=True))
    pages = tuple((10 * code + amount) * per_pair + rng.randrange(per_pair) for code, amount in pairs)
    shown = tuple((str(code), str(amount)) for code, amount in pairs)
    return Item(pages, shown, question, relevant, ANSWERS.get(level, larger_amount), hops)


def larger_amount(shown: Sequence[Shown]) -> str:
    """Return the larger amount of the pages, which is the amount where there is one page."""
    return max((amount for _, amount in shown), key=int)


def is_over(shown: Sequence[Shown]) -> str:
    """Answer the question of level yes_no."""
    return "yes" if int(larger_amount(shown)) > YES_ABOVE else "no"


ANSWERS: dict[FormLevel, Callable[[Sequence[Shown]], str]] = {"yes_no": is_over}
"""How levels answer that do not ask for an amount."""


class FormJob:
    """Reads handwritten forms; see `recipes.demo.items.Job`."""

    fact = "code {} amount {}"
    misreadings: tuple[Sequence[str], Sequence[str]] = ("", DIGITS)
    tower_fact, tower_words = "digit_accuracy", "held-out pages' digits"
    num_labels = 10

    def __init__(self, level: FormLevel, seed: int) -> None:
        self._level = level
        self._seed = seed
        self._scans = Scans()
        self._pools = {
            split: draw_pool(self._scans, split, per_pair, Random(f"{seed}/pages/{split}"))
            for split, per_pair in PAGES_PER_PAIR.items()
        }

    def draw(self, split: Split, rng: Random) -> Item:
        """Draw an item."""
        return draw_item(self._pools[split], self._level, rng)

    def save_page(self, split: Split, page: int, path: Path) -> None:
        """Write a page's image file."""
        self._scans.render(self._pools[split][page]).save(path)

    def lessons(self, split: Split) -> tuple[list[Image.Image], list[list[int]]]:
        """Return pages and their two digits; training pages several times, with their digits moved about."""
        train = split == "train"
        jitter = Random(f"{self._seed}/jitter") if train else None
        pool = (TEACHING_COPIES if train else 1) * self._pools[split]
        return [self._scans.render(page, jitter) for page in pool], [[page.code, page.amount] for page in pool]
