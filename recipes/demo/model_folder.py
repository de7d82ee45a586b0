"""A demo's model folder: a tokenizer trained on its rows, random weights, and a vision tower taught to read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from recipes.demo.items import DemoFamily, Split
from rsgrpo.records.console import Console


class Teaches(Protocol):
    """What a vision tower is taught from; see `recipes.demo.items.Job`."""

    tower_fact: str
    num_labels: int

    def lessons(self, split: Split) -> tuple[list[Image.Image], list[list[int]]]:
        """Return pages of one size, and a label for each merged vision token of each page."""


def write_model(
    job: Teaches,
    texts: Iterable[str],
    folder: Path,
    *,
    seed: int,
    vision_steps: int,
    console: Console,
    family: DemoFamily = "qwen2_5_vl",
) -> dict[str, Any]:
    """Train the tokenizer on the texts, initialise a random model, and teach its vision tower to read."""
    import transformers

    from recipes.demo.families import build_demo_model, demo_image_processor, save_demo_model
    from recipes.demo.model import train_tokenizer
    from recipes.demo.vision import Lessons, reading_accuracy, teach_to_read

    transformers.utils.logging.disable_progress_bar()  # it would break up the console's own bars
    with console.phase("tokenizer"):
        tokenizer = train_tokenizer(texts)
        model = build_demo_model(family, tokenizer, seed)
        processor = demo_image_processor(family)
    with console.phase("vision tower", total=vision_steps) as bar:
        head = teach_to_read(
            model,
            Lessons.of(processor, *job.lessons("train")),
            num_labels=job.num_labels,
            num_steps=vision_steps,
            seed=seed,
            on_step=lambda _: bar.advance(),
        )
        accuracy = reading_accuracy(model, head, Lessons.of(processor, *job.lessons("val")))
    save_demo_model(family, model, tokenizer, folder)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": len(tokenizer),
        job.tower_fact: round(accuracy, 4),
    }
