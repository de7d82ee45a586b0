"""Pairs of pages and their content in words: `python -m benchmarks.retrieval.forms --pages forms`.

forms: a page shows two scanned digits, a code and an amount; its query says them. 100 held-out pages, one for each
content. easy_vqa: a page shows two images of the package easy-vqa side by side, each of one coloured shape; 100
held-out pages of different contents among 576. Held-out pages are of scans and images that training never sees.
Afterwards:

    python -m recipes.train_retriever recipe=forms
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from PIL import Image

from recipes.demo.forms import Scans, draw_pool
from recipes.demo.items import Split
from recipes.demo.shapes import ShapePage, shape_pool

PER_CONTENT: dict[Split, int] = {"train": 30, "val": 1}  # forms
NUM_PAGES: dict[Split, int] = {"train": 3_000, "val": 100}  # easy_vqa
NAMES: dict[Split, str] = {"train": "train", "val": "held_out"}


def forms(split: Split, rng: Random) -> Iterator[tuple[str, Image.Image]]:
    """Yield queries and pages of handwritten forms."""
    scans = Scans()
    for page in draw_pool(scans, split, PER_CONTENT[split], rng):
        yield f"code {page.code} amount {page.amount}", scans.render(page)


def two_shapes(split: Split, rng: Random) -> Iterator[tuple[str, Image.Image]]:
    """Yield queries and pages of two easy-VQA images each; those that are held out differ in content."""
    pool = shape_pool(split)
    seen: set[str] = set()
    while len(seen) < NUM_PAGES[split]:
        left, right = rng.choice(pool), rng.choice(pool)
        query = f"{left.color} {left.shape}, {right.color} {right.shape}"
        page = query if split == "val" else f"{left.file} {right.file}"
        if page not in seen:
            seen.add(page)
            yield query, side_by_side(left, right)


def side_by_side(left: ShapePage, right: ShapePage) -> Image.Image:
    """Return a page of two images."""
    images = [Image.open(shape.file).convert("RGB") for shape in (left, right)]
    page = Image.new("RGB", (images[0].width + images[1].width, images[0].height))
    page.paste(images[0], (0, 0))
    page.paste(images[1], (images[0].width, 0))
    return page


def main() -> None:
    """Write train.jsonl and held_out.jsonl with their pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", choices=("forms", "easy_vqa"), default="forms")
    parser.add_argument("--out", type=Path, default=Path("demo/retrieval"))
    options = parser.parse_args()
    rng = Random(0)
    for split, name in NAMES.items():
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        pages = forms(split, rng) if options.pages == "forms" else two_shapes(split, rng)
        for number, (query, page) in enumerate(pages):
            page.save(folder / f"{number:05d}.png")
            rows.append({"query": query, "image": f"{name}/{number:05d}.png"})
        (options.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{len(rows)} pairs: {options.out / name}.jsonl")


if __name__ == "__main__":
    main()
