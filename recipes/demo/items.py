"""Questions over several pages, the readers who answer them, and the texts that they write.

The jobs in `recipes.demo.forms` and `recipes.demo.shapes` decide what the pages show and what is asked about them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, Protocol

from PIL import Image

from rewards.evisrag import INSUFFICIENT, NO_EVIDENCE

Split = Literal["train", "val"]
DemoFamily = Literal["qwen2_5_vl", "qwen3_vl", "qwen3_5"]
"""Kinds of model that the demo can be made with."""
Shown = tuple[str, str]
"""The two things that a page shows: ("2", "5") on a form, ("teal", "circle") on a picture."""

MIN_PAGES, MAX_PAGES = 2, 4
UNANSWERABLE_SHARE = 0.15
STRAYS_PER_MISREADING = 0.6  # how often a teacher answers from random pages, relative to how often they misread
SLIPS_PER_MISREADING = 0.6  # the same of answers from one of several pages, with right evidence


@dataclass(frozen=True, slots=True)
class Item:
    """A question over several pages.

    pages: positions in the pool that the item was drawn from.
    shown: what each page shows.
    relevant: positions of the pages that answer the question together; empty when it cannot be answered.
    answer: maps what those pages show to the answer.
    hops: number of pages that the question is about, whether they exist or not.
    """

    pages: tuple[int, ...]
    shown: tuple[Shown, ...]
    question: str
    relevant: tuple[int, ...]
    answer: Callable[[Sequence[Shown]], str]
    hops: int = 1


@dataclass(frozen=True, slots=True)
class Reading:
    """What someone read on an item's pages, correctly or not, and what they make of it.

    chosen: the pages that they give as evidence; empty to abstain.
    used: those of them that they answer from.
    """

    shown: tuple[Shown, ...]
    chosen: tuple[int, ...]
    used: tuple[int, ...]


class Job(Protocol):
    """What the demo's model is asked to do.

    fact: format of what an evidence slot says of a page, with a place for each thing shown.
    misreadings: for each of the two things, what a teacher may misread it as; empty if always read correctly.
    tower_fact, tower_words: name of the vision tower's score in the manifest, and in the summary.
    num_labels: number of things that a merged vision token may show.
    """

    fact: str
    misreadings: tuple[Sequence[str], Sequence[str]]
    tower_fact: str
    tower_words: str
    num_labels: int

    def draw(self, split: Split, rng: Random) -> Item:
        """Draw an item."""

    def save_page(self, split: Split, page: int, path: Path) -> None:
        """Write the image file of a page of the pool."""

    def lessons(self, split: Split) -> tuple[list[Image.Image], list[list[int]]]:
        """Return pages of one size, and a label for each merged vision token of each page."""


def draw_relevant(num_pages: int, rng: Random, hops: int = 1) -> tuple[int, ...]:
    """Draw the pages that a question is about, in the order in which it names them; none if it has no answer."""
    if rng.random() < UNANSWERABLE_SHARE:
        return ()
    return (rng.randrange(num_pages),) if hops == 1 else tuple(rng.sample(range(num_pages), hops))


def true_reading(item: Item) -> Reading:
    """Read every page correctly and answer from the right ones."""
    return Reading(item.shown, item.relevant, item.relevant)


def teacher_reading(job: Job, item: Item, noise: float, rng: Random) -> Reading:
    """Read as a teacher who makes mistakes, and whose whole response follows from them.

    Each thing is replaced with probability `noise` by a random one of its kind (sometimes the right one), and with
    probability 0.6 `noise` the chosen pages by random ones or none. Of several chosen pages, only one is used with
    probability 0.6 `noise`: the evidence may be right then and the answer wrong.
    """

    def read(thing: str, misreadings: Sequence[str]) -> str:
        return rng.choice(misreadings) if misreadings and rng.random() < noise else thing

    first, second = job.misreadings
    shown = tuple((read(one, first), read(other, second)) for one, other in item.shown)
    chosen = item.relevant
    if rng.random() < STRAYS_PER_MISREADING * noise:
        chosen = rng.choice([(), *itertools.combinations(range(len(item.pages)), item.hops)])
    slips = len(chosen) > 1 and rng.random() < SLIPS_PER_MISREADING * noise
    return Reading(shown, chosen, (rng.choice(chosen),) if slips else chosen)


def prompt_text(item: Item) -> str:
    """Return the user message, rendered from conf/prompt/demo.yaml."""
    from rsgrpo.data.prompts import render_template

    return render_template(_template(), item.question, len(item.pages))


@functools.cache
def _template() -> str:
    from recipes.answers.questions import named_prompt
    from rsgrpo.data.prompts import read_template

    return read_template(named_prompt("demo"))


def evidence_slots(fact: str, reading: Reading) -> list[str]:
    """Return what the evidence block says of each page. fact: see `Job`."""
    return [fact.format(*shown) if page in reading.chosen else NO_EVIDENCE for page, shown in enumerate(reading.shown)]


def answer_text(item: Item, reading: Reading) -> str:
    """Return the answer that follows from a reading."""
    return item.answer([reading.shown[page] for page in reading.used]) if reading.used else INSUFFICIENT


def gold_text(job: Job, item: Item) -> str:
    """Return the evidence and answer blocks, which rewards compare with."""
    return _blocks(job, item, true_reading(item))


def response_text(job: Job, item: Item, reading: Reading) -> str:
    """Return the whole four-block response of a reader with this reading; the observe block cites no page."""
    observed = ", ".join(" ".join(shown) for shown in reading.shown)
    pages = " and ".join(f"page {page + 1}" for page in sorted(reading.used)) or "no page"
    thought = f"{pages} {'have' if len(reading.used) > 1 else 'has'} it"
    return f"<observe>{observed}</observe>\n" + _blocks(job, item, reading, f"<think>{thought}</think>\n")


def _blocks(job: Job, item: Item, reading: Reading, between: str = "") -> str:
    slots = "\n".join(f"[{page}]: {slot}" for page, slot in enumerate(evidence_slots(job.fact, reading), start=1))
    return f"<evidence>\n{slots}\n</evidence>\n{between}<answer>{answer_text(item, reading)}</answer>"
