"""Compose handwritten pages of a form and questions about them. Knows nothing of rows, tokenizers or training.

The handwriting is real: scikit-learn's copy of the UCI optdigits scans (8 x 8 grey levels, 43 writers). A page shows
a code digit and an amount digit side by side; an item is two to four pages and a question about one of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, Protocol

import numpy as np
from PIL import Image

FormLevel = Literal["easy", "yes_no", "lookup"]
Split = Literal["train", "val"]

NO_EVIDENCE = "no relevant information"
INSUFFICIENT = "insufficient to answer"

DIGIT_PIXELS = 28  # one merged vision token of Qwen2.5-VL is 28 x 28 pixels
FIRST_VALIDATION_SCAN = 1400  # scans before it are for training, the others for validation
MIN_PAGES, MAX_PAGES = 2, 4
UNANSWERABLE_SHARE = 0.15
YES_ABOVE = 4  # of the ten amounts half is above it

PAGES_PER_PAIR: dict[Split, int] = {"train": 30, "val": 4}  # distinct pages for each (code, amount)
TEACHING_COPIES = 2  # of each training page, when the tower learns to read


@dataclass(frozen=True, slots=True)
class Page:
    """One page: the digits it shows, and the scans (indices into the data set) that show them."""

    code: int
    amount: int
    code_scan: int
    amount_scan: int


class Asked(Protocol):
    """What a prompt is written from: an item of any job."""

    @property
    def pages(self) -> tuple[int, ...]:
        """Positions in the pool that the item was drawn from."""

    @property
    def question(self) -> str:
        """The question, with the page it is about."""

    @property
    def relevant(self) -> int | None:
        """Position of the page that answers; None when no page does."""


@dataclass(frozen=True, slots=True)
class Item:
    """A question over several pages.

    pages: positions in the pool that the item was drawn from.
    codes, amounts: what each page shows.
    relevant: position of the page that answers the question; None when no page does.
    is_yes_no: the answer is not the amount, but whether it is over `YES_ABOVE`.
    """

    pages: tuple[int, ...]
    codes: tuple[int, ...]
    amounts: tuple[int, ...]
    question: str
    relevant: int | None
    is_yes_no: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """What somebody took from an item's pages, rightly or not; `chosen` is the page they answer from, None abstains."""

    codes: tuple[int, ...]
    amounts: tuple[int, ...]
    chosen: int | None
    is_yes_no: bool = False


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

    def render(self, page: Page, jitter: Random | None = None) -> Image.Image:
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


def draw_pool(scans: Scans, split: Split, pages_per_pair: int, rng: Random) -> list[Page]:
    """Draw distinct pages, the same number for each of the hundred (code, amount) pairs, grouped by pair."""
    by_digit = [scans.of(split, digit) for digit in range(10)]
    pool = []
    for code in range(10):
        for amount in range(10):
            pairs: set[tuple[int, int]] = set()
            while len(pairs) < pages_per_pair:
                pairs.add((rng.choice(by_digit[code]), rng.choice(by_digit[amount])))
            pool += [Page(code, amount, left, right) for left, right in sorted(pairs)]
    return pool


def draw_item(pool: Sequence[Page], level: FormLevel, rng: Random) -> Item:
    """Draw two to four pages with different codes, and a question that one of them answers, or none.

    pool: pages as `draw_pool` orders them.
    level: "easy" names a page; "yes_no" asks whether its amount is over 4 (half of all misreadings answer rightly);
        "lookup" names a code, and the page must be found by reading.
    """
    num_pages = rng.randint(MIN_PAGES, MAX_PAGES)
    codes = tuple(rng.sample(range(10), num_pages))
    amounts = tuple(rng.randrange(10) for _ in range(num_pages))
    relevant = None if rng.random() < UNANSWERABLE_SHARE else rng.randrange(num_pages)
    page_number = 1 + (num_pages if relevant is None else relevant)
    if level == "easy":
        question = rng.choice([f"what amount is on page {page_number}?", f"amount of page {page_number}?"])
    elif level == "yes_no":
        question = f"is the amount on page {page_number} over {YES_ABOVE}?"
    else:
        absent = [code for code in range(10) if code not in codes]
        code = rng.choice(absent) if relevant is None else codes[relevant]
        question = rng.choice([f"what amount has code {code}?", f"amount of code {code}?"])
    per_pair = len(pool) // 100
    pages = tuple(
        (10 * code + amount) * per_pair + rng.randrange(per_pair) for code, amount in zip(codes, amounts, strict=True)
    )
    return Item(pages, codes, amounts, question, relevant, is_yes_no=level == "yes_no")


