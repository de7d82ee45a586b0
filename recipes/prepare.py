"""Make, check or convert the files that runs read: `python -m recipes.prepare demo` writes the demo's data and model.

Owns the command line and the demo's settings. The questions are in `recipes.demo.forms` and `recipes.demo.shapes`,
the rows in `recipes.demo.rows`, the model in `recipes.demo.model`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from recipes.demo.forms import FormJob, Split
from recipes.demo.rows import Job, corpus, write_rows_and_pages
from recipes.demo.shapes import ShapeJob
from recipes.files.commands import COMMANDS, add_file_commands
from recipes.files.whole_folder import is_whole, make_folder
from rsgrpo.errors import InputError, RsgrpoError
from rsgrpo.records.console import Console

Level = Literal["easy", "yes_no", "lookup", "easy_vqa"]
JOBS: dict[Level, type[FormJob | ShapeJob]] = {
    "easy": FormJob,
    "yes_no": FormJob,
    "lookup": FormJob,
    "easy_vqa": ShapeJob,
}


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """What decides every byte of the demo's data and model.

    sft_items, train_items, val_items: rows of sft.jsonl, train.jsonl and val.jsonl.
    noise: how often the teacher of sft.jsonl misreads; see `recipes.demo.forms.teacher_reading`.
    vision_steps: optimiser steps in which the vision tower learns to read pages.
    """

    sft_items: int = 8000
    train_items: int = 2000
    val_items: int = 200
    seed: int = 0
    noise: float = 0.3
    level: Level = "easy"
    vision_steps: int = 200

    def __post_init__(self) -> None:
        for name in ("sft_items", "train_items", "val_items", "vision_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.noise <= 1:
            raise InputError(f"--noise is a probability, it must be in [0, 1], got {self.noise:g}")


def prepare_demo(settings: DemoSettings, out: Path, *, force: bool, console: Console) -> None:
    """Write `out/data` and `out/model`, or reuse what is there from the same settings; show a summary.

    Raises:
        InputError: a folder is there from other settings, or from something else, and `force` is not given.
    """
    started = time.monotonic()
    wanted, job = asdict(settings), JOBS[settings.level]
    data, model = out / "data", out / "model"
    for folder in (data, model):  # refuse before writing anything
        is_whole(folder, wanted, force=force)
    data_facts = make_folder(data, wanted, lambda target: write_demo_data(settings, target, console), force=force)
    model_facts = make_folder(
        model, wanted, lambda target: write_demo_model(settings, data, target, console), force=force
    )
    console.summary(
        "The demo is prepared",
        [
            ("data", f"{data} ({data_facts['state']})"),
            ("rows", f"{data_facts['sft']} sft, {data_facts['train']} train, {data_facts['val']} val"),
            ("pages", f"{data_facts['train_pages']} for training, {data_facts['val_pages']} held out"),
            ("model", f"{model} ({model_facts['state']})"),
            ("size", f"{model_facts['parameters'] / 1e6:.2f} M parameters, {model_facts['tokens']} tokens"),
            ("read rightly", f"{model_facts[job.tower_fact]:.1%} of {job.tower_words}, by the vision tower"),
            ("time", f"{time.monotonic() - started:.0f} s"),
            *next_commands(out),
        ],
    )


def next_commands(out: Path) -> list[tuple[str, str]]:
    """Return the commands that train on what is in `out`."""
    sft, train = "python -m recipes.sft recipe=sft_demo", "python -m rsgrpo.train recipe=demo"
    if out != Path("demo"):
        data = f"data.val={out}/data/val.jsonl"
        sft += f" output_dir={out} model.path={out}/model data.train={out}/data/sft.jsonl {data}"
        train += f" name={out.name} model.path={out}/sft/export data.train={out}/data/train.jsonl {data}"
    return [("next", sft), ("then", train)]


def job_of(settings: DemoSettings) -> Job:
    """Return what the demo's model is asked to do."""
    return ShapeJob() if settings.level == "easy_vqa" else FormJob(settings.level, settings.seed)


def write_demo_data(settings: DemoSettings, folder: Path, console: Console) -> dict[str, Any]:
    """Write pages and rows into a folder in the layout of EVisRAG-Train; return counts."""
    counts = {"sft": settings.sft_items, "train": settings.train_items, "val": settings.val_items}
    return write_rows_and_pages(
        job_of(settings), folder, counts, seed=settings.seed, noise=settings.noise, console=console
    )


def write_demo_model(settings: DemoSettings, data: Path, folder: Path, console: Console) -> dict[str, Any]:
    """Make the tokenizer from the training rows and the model from random weights, teach its tower to read."""
    import torch
    import transformers
    from transformers import Qwen2VLImageProcessor

    from recipes.demo.model import build_model, save_model_folder, train_tokenizer
    from recipes.demo.vision import page_pixels, reading_accuracy, teach_to_read

    transformers.utils.logging.disable_progress_bar()  # it would tear the console's own bars
    with console.phase("tokenizer"):
        tokenizer = train_tokenizer(corpus(data))
        model = build_model(tokenizer, seed=settings.seed)
    job = job_of(settings)
    processor = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 64)

    def lessons(split: Split) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pages, labels = job.lessons(split)
        pixels, grid = page_pixels(processor, pages)
        return pixels, torch.tensor(labels), grid

    with console.phase("vision tower", total=settings.vision_steps) as bar:
        head = teach_to_read(
            model,
            *lessons("train"),
            num_labels=job.num_labels,
            num_steps=settings.vision_steps,
            seed=settings.seed,
            on_step=lambda _: bar.advance(),
        )
        accuracy = reading_accuracy(model, head, *lessons("val"))
    save_model_folder(model, tokenizer, folder)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": len(tokenizer),
        job.tower_fact: round(accuracy, 4),
    }


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    top = argparse.ArgumentParser(prog="python -m recipes.prepare", description=__doc__.split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="handwritten form pages and a small model", formatter_class=formatter)
    default = DemoSettings()
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder that gets data/ and model/")
    demo.add_argument("--sft-items", type=int, default=default.sft_items, help="rows for the warm start")
    demo.add_argument("--train-items", type=int, default=default.train_items, help="rows for reinforcement learning")
    demo.add_argument("--val-items", type=int, default=default.val_items, help="held-out rows")
    demo.add_argument("--seed", type=int, default=default.seed, help="fixes every draw")
    demo.add_argument("--noise", type=float, default=default.noise, help="how often the teacher misreads a page")
    demo.add_argument(
        "--level",
        choices=sorted(JOBS),
        default=default.level,
        help="easy: questions name a page; yes_no: they ask if its amount is over 4; lookup: they name a code that "
        "must be found; easy_vqa: easy-VQA's questions about pages with a coloured shape (the last two are not learnt "
        "in minutes)",
    )
    demo.add_argument(
        "--vision-steps", type=int, default=default.vision_steps, help="steps that teach the vision tower to read"
    )
    demo.add_argument("--force", action="store_true", help="replace what is there")
    add_file_commands(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 1 also where rows cannot be used."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded: waiting threads must not spin
    options = vars(parser().parse_args(argv))
    command = options.pop("command")
    try:
        with Console() as console:
            if command != "demo":
                return COMMANDS[command](options, console)
            out, force = options.pop("out"), options.pop("force")
            prepare_demo(DemoSettings(**options), out, force=force, console=console)
    except RsgrpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
