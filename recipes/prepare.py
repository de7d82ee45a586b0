"""Make, check or convert the files that runs read: `python -m recipes.prepare demo` writes the demo's data and model.

Owns the command line, the demo's layout on disk and that its folders are either whole or absent. What a page looks like
is `recipes.forms`, what the model is made of `recipes.tiny_model`, other people's files are `recipes.layouts`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from recipes.forms import (
    Item,
    Level,
    Page,
    Scans,
    Split,
    draw_item,
    draw_pool,
    gold_text,
    prompt_text,
    response_text,
    teacher_reading,
    true_reading,
)
from recipes.prepare_files import COMMANDS, add_file_commands
from recipes.whole_folder import is_whole, make_folder
from rollout.config import ConfigError
from rsgrpo.console import Console
from rsgrpo.errors import InputError, RsgrpoError

PAGES_PER_PAIR: dict[Split, int] = {"train": 30, "val": 4}  # distinct pages for each (code, amount)
TEACHING_COPIES = 2  # of each training page, each with its digits moved about, when the tower learns to read


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """What decides every byte of the demo's data and model.

    sft_items, train_items, val_items: rows of sft.jsonl, train.jsonl and val.jsonl.
    noise: how often the teacher of sft.jsonl misreads an amount; see `recipes.forms.teacher_reading`.
    vision_steps: optimiser steps in which the vision tower learns to read digits.
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
    wanted = asdict(settings)
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
            (
                "digits read",
                f"{model_facts['digit_accuracy']:.1%} of held-out pages' digits, by the vision tower",
            ),
            ("time", f"{time.monotonic() - started:.0f} s"),
            ("next", "python -m recipes.sft recipe=sft_demo"),
        ],
    )


def write_demo_data(settings: DemoSettings, folder: Path, console: Console) -> dict[str, Any]:
    """Write pages and rows into a folder in the layout of EVisRAG-Train; return counts."""
    scans = Scans()
    pools: dict[Split, list[Page]] = {
        split: draw_pool(scans, split, per_pair, Random(f"{settings.seed}/pages/{split}"))
        for split, per_pair in PAGES_PER_PAIR.items()
    }
    files: list[tuple[str, Split, int]] = [
        ("sft", "train", settings.sft_items),
        ("train", "train", settings.train_items),
        ("val", "val", settings.val_items),
    ]
    used: dict[Split, set[int]] = {"train": set(), "val": set()}
    with console.phase("rows", total=sum(count for _, _, count in files)) as bar:
        for name, split, count in files:
            with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
                for item_id, item, answer in draw_rows(settings, name, pools[split], count):
                    used[split].update(item.pages)
                    file.write(json.dumps(row_of(item_id, item, answer, split)) + "\n")
                    bar.advance()
    (folder / "images").mkdir()
    with console.phase("pages", total=sum(map(len, used.values()))) as bar:
        for split, positions in used.items():
            for position in sorted(positions):
                scans.render(pools[split][position]).save(folder / image_path(split, position))
                bar.advance()
    return {name: count for name, _, count in files} | {f"{split}_pages": len(used[split]) for split in used}


def draw_rows(settings: DemoSettings, name: str, pool: Sequence[Page], count: int) -> Iterator[tuple[str, Item, str]]:
    """Yield (id, item, answer column) of one file.

    sft: whole responses of the erring teacher. train: the right evidence and answer. val: whole right responses.
    """
    items, teacher = Random(f"{settings.seed}/items/{name}"), Random(f"{settings.seed}/teacher/{name}")
    for number in range(count):
        item = draw_item(pool, settings.level, items)
        if name == "train":  # rewards compare with the gold; a whole response is what supervised steps imitate
            answer = gold_text(true_reading(item))
        else:
            answer = response_text(
                teacher_reading(item, settings.noise, teacher) if name == "sft" else true_reading(item)
            )
        yield f"{name}-{number:05d}", item, answer


def row_of(item_id: str, item: Item, answer: str, split: Split) -> dict[str, Any]:
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


def write_demo_model(settings: DemoSettings, data: Path, folder: Path, console: Console) -> dict[str, Any]:
    """Make the tokenizer from the training rows and the model from random weights, teach its tower to read digits."""
    import torch
    import transformers
    from transformers import Qwen2VLImageProcessor

    from recipes.teach_vision import digit_accuracy, page_pixels, teach_digits
    from recipes.tiny_model import build_model, save_model_folder, train_tokenizer

    transformers.utils.logging.disable_progress_bar()  # it would tear the console's own bars
    with console.phase("tokenizer"):
        tokenizer = train_tokenizer(corpus(data))
        model = build_model(tokenizer, seed=settings.seed)
    scans = Scans()
    processor = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 64)

    def shown(split: Split, copies: int, jitter: Random | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pool = copies * draw_pool(scans, split, PAGES_PER_PAIR[split], Random(f"{settings.seed}/pages/{split}"))
        pixels, grid = page_pixels(processor, [scans.render(page, jitter) for page in pool])
        return pixels, torch.tensor([[page.code, page.amount] for page in pool]), grid

    with console.phase("vision tower", total=settings.vision_steps) as bar:
        pixels, digits, grid = shown("train", TEACHING_COPIES, Random(f"{settings.seed}/jitter"))
        head = teach_digits(
            model,
            pixels,
            digits,
            grid,
            num_steps=settings.vision_steps,
            seed=settings.seed,
            on_step=lambda _: bar.advance(),
        )
        accuracy = digit_accuracy(model, head, *shown("val", 1, None))
    save_model_folder(model, tokenizer, folder)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": len(tokenizer),
        "digit_accuracy": round(accuracy, 4),
    }


def corpus(data: Path) -> Iterator[str]:
    """Yield the texts that the demo's tokenizer is trained on: turns of the chat template and what stands in them."""
    yield from ["user\n", "assistant\n"]
    for name in ("sft", "train"):
        with open(data / f"{name}.jsonl", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                yield from row["prompt"].split("<image>")
                yield row["answer"]


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
    demo.add_argument("--noise", type=float, default=default.noise, help="how often the teacher misreads an amount")
    demo.add_argument(
        "--level",
        choices=["easy", "lookup"],
        default=default.level,
        help="easy: questions name a page; lookup: they name a code that must be found (not learnt in minutes)",
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
    except (RsgrpoError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
