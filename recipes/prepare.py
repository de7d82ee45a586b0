"""Make, check or convert the files that runs read: `python -m recipes.prepare demo` writes the demo's data and model.

The demo's questions are in `recipes.demo.forms` and `recipes.demo.shapes`, its rows in `recipes.demo.rows` and its
model in `recipes.demo.model`; the commands for existing files are in `recipes.files.commands`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from recipes.answers.options import Parser, add_options, option_of
from recipes.demo.desk_make import DeskSettings, write_desk_data, write_desk_model
from recipes.demo.desk_rows import DeskJob
from recipes.demo.forms import FormJob
from recipes.demo.items import DemoFamily, Job
from recipes.demo.model_folder import write_model
from recipes.demo.rows import corpus, write_rows_and_pages
from recipes.demo.shapes import ShapeJob
from recipes.files.commands import add_command, add_file_commands
from recipes.files.whole_folder import make_folder, reusable
from rollout.errors import run_program
from rollout.keys import check, key, named
from rsgrpo.records.console import Console

Level = Literal["easy", "yes_no", "two_hop", "lookup", "easy_vqa"]
LEVELS: dict[Level, str] = {
    "easy": "questions name a page",
    "yes_no": "they ask whether its amount is over 4",
    "two_hop": "they ask for the larger amount of two pages",
    "lookup": "they name a code that must be found",
    "easy_vqa": "easy-VQA's questions about pages with a coloured shape (slow to learn, as is lookup)",
}


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """The settings that determine every byte of the demo's data and model."""

    sft_items: int = key(8000, "rows for the warm start", ge=1)
    train_items: int = key(2000, "rows for reinforcement learning", ge=1)
    val_items: int = key(200, "held-out rows", ge=1)
    seed: int = key(0, "seed of every random choice")
    noise: float = key(0.3, "how often the teacher misreads a page", ge=0, le=1)
    level: Level = key("easy", "; ".join(f"{level}: {meaning}" for level, meaning in LEVELS.items()))
    vision_steps: int = key(200, "optimizer steps that teach the vision tower to read pages", ge=1)
    family: DemoFamily = key("qwen2_5_vl", "kind of model; qwen3_5 is the one whose layers mostly carry a state")

    def __post_init__(self) -> None:
        with named({field.name: option_of(field.name) for field in fields(self)}):
            check(self)

    def job(self) -> Job:
        """Return what the demo's model is asked to do."""
        return ShapeJob() if self.level == "easy_vqa" else FormJob(self.level, self.seed)


def run_demo(options: dict[str, Any], console: Console) -> None:
    """Write data/ and model/, or reuse those made from the same settings; show a summary.

    Raises:
        InputError: a folder was made from other settings or by something else, and --force is not given.
    """
    started = time.monotonic()
    out, force = options.pop("out"), options.pop("force")
    settings, data, model = DemoSettings(**options), out / "data", out / "model"
    job = settings.job()
    wanted = asdict(settings)
    family = wanted.pop("family")
    kind = {} if family == "qwen2_5_vl" else {"family": family}
    reusable(data, wanted, force=force)  # refuse before writing anything
    reusable(model, wanted | kind, force=force)
    rows = make_folder(data, wanted, lambda target: write_demo_data(settings, target, console), force=force)
    made = make_folder(
        model,
        wanted | kind,
        lambda target: write_model(
            job, corpus(data), target,
            seed=settings.seed, vision_steps=settings.vision_steps, console=console, family=settings.family,
        ),
        force=force,
    )  # fmt: skip
    console.summary(
        "The demo is prepared",
        [
            ("data", f"{data} ({rows['state']})"),
            ("rows", f"{rows['sft']} sft, {rows['train']} train, {rows['val']} val"),
            ("pages", f"{rows['train_pages']} for training, {rows['val_pages']} held out"),
            ("model", f"{model} ({made['state']})"),
            ("size", f"{made['parameters'] / 1e6:.2f} M parameters, {made['tokens']} tokens"),
            ("reads", f"{made[job.tower_fact]:.1%} of {job.tower_words} correctly (the vision tower)"),
            ("time", f"{time.monotonic() - started:.0f} s"),
            *next_commands(out),
        ],
    )


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
    job = DeskJob(settings.seed, settings.names)
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


def next_commands(out: Path) -> list[tuple[str, str]]:
    """Return the commands that train on the demo in `out`."""
    sft, train = "python -m recipes.sft recipe=sft_demo", "python -m rsgrpo.train recipe=demo"
    if out != Path("demo"):
        data = f"data.val={out}/data/val.jsonl"
        sft += f" output_dir={out} model.path={out}/model data.train={out}/data/sft.jsonl {data}"
        train += f" name={out.name} model.path={out}/sft/export data.train={out}/data/train.jsonl {data}"
    return [("next", sft), ("then", train)]


def write_demo_data(settings: DemoSettings, folder: Path, console: Console) -> dict[str, Any]:
    """Write pages and rows into a folder in the layout of EVisRAG-Train; return counts."""
    counts = {"sft": settings.sft_items, "train": settings.train_items, "val": settings.val_items}
    return write_rows_and_pages(settings.job(), folder, counts, settings.seed, settings.noise, console)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = Parser(prog="python -m recipes.prepare", description=__doc__.split("\n")[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    demo = add_command(commands, "demo", run_demo, "handwritten form pages and a small model")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for data/ and model/")
    add_options(demo, DemoSettings)
    demo.add_argument("--force", action="store_true", help="replace existing folders")
    desk = add_command(
        commands, "desk", run_desk, "forms that a policy must look up at the page desk, and a small model"
    )
    desk.add_argument("--out", type=Path, default=Path("desk"), help="folder for data/ and model/")
    add_options(desk, DeskSettings)
    desk.add_argument("--force", action="store_true", help="replace existing folders")
    add_file_commands(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code, which is 1 if rows cannot be used."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded: waiting threads must not spin
    options = vars(parser().parse_args(argv))
    run = options.pop("run")

    def work() -> int | None:
        with Console() as console:
            return run(options, console)

    return run_program(work, extras={"sklearn": "demo", "easy_vqa": "demo"})


if __name__ == "__main__":
    sys.exit(main())
