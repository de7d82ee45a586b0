"""The demo's rows and pages on disk, in the layout of EVisRAG-Train."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from recipes.demo.items import Item, Job, Split, gold_text, prompt_text, response_text, teacher_reading, true_reading
from rollout.files import read_jsonl
from rsgrpo.records.console import Console


def write_rows_and_pages(
    job: Job, folder: Path, counts: dict[str, int], seed: int, noise: float, console: Console
) -> dict[str, Any]:
    """Write sft.jsonl, train.jsonl and val.jsonl and the pages they use; return counts of rows and pages.

    counts: "sft", "train", "val" -> rows.
    """
    used: dict[Split, set[int]] = {"train": set(), "val": set()}
    with console.phase("rows", total=sum(counts.values())) as bar:
        for name, count in counts.items():
            split: Split = "val" if name == "val" else "train"
            items, teacher = Random(f"{seed}/items/{name}"), Random(f"{seed}/teacher/{name}")
            rows = []
            for number in range(count):
                item = job.draw(split, items)
                used[split].update(item.pages)
                rows.append(_row(f"{name}-{number:05d}", item, split, _answer(job, item, name, noise, teacher)))
                bar.advance()
            write_rows(folder / f"{name}.jsonl", rows)
    (folder / "images").mkdir()
    with console.phase("pages", total=sum(map(len, used.values()))) as bar:
        for split, positions in used.items():
            for position in sorted(positions):
                job.save_page(split, position, folder / image_path(split, position))
                bar.advance()
    return {**counts, **{f"{split}_pages": len(positions) for split, positions in used.items()}}


def _answer(job: Job, item: Item, name: str, noise: float, teacher: Random) -> str:
    """Return the answer column of a row of one file.

    sft: the whole response of a teacher who makes mistakes. train: the right evidence and answer, which rewards compare
    with. val: the whole right response, on which supervised steps measure their loss too.
    """
    if name == "train":
        return gold_text(job, item)
    return response_text(job, item, teacher_reading(job, item, noise, teacher) if name == "sft" else true_reading(item))


def _row(row_id: str, item: Item, split: Split, answer: str) -> dict[str, Any]:
    """Return one row with the columns of EVisRAG-Train."""
    row = {
        "id": row_id,
        "question": item.question,
        "prompt": prompt_text(item),
        "answer": answer,
        "image": [image_path(split, position) for position in item.pages],
    }
    if item.hops > 1:
        return {**row, "pages": [page + 1 for page in item.relevant]}
    return {**row, "page": item.relevant[0] + 1} if item.relevant else row


def image_path(split: Split, position: int) -> str:
    """Return a page's path relative to the data folder."""
    return f"images/{split}-{position:04d}.png"


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def corpus(data: Path) -> Iterator[str]:
    """Yield the texts that the demo's tokenizer is trained on: the chat template's turns and what they hold."""
    yield from ["user\n", "assistant\n"]
    for name in ("sft", "train"):
        for _, row in read_jsonl(data / f"{name}.jsonl"):
            yield from row["prompt"].split("<image>")
            yield row["answer"]
