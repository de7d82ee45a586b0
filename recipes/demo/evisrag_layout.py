"""The demo's form pages in EVisRAG's published layout: `python -m recipes.prepare mini`.

Writes EVisRAG-Train (jsonl files beside an `images.parquet`) from the demo's rows and pages, and two test benchmarks of
held-out pages: forms as in training, and worn copies of forms.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from recipes.demo.forms import FormJob, Scans, draw_item, draw_pool
from recipes.demo.items import Item, answer_text, evidence_slots, prompt_text, true_reading
from recipes.demo.rows import write_rows
from rollout.files import read_jsonl
from rsgrpo.data.image_packs import IMAGE_FILE

TRAIN = "EVisRAG-Train"
TRAIN_FILES = {"sft": "evidencecot_SFT", "train": "evidencecot_GRPO", "val": "test_GRPO"}
"""The demo's files, and what the same rows are called in EVisRAG-Train."""
TRAIN_COLUMNS = ("prompt", "answer", "image")
BENCHMARKS = {"EVisRAG-Test-Forms": False, "EVisRAG-Test-WornForms": True}
"""Benchmark -> whether its pages are worn: turned, shifted, faded and speckled, as no training page is."""
TEST_FILE = "top3_test.jsonl"
PROMPT_FILE = "prompt.txt"
TOPK = 3
PAGES_PER_PAIR = 4
MAX_TURN_DEGREES, MAX_SHIFT_PIXELS = 12.0, 3
INK, SPECKLE_STD = (0.55, 0.85), 0.12


def write_mini(demo_data: Path, out: Path, num_questions: int, seed: int) -> dict[str, dict[str, int]]:
    """Write EVisRAG-Train, the two benchmarks, and the prompt that the model is trained with, into `out`.

    demo_data: the folder that `recipes.prepare demo` wrote.
    num_questions: of each benchmark; both ask the same questions about the same pages, clean and worn.

    Returns:
        The counts of "rows" of each file, and of "images" of each folder.
    """
    rows: dict[str, int] = {}
    folder = out / TRAIN
    folder.mkdir(parents=True)
    used: set[str] = set()
    for name, published in TRAIN_FILES.items():
        lines = [row for _, row in read_jsonl(demo_data / f"{name}.jsonl")]
        used.update(path for line in lines for path in line["image"])
        write_rows(folder / f"{published}.jsonl", ({key: line[key] for key in TRAIN_COLUMNS} for line in lines))
        rows[published] = len(lines)
    write_images(folder / IMAGE_FILE, {path: (demo_data / path).read_bytes() for path in sorted(used)})
    images = {TRAIN: len(used)}
    scans = Scans()
    pool = draw_pool(scans, "val", PAGES_PER_PAIR, Random(f"{seed}/pages/benchmark"))
    draws, items = Random(f"{seed}/items/benchmark"), list[Item]()
    while len(items) < num_questions:
        item = draw_item(pool, "easy", draws)
        if len(item.pages) == TOPK:
            items.append(item)
    for name, worn in BENCHMARKS.items():
        folder = out / name
        folder.mkdir()
        write_rows(folder / TEST_FILE, (test_row(f"q{number:04d}", item) for number, item in enumerate(items)))
        pages = {position: scans.render(pool[position]) for item in items for position in item.pages}
        if worn:
            pages = {position: wear(page, Random(f"{seed}/wear/{position}")) for position, page in pages.items()}
        write_images(folder / IMAGE_FILE, {page_path(position): as_png(page) for position, page in pages.items()})
        rows[name], images[name] = len(items), len(pages)
    question = items[0].question
    (out / PROMPT_FILE).write_text(prompt_text(items[0]).replace(question, "{question}"), encoding="utf-8")
    return {"rows": rows, "images": images}


def test_row(row_id: str, item: Item) -> dict[str, Any]:
    """Return one row with the columns of EVisRAG-Test and the gold evidence, which the demo knows."""
    truth = true_reading(item)
    return {
        "qid": row_id,
        "query": item.question,
        "image": [page_path(position) for position in item.pages],
        "answer": [answer_text(item, truth)],
        "is_sufficient": bool(item.relevant),
        "evidence": evidence_slots(FormJob.fact, truth),
    }


def page_path(position: int) -> str:
    """Return the path under which a benchmark's rows and its images.parquet name a page."""
    return f"imgs/{position:04d}.png"


def wear(page: Image.Image, rng: Random) -> Image.Image:
    """Return a worn copy of a page: shifted, turned, its ink faded, its paper speckled. The same size, grey."""
    shift = (rng.randint(-MAX_SHIFT_PIXELS, MAX_SHIFT_PIXELS), rng.randint(-MAX_SHIFT_PIXELS, MAX_SHIFT_PIXELS))
    moved = page.rotate(rng.uniform(-MAX_TURN_DEGREES, MAX_TURN_DEGREES), Image.Resampling.BILINEAR, translate=shift)
    speckle = np.random.default_rng(rng.randrange(2**32)).normal(0.0, SPECKLE_STD, (page.height, page.width))
    ink = np.asarray(moved, dtype=np.float64) / 255 * rng.uniform(*INK) + speckle
    return Image.fromarray(np.round(ink.clip(0, 1) * 255).astype(np.uint8))


def as_png(page: Image.Image) -> bytes:
    """Return the compressed page."""
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return buffer.getvalue()


def write_images(path: Path, images: Mapping[str, bytes]) -> None:
    """Write an images.parquet: columns image ({bytes, path}) and path."""
    cells = [{"bytes": content, "path": name} for name, content in images.items()]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "path": list(images)}), path)
