"""The demo's level easy_vqa: pages with a coloured shape and questions about one of them.

The pages are the package `easy-vqa`'s own 64 x 64 images, each of one coloured shape, with its own questions, answers
and split.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from PIL import Image

from recipes.demo.items import MAX_PAGES, MIN_PAGES, Item, Split, draw_relevant
from rsgrpo.errors import InputError

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

Kind = Literal["color", "shape", "yes or no"]
KINDS: tuple[Kind, ...] = ("color", "shape", "yes or no")


@dataclass(frozen=True, slots=True)
class ShapePage:
    """One page: its image file, what it shows, and the package's questions about it by kind."""

    file: str
    color: str
    shape: str
    questions: dict[Kind, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class ShapeQuestion:
    """What a question of the package asks for: its kind, the colours and shapes it names, and whether it negates."""

    kind: Kind
    named: tuple[str, ...]
    negated: bool

    def answer(self, color: str, shape: str) -> str:
        """Return the answer for a page that shows this.

        >>> read_question("is there not a blue shape?").answer("teal", "circle")
        'yes'
        """
        if self.kind == "yes or no":
            return "yes" if (self.named[0] in (color, shape)) != self.negated else "no"
        return color if self.kind == "color" else shape


@functools.cache
def read_question(text: str) -> ShapeQuestion:
    """Return what a question of the package asks for."""
    words = re.findall(r"[a-z]+", text)
    named = tuple(word for word in words if word in COLORS or word in SHAPES)
    if words[0] == "what":
        return ShapeQuestion("color" if "color" in words else "shape", named, False)
    return ShapeQuestion("yes or no", named, "not" in words or "no" in words)


@functools.cache
def shape_pool(split: Split) -> tuple[ShapePage, ...]:
    """Return the package's images of one split that its questions describe wholly and ask about in every way.

    Raises:
        InputError: the package is not installed.
    """
    try:
        import easy_vqa
    except ModuleNotFoundError as error:
        raise InputError('--level easy_vqa needs the package easy-vqa: pip install -e ".[demo]"') from error
    train = split == "train"
    rows = easy_vqa.get_train_questions() if train else easy_vqa.get_test_questions()
    files = easy_vqa.get_train_image_paths() if train else easy_vqa.get_test_image_paths()
    facts: dict[int, set[str]] = defaultdict(set)
    questions: dict[int, dict[Kind, list[str]]] = defaultdict(lambda: defaultdict(list))
    for text, answer, image in zip(*rows, strict=True):
        question = read_question(text)
        questions[image][question.kind].append(text)
        if question.kind != "yes or no":
            facts[image] |= {answer, *question.named}
        elif (answer == "yes") != question.negated:
            facts[image].update(question.named)
    pool = []
    for image in sorted(questions):
        color = next((word for word in COLORS if word in facts[image]), None)
        shape = next((word for word in SHAPES if word in facts[image]), None)
        if color and shape and len(questions[image]) == len(KINDS):
            asked = {kind: tuple(questions[image][kind]) for kind in KINDS}
            pool.append(ShapePage(files[image], color, shape, asked))
    return tuple(pool)


def draw_item(pool: Sequence[ShapePage], rng: Random) -> Item:
    """Draw two to four pages, and a question about one of them or about a page that is not there."""
    pages = tuple(rng.sample(range(len(pool)), rng.randint(MIN_PAGES, MAX_PAGES)))
    relevant = draw_relevant(len(pages), rng)
    asked_about = pool[rng.choice(pages) if relevant is None else pages[relevant]]
    asked = rng.choice(asked_about.questions[rng.choice(KINDS)])
    number = 1 + (len(pages) if relevant is None else relevant)
    shown = tuple((pool[page].color, pool[page].shape) for page in pages)
    return Item(pages, shown, f"page {number}: {asked}", relevant, read_question(asked).answer)


class ShapeJob:
    """Tells colours and shapes; see `recipes.demo.items.Job`."""

    fact = "{} {}"
    misreadings: tuple[Sequence[str], Sequence[str]] = (COLORS, SHAPES)
    tower_fact, tower_words = "shape_accuracy", "held-out pages' color and shape"
    num_labels = len(COLORS) * len(SHAPES)

    def draw(self, split: Split, rng: Random) -> Item:
        """Draw an item."""
        return draw_item(shape_pool(split), rng)

    def save_page(self, split: Split, page: int, path: Path) -> None:
        """Write a page's image file, the package's own bytes."""
        path.write_bytes(Path(shape_pool(split)[page].file).read_bytes())

    def lessons(self, split: Split) -> tuple[list[Image.Image], list[list[int]]]:
        """Return pages, and one label of color and shape for each of their four merged vision tokens."""
        pages, labels = [], []
        for page in shape_pool(split):
            labels.append([COLORS.index(page.color) * len(SHAPES) + SHAPES.index(page.shape)] * 4)
            with Image.open(page.file) as image:
                pages.append(image.convert("RGB"))
        return pages, labels
