"""The demo's rows and pages on disk, in the layout of EVisRAG-Train, whatever its job is.

Owns file names and columns. What a page shows, what is asked and who errs: `recipes.demo.forms`, `recipes.demo.shapes`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Protocol

from PIL import Image

from recipes.demo.forms import Asked, Split, prompt_text
from rsgrpo.records.console import Console


class Job(Protocol):
    """What the demo's model is asked to do.

    tower_fact, tower_words: what the manifest and the summary call what the vision tower learns to read.
    num_labels: how many things a merged vision token may show.
    """

    tower_fact: str
    tower_words: str
    num_labels: int

    def draw(self, split: Split, rng: Random) -> Any:
        """Draw an item, something like `recipes.demo.forms.Asked`."""

    def gold(self, item: Any) -> str:
        """Return the right evidence and answer, which rewards compare with."""

    def response(self, item: Any) -> str:
        """Return the whole right response."""

    def teacher_response(self, item: Any, noise: float, rng: Random) -> str:
        """Return the whole response of a teacher who errs."""

    def save_page(self, split: Split, page: int, path: Path) -> None:
        """Write a page's image file."""

    def lessons(self, split: Split) -> tuple[list[Image.Image], list[list[int]]]:
        """Return pages of one size, and a label for each merged vision token of each."""


def write_rows_and_pages(
    job: Job, folder: Path, counts: dict[str, int], *, seed: int, noise: float, console: Console
) -> dict[str, Any]:
    """Write sft.jsonl, train.jsonl and val.jsonl and the pages they use; return counts of rows and pages.

    counts: "sft", "train", "val" -> rows.
    """
    used: dict[Split, set[int]] = {"train": set(), "val": set()}
    with console.phase("rows", total=sum(counts.values())) as bar:
        for name, count in counts.items():
            split: Split = "val" if name == "val" else "train"
            with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
                for item_id, item, answer in draw_rows(job, name, split, count, seed=seed, noise=noise):
                    used[split].update(item.pages)
                    file.write(json.dumps(row_of(item_id, item, answer, split)) + "\n")
                    bar.advance()
    (folder / "images").mkdir()
    with console.phase("pages", total=sum(map(len, used.values()))) as bar:
        for split, positions in used.items():
            for position in sorted(positions):
                job.save_page(split, position, folder / image_path(split, position))
                bar.advance()
    return {**counts, **{f"{split}_pages": len(positions) for split, positions in used.items()}}


def draw_rows(
    job: Job, name: str, split: Split, count: int, *, seed: int, noise: float
) -> Iterator[tuple[str, Asked, str]]:
    """Yield (id, item, answer column) of one file.

    sft: whole responses of the erring teacher. train: the right evidence and answer. val: whole right responses.
    """
    items, teacher = Random(f"{seed}/items/{name}"), Random(f"{seed}/teacher/{name}")
    for number in range(count):
        item = job.draw(split, items)
        if name == "train":  # rewards compare with the gold; a whole response is what supervised steps imitate
            answer = job.gold(item)
        else:
            answer = job.teacher_response(item, noise, teacher) if name == "sft" else job.response(item)
        yield f"{name}-{number:05d}", item, answer


def row_of(item_id: str, item: Asked, answer: str, split: Split) -> dict[str, Any]:
    """Return one row with the columns of EVisRAG-Train."""
    row = {
        "id": item_id,
        "question": item.question,
        "prompt": prompt_text(item),
        "answer": answer,
        "image": [image_path(split, position) for position in item.pages],
    }
    return row if item.relevant is None else {**row, "page": item.relevant + 1}


def image_path(split: Split, position: int) -> str:
    """Return a page's path relative to the data folder."""
    return f"images/{split}-{position:04d}.png"


def corpus(data: Path) -> Iterator[str]:
    """Yield the texts that the demo's tokenizer is trained on: turns of the chat template and what stands in them."""
    yield from ["user\n", "assistant\n"]
    for name in ("sft", "train"):
        with open(data / f"{name}.jsonl", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                yield from row["prompt"].split("<image>")
                yield row["answer"]
