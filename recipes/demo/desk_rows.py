"""The rows of `make desk-demo`: a question names a page by number or colour, and an expert looks it up at the desk.

Supervised rows are the expert's whole trajectories, through the same environment as training. The expert now and then
opens a wrong page or zooms in on the wrong corner, and recovers; those turns are read and not learnt. It also misreads
and answers without looking, which is learnt, so that reinforcement learning has something to put right.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from PIL import Image

from recipes.demo.desk_pages import (
    BOXES,
    COLOURS,
    DeskPage,
    Kind,
    draw_pages,
    lessons,
    page_path,
    save_page,
    thumbnail_path,
)
from recipes.demo.forms import DIGITS, Scans
from recipes.demo.items import Split
from recipes.demo.rows import write_rows
from recipes.retrieval.desk.environment import Desk
from rollout.files import read_jsonl
from rollout.inputs.images import bytes_of
from rollout.types import ImageSource, Prompt
from rsgrpo.data.prompts import render_template
from rsgrpo.records.console import Console

Names = Literal["number", "colour"]
TEMPLATE = "{numbered_marks}{question}"
MIN_PAGES, MAX_PAGES = 3, 4
SMALL_SHARE = 0.3  # of the questions whose amount is small
WRONG_PAGE, WRONG_CORNER = 0.25, 0.25  # how often the expert strays and recovers


@dataclass(frozen=True, slots=True)
class DeskItem:
    """A question. pages: positions in the split's list. asked: which of them is asked about."""

    pages: tuple[int, ...]
    asked: int
    question: str


class DeskJob:
    """Draws questions over the pages of a seed, and teaches the vision tower; see `recipes.demo.items.Job`."""

    tower_fact, tower_words, num_labels = "digit_accuracy", "held-out pages' digits", 10

    def __init__(self, seed: int, names: Names = "number") -> None:
        self.scans, self._seed, self._names = Scans(), seed, names
        self.pages: dict[Split, list[DeskPage]] = {}
        self._alike: dict[tuple[Split, str, Kind, int], list[int]] = {}
        splits: tuple[Split, ...] = ("train", "val")
        for split in splits:
            self.pages[split] = draw_pages(self.scans, split, Random(f"{seed}/desk/pages/{split}"))
            for number, page in enumerate(self.pages[split]):
                self._alike.setdefault((split, page.colour, page.kind, page.amount), []).append(number)

    def draw(self, split: Split, rng: Random) -> DeskItem:
        """Draw pages of different colours, and a question about the amount of one of them."""
        colours = rng.sample(list(COLOURS), rng.randint(MIN_PAGES, MAX_PAGES))
        pages = []
        for colour in colours:
            kind: Kind = rng.choice(list(BOXES)) if rng.random() < SMALL_SHARE else "plain"
            pages.append(rng.choice(self._alike[split, colour, kind, rng.randrange(10)]))
        asked = rng.randrange(len(pages))
        name = f"page {asked + 1}" if self._names == "number" else f"the {colours[asked]} page"
        question = rng.choice(["what amount is on {}?", "amount of {}?"])
        return DeskItem(tuple(pages), asked, question.format(name))

    def lessons(self, split: Split) -> tuple[list[Image.Image], list[list[int]]]:
        """Return small pages and their two digits."""
        return lessons(self.scans, split, Random(f"{self._seed}/desk/lessons/{split}"))


@dataclass(frozen=True, slots=True)
class Expert:
    """How often the expert errs: misreads an amount, answers without a look, or answers without the zoom it needs."""

    misreads: float
    guesses: float
    skips_zoom: float

    def turns(self, item: DeskItem, pages: Sequence[DeskPage], rng: Random) -> Iterator[tuple[str, bool]]:
        """Yield each turn and whether it is to be learnt.

        pages: those of the item, in order.
        """
        asked = pages[item.asked]
        sees = rng.random() >= self.guesses
        if sees:
            if rng.random() < WRONG_PAGE:
                others = [number for number in range(len(pages)) if number != item.asked]
                yield open_call(rng.choice(others)), False
            yield open_call(item.asked), True
            if asked.kind != "plain":
                sees = rng.random() >= self.skips_zoom
                if sees and rng.random() < WRONG_CORNER:
                    (other,) = [kind for kind in BOXES if kind != asked.kind]
                    yield zoom_call(item.asked, other), False
                if sees:
                    yield zoom_call(item.asked, asked.kind), True
        amount = str(asked.amount) if sees and rng.random() >= self.misreads else rng.choice(DIGITS)
        yield f"<answer>{amount}</answer>", True


