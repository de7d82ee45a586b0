"""The demo's level easy_vqa: pages with a coloured shape and questions about one of them.

The pages are the package `easy-vqa`'s own 64 x 64 images, each of one coloured shape, with its own questions, answers
and split.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from PIL import Image

from recipes.demo.items import MAX_PAGES, MIN_PAGES, Item, Shown, Split, draw_relevant
from rollout.inputs.images import opened
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
    questions: dict[Kind, list[str]]


@functools.cache
def _words(question: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", question))


def kind_of(question: str) -> Kind:
    """Return what a question of the package asks for."""
    words = _words(question)
    return "yes or no" if "what" not in words else "color" if "color" in words else "shape"


def answer_to(question: str, color: str, shape: str) -> str:
    """Return the answer to a question of the package about a page that shows this.

    >>> answer_to("is there not a blue shape?", "teal", "circle")
    'yes'
    """
    kind, words = kind_of(question), _words(question)
    if kind == "yes or no":
        return "yes" if (color in words or shape in words) != _negates(words) else "no"
    return color if kind == "color" else shape


def _negates(words: Set[str]) -> bool:
    return not words.isdisjoint(("no", "not"))


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
        kind, words = kind_of(text), _words(text)
        questions[image][kind].append(text)
        if kind != "yes or no" or (answer == "yes") != _negates(words):
            facts[image] |= {answer, *words}
    pool = []
    for image in sorted(questions):
        color = next((word for word in COLORS if word in facts[image]), None)
        shape = next((word for word in SHAPES if word in facts[image]), None)
        if color and shape and len(questions[image]) == len(KINDS):
            pool.append(ShapePage(files[image], color, shape, questions[image]))
    return tuple(pool)


def draw_item(pool: Sequence[ShapePage], rng: Random) -> Item:
    """Draw two to four pages, and a question about one of them or about a page that is not there."""
    pages = tuple(rng.sample(range(len(pool)), rng.randint(MIN_PAGES, MAX_PAGES)))
    relevant = draw_relevant(len(pages), rng)
    asked_about = pool[pages[relevant[0]] if relevant else rng.choice(pages)]
    asked = rng.choice(asked_about.questions[rng.choice(KINDS)])
    number = 1 + (relevant[0] if relevant else len(pages))
    shown = tuple((pool[page].color, pool[page].shape) for page in pages)
    return Item(pages, shown, f"page {number}: {asked}", relevant, functools.partial(_answer, asked))


def _answer(question: str, shown: Sequence[Shown]) -> str:
    [(color, shape)] = shown
    return answer_to(question, color, shape)


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
            with opened(page.file) as image:
                pages.append(image.convert("RGB"))
        return pages, labels
