"""Compose pages of easy-VQA, and questions about one of them: the demo's harder level.

The pages are the package `easy-vqa`'s own 64 x 64 images, each of one coloured shape, with its own questions, answers
and split. Knows nothing of files, tokenizers or training.
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

from recipes.demo.forms import MAX_PAGES, MIN_PAGES, UNANSWERABLE_SHARE, Split, gold_blocks, whole_response
from rsgrpo.errors import InputError

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

Kind = Literal["color", "shape", "yes or no"]
KINDS: tuple[Kind, ...] = ("color", "shape", "yes or no")


@dataclass(frozen=True, slots=True)
class Shape:
    """One page: its image file, what it shows, and the package's questions about it by kind."""

    file: str
    color: str
    shape: str
    questions: dict[Kind, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class ShapeItem:
    """A question over several pages.

    pages: positions in the pool that the item was drawn from. shown: (color, shape) of each.
    asked: the package's own question. question: the same, with the page that it is about.
    relevant: position of that page; None when there is no such page.
    """

    pages: tuple[int, ...]
    shown: tuple[tuple[str, str], ...]
    asked: str
    question: str
    relevant: int | None


@dataclass(frozen=True, slots=True)
class Question:
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
def read_question(text: str) -> Question:
    """Return what a question of the package asks for."""
    words = re.findall(r"[a-z]+", text)
    named = tuple(word for word in words if word in COLORS or word in SHAPES)
    if words[0] == "what":
        return Question("color" if "color" in words else "shape", named, False)
    return Question("yes or no", named, "not" in words or "no" in words)


@functools.cache
def shape_pool(split: Split) -> tuple[Shape, ...]:
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
            pool.append(Shape(files[image], color, shape, asked))
    return tuple(pool)


def draw_shapes(pool: Sequence[Shape], rng: Random) -> ShapeItem:
    """Draw two to four pages, and a question about one of them or about a page that is not there."""
    pages = tuple(rng.sample(range(len(pool)), rng.randint(MIN_PAGES, MAX_PAGES)))
    relevant = None if rng.random() < UNANSWERABLE_SHARE else rng.randrange(len(pages))
    asked_about = pool[rng.choice(pages) if relevant is None else pages[relevant]]
    asked = rng.choice(asked_about.questions[rng.choice(KINDS)])
    number = 1 + (len(pages) if relevant is None else relevant)
    shown = tuple((pool[page].color, pool[page].shape) for page in pages)
    return ShapeItem(pages, shown, asked, f"page {number}: {asked}", relevant)


class ShapeJob:
    """The demo's job at the level easy_vqa; see `recipes.demo.rows.Job`."""

    tower_fact, tower_words = "shape_accuracy", "held-out pages' color and shape"
    num_labels = len(COLORS) * len(SHAPES)

    def draw(self, split: Split, rng: Random) -> ShapeItem:
        """Draw an item."""
        return draw_shapes(shape_pool(split), rng)

    def gold(self, item: ShapeItem) -> str:
        """Return the right evidence and answer."""
        return gold_blocks(*_read(item, item.shown, item.relevant))

    def response(self, item: ShapeItem) -> str:
        """Return the whole right response."""
        return _whole(item, item.shown, item.relevant)

    def teacher_response(self, item: ShapeItem, noise: float, rng: Random) -> str:
        """Return the whole response of a teacher who errs, and stays true to his errors.

        Each colour and each shape is replaced with probability `noise` by a random one, and with probability 0.6
        `noise` the chosen page by a random one or none.
        """

        def read(word: str, words: Sequence[str]) -> str:
            return rng.choice(words) if rng.random() < noise else word

        shown = tuple((read(color, COLORS), read(shape, SHAPES)) for color, shape in item.shown)
        chosen = rng.choice([None, *range(len(item.pages))]) if rng.random() < 0.6 * noise else item.relevant
        return _whole(item, shown, chosen)

    def save_page(self, split: Split, page: int, path: Path) -> None:
        """Write a page's image file, the package's own bytes."""
        path.write_bytes(Path(shape_pool(split)[page].file).read_bytes())

    def lessons(self, split: Split) -> tuple[list[Image.Image], list[list[int]]]:
        """Return pages, and for each of their four merged vision tokens one label of color and shape."""
        pool = shape_pool(split)
        labels = [COLORS.index(page.color) * len(SHAPES) + SHAPES.index(page.shape) for page in pool]
        pages = []
        for page in pool:
            with Image.open(page.file) as image:
                pages.append(image.convert("RGB"))
        return pages, [[label] * 4 for label in labels]


def _whole(item: ShapeItem, shown: Sequence[tuple[str, str]], chosen: int | None) -> str:
    facts, chosen, answer = _read(item, shown, chosen)
    return whole_response(facts, facts, chosen, answer)


def _read(item: ShapeItem, shown: Sequence[tuple[str, str]], chosen: int | None) -> tuple[list[str], int | None, str]:
    """Return what each page is said to show, the page that is answered from, and the answer that follows."""
    answer = "" if chosen is None else read_question(item.asked).answer(*shown[chosen])
    return [f"{color} {shape}" for color, shape in shown], chosen, answer