def open_call(position: int) -> str:
    """Return what opens the page at a position."""
    return f"<open>{position + 1}</open>"


def zoom_call(position: int, kind: Kind) -> str:
    """Return what zooms in on a small amount."""
    return f"<zoom>{position + 1} {' '.join(map(str, BOXES[kind]))}</zoom>"


PERFECT = Expert(0.0, 0.0, 0.0)


def write_desk_rows(
    job: DeskJob, folder: Path, counts: dict[str, int], seed: int, expert: Expert, console: Console
) -> dict[str, Any]:
    """Write sft.jsonl, train.jsonl and val.jsonl, the pages they use and their thumbnails; return counts.

    counts: "sft", "train", "val" -> rows.
    """
    (folder / "images").mkdir()
    drawn: dict[str, list[DeskItem]] = {}
    used: dict[Split, set[int]] = {"train": set(), "val": set()}
    for name, count in counts.items():
        items = Random(f"{seed}/desk/items/{name}")
        drawn[name] = [job.draw(_split(name), items) for _ in range(count)]
        used[_split(name)].update(page for item in drawn[name] for page in item.pages)
    with console.phase("pages", total=sum(map(len, used.values()))) as bar:
        for split, numbers in used.items():
            for number in sorted(numbers):
                save_page(job.scans, job.pages[split][number], split, number, folder)
                bar.advance()
    with console.phase("rows", total=sum(counts.values())) as bar:
        for name, items_of in drawn.items():
            errs, who = Random(f"{seed}/desk/expert/{name}"), expert if name == "sft" else PERFECT
            rows = []
            for number, item in enumerate(items_of):
                row = _row(f"{name}-{number:05d}", item, job.pages[_split(name)], _split(name))
                turns = [] if name == "train" else _trajectory(row, item, job, _split(name), who, errs, folder)
                rows.append(row | ({"turns": turns} if turns else {}))
                bar.advance()
            write_rows(folder / f"{name}.jsonl", rows)
    return {**counts, **{f"{split}_pages": len(numbers) for split, numbers in used.items()}}


def _split(name: str) -> Split:
    return "val" if name == "val" else "train"


def _row(row_id: str, item: DeskItem, pages: Sequence[DeskPage], split: Split) -> dict[str, Any]:
    """Return a row. `pages`: what the desk opens; `gold_pages`, `gold_box`: what rewards compare with."""
    asked = pages[item.pages[item.asked]]
    row = {
        "id": row_id,
        "question": item.question,
        "prompt": render_template(TEMPLATE, item.question, len(item.pages)),
        "answer": str(asked.amount),
        "image": [thumbnail_path(split, page) for page in item.pages],
        "pages": [page_path(split, page) for page in item.pages],
        "gold_pages": [page_path(split, item.pages[item.asked])],
    }
    return row if asked.box is None else row | {"gold_box": list(asked.box)}


def _trajectory(
    row: dict[str, Any], item: DeskItem, job: DeskJob, split: Split, expert: Expert, errs: Random, folder: Path
) -> list[dict[str, Any]]:
    """Return an expert's turns with what the desk answered; crops are written beside the pages."""
    prompt = Prompt(row["id"], row["prompt"], truth=row)
    desk = Desk(prompt, folder=str(folder), box_scale=100)
    turns: list[dict[str, Any]] = []
    for text, learn in expert.turns(item, [job.pages[split][page] for page in item.pages], errs):
        turn: dict[str, Any] = {"turn": text} if learn else {"turn": text, "learn": False}
        if (reply := desk.step(text)) is not None:
            turn |= {"observation": reply.text, "images": [_named(image, folder) for image in reply.images]}
        turns.append(turn)
    return turns


def _named(image: ImageSource, folder: Path) -> str:
    """Return an image's path relative to the data folder; bytes are written there."""
    if isinstance(image, str):
        return os.path.relpath(image, folder)
    content = bytes_of(image)
    name = f"images/part-{hashlib.sha256(content).hexdigest()[:20]}.png"
    if not (folder / name).exists():
        (folder / name).write_bytes(content)
    return name


def desk_corpus(data: Path) -> Iterator[str]:
    """Yield the texts that the tokenizer is trained on."""
    yield from ["user\n", "assistant\n"]
    for _, row in read_jsonl(data / "sft.jsonl"):
        yield from row["prompt"].split("<image>")
        for turn in row["turns"]:
            yield turn["turn"]
            yield from turn.get("observation", "").split("<image>")
