"""What `python -m recipes.prepare desk` makes: rows, pages and model of `make desk-demo`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from recipes.answers.options import option_of
from recipes.demo.desk_rows import DeskJob, Expert, Names, desk_corpus, write_desk_rows
from recipes.demo.model_folder import write_model
from rollout.keys import check, key, named
from rsgrpo.records.console import Console


@dataclass(frozen=True, slots=True)
class DeskSettings:
    """The settings that determine every byte of the desk demo's data and model."""

    sft_items: int = key(3000, "trajectories for the warm start", ge=1)
    train_items: int = key(1000, "rows for reinforcement learning", ge=1)
    val_items: int = key(200, "held-out rows", ge=1)
    seed: int = key(0, "seed of every random choice")
    names: Names = key("number", "what questions name a page by; colour must be seen on thumbnails (slow to learn)")
    noise: float = key(0.3, "how often the expert misreads an amount", ge=0, le=1)
    guesses: float = key(0.1, "how often it answers without opening a page", ge=0, le=1)
    skips_zoom: float = key(0.3, "how often it answers without the zoom that a small amount needs", ge=0, le=1)
    vision_steps: int = key(400, "optimizer steps that teach the vision tower to read pages", ge=1)

    def __post_init__(self) -> None:
        with named({field.name: option_of(field.name) for field in fields(self)}):
            check(self)


def write_desk_data(settings: DeskSettings, job: DeskJob, folder: Path, console: Console) -> dict[str, Any]:
    """Write rows and pages into a folder; return counts."""
    counts = {"sft": settings.sft_items, "train": settings.train_items, "val": settings.val_items}
    expert = Expert(settings.noise, settings.guesses, settings.skips_zoom)
    return write_desk_rows(job, folder, counts, settings.seed, expert, console)


def write_desk_model(
    settings: DeskSettings, job: DeskJob, data: Path, folder: Path, console: Console
) -> dict[str, Any]:
    """Train the tokenizer and the vision tower; return facts."""
    texts, steps = desk_corpus(data), settings.vision_steps
    return write_model(job, texts, folder, seed=settings.seed, vision_steps=steps, console=console)
