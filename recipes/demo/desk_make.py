"""`python -m recipes.prepare desk`: rows, pages and model of `make desk-demo`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from recipes.answers.options import add_options, option_of
from recipes.demo.desk_rows import DeskJob, Expert, desk_corpus, write_desk_rows
from recipes.demo.model_folder import write_model
from recipes.files.commands import add_command
from recipes.files.whole_folder import make_folder, reusable
from rollout.keys import check, key, named
from rsgrpo.records.console import Console


@dataclass(frozen=True, slots=True)
class DeskSettings:
    """The settings that determine every byte of the desk demo's data and model."""

    sft_items: int = key(6000, "trajectories for the warm start", ge=1)
    train_items: int = key(2000, "rows for reinforcement learning", ge=1)
    val_items: int = key(200, "held-out rows", ge=1)
    seed: int = key(0, "seed of every random choice")
    noise: float = key(0.3, "how often the expert misreads an amount", ge=0, le=1)
    guesses: float = key(0.1, "how often it answers without opening a page", ge=0, le=1)
    skips_zoom: float = key(0.3, "how often it answers without the zoom that a small amount needs", ge=0, le=1)
    vision_steps: int = key(400, "optimizer steps that teach the vision tower to read pages", ge=1)

    def __post_init__(self) -> None:
        with named({field.name: option_of(field.name) for field in fields(self)}):
            check(self)


def add_desk(commands: Any) -> None:
    """Add the command."""
    command = add_command(commands, "desk", run_desk, "forms on coloured paper that a policy must look up, and a model")
    command.add_argument("--out", type=Path, default=Path("desk"), help="folder for data/ and model/")
    add_options(command, DeskSettings)
    command.add_argument("--force", action="store_true", help="replace existing folders")


def run_desk(options: dict[str, Any], console: Console) -> None:
    """Write data/ and model/, or reuse those made from the same settings; show a summary.

    Raises:
        InputError: a folder was made from other settings or by something else, and --force is not given.
    """
    started = time.monotonic()
    out, force = options.pop("out"), options.pop("force")
    settings, data, model = DeskSettings(**options), out / "data", out / "model"
    wanted = asdict(settings)
    for folder in (data, model):  # refuse before writing anything
        reusable(folder, wanted, force=force)
    job = DeskJob(settings.seed)
    rows = make_folder(data, wanted, lambda target: write_desk_data(settings, job, target, console), force=force)
    made = make_folder(
        model, wanted, lambda target: write_desk_model(settings, job, data, target, console), force=force
    )
    console.summary(
        "The desk demo is prepared",
        [
            ("data", f"{data} ({rows['state']})"),
            ("rows", f"{rows['sft']} sft, {rows['train']} train, {rows['val']} val"),
            ("pages", f"{rows['train_pages']} for training, {rows['val_pages']} held out"),
            ("model", f"{model} ({made['state']})"),
            ("size", f"{made['parameters'] / 1e6:.2f} M parameters, {made['tokens']} tokens"),
            ("reads", f"{made[job.tower_fact]:.1%} of {job.tower_words} correctly (the vision tower)"),
            ("time", f"{time.monotonic() - started:.0f} s"),
            ("next", "python -m recipes.sft recipe=sft_desk_demo"),
            ("then", "python -m rsgrpo.train recipe=desk_demo"),
        ],
    )


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