def true_reading(item: Item) -> Reading:
    """Read every page rightly and answer from the right one."""
    return Reading(item.codes, item.amounts, item.relevant, item.is_yes_no)


def teacher_reading(item: Item, noise: float, rng: Random) -> Reading:
    """Read as a teacher who errs, and who stays true to his own errors through the whole response.

    Each amount is replaced with probability `noise` by a random digit (one time in ten the right one), and with
    probability 0.6 `noise` the chosen page by a random one or none.
    """
    amounts = tuple(rng.randrange(10) if rng.random() < noise else amount for amount in item.amounts)
    chosen = item.relevant
    if rng.random() < 0.6 * noise:
        chosen = rng.choice([None, *range(len(item.pages))])
    return Reading(item.codes, amounts, chosen, item.is_yes_no)


def prompt_text(item: Asked) -> str:
    """Return the user message, as conf/prompt/demo.yaml has it."""
    from rsgrpo.data.prompts import render_template

    return render_template(_template(), item.question, len(item.pages))


@functools.cache
def _template() -> str:
    from recipes.answers.questions import named_prompt
    from rsgrpo.data.prompts import read_template

    return read_template(named_prompt("demo"))


def gold_text(reading: Reading) -> str:
    """Return the evidence and answer blocks, which rewards compare with."""
    return gold_blocks(_facts(reading), reading.chosen, _answer(reading))


def response_text(reading: Reading) -> str:
    """Return the whole four-block response that a reader with this reading writes.

    The observe block lists code and amount of every page in order, and cites no index.
    """
    observed = [f"{code} {amount}" for code, amount in zip(reading.codes, reading.amounts, strict=True)]
    return whole_response(observed, _facts(reading), reading.chosen, _answer(reading))


def gold_blocks(facts: Sequence[str], chosen: int | None, answer: str) -> str:
    """Return evidence and answer of somebody who answers from page `chosen`; None abstains, whatever `answer` is.

    facts: what each page shows.
    """
    slots = "\n".join(f"[{page + 1}]: {fact if page == chosen else NO_EVIDENCE}" for page, fact in enumerate(facts))
    return f"<evidence>\n{slots}\n</evidence>\n<answer>{INSUFFICIENT if chosen is None else answer}</answer>"


def whole_response(observed: Sequence[str], facts: Sequence[str], chosen: int | None, answer: str) -> str:
    """Return all four blocks; observed: what the observe block says of each page."""
    thought = "no page has it" if chosen is None else f"page {chosen + 1} has it"
    evidence, rest = gold_blocks(facts, chosen, answer).split("\n<answer>")
    return f"<observe>{', '.join(observed)}</observe>\n{evidence}\n<think>{thought}</think>\n<answer>{rest}"


def _facts(reading: Reading) -> list[str]:
    return [f"code {code} amount {amount}" for code, amount in zip(reading.codes, reading.amounts, strict=True)]


def _answer(reading: Reading) -> str:
    if reading.chosen is None:
        return ""
    amount = reading.amounts[reading.chosen]
    return ("yes" if amount > YES_ABOVE else "no") if reading.is_yes_no else str(amount)


class FormJob:
    """The demo's job at the levels easy, yes_no and lookup; see `recipes.demo.rows.Job`."""

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

    def gold(self, item: Item) -> str:
        """Return the right evidence and answer."""
        return gold_text(true_reading(item))

    def response(self, item: Item) -> str:
        """Return the whole right response."""
        return response_text(true_reading(item))

    def teacher_response(self, item: Item, noise: float, rng: Random) -> str:
        """Return the whole response of a teacher who errs."""
        return response_text(teacher_reading(item, noise, rng))

    def save_page(self, split: Split, page: int, path: Path) -> None:
        """Write a page's image file."""
        self._scans.render(self._pools[split][page]).save(path)

    def lessons(self, split: Split) -> tuple[list[Image.Image], list[list[int]]]:
        """Return pages and their two digits; those for training several times, each with its digits moved about."""
        train = split == "train"
        jitter = Random(f"{self._seed}/jitter") if train else None
        pool = (TEACHING_COPIES if train else 1) * self._pools[split]
        return [self._scans.render(page, jitter) for page in pool], [[page.code, page.amount] for page in pool]
