"""What `recipes.prepare` does with files that are there: unpack, validate, convert, and pack the demo as EVisRAG is.

Owns these commands' options and what they show; the work is done in `recipes.files.layouts`,
`recipes.files.row_check` and `recipes.demo.evisrag_layout`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from recipes.files.whole_folder import MANIFEST, make_folder
from rollout.config import InputsConfig
from rollout.keys import named
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console

LIMITS = {
    "min_pixels": "--min-pixels",
    "max_pixels": "--max-pixels",
    "max_images": "--max-images",
    "max_prompt_tokens": "--max-prompt-tokens",
}


def run_unpack(options: dict[str, Any], console: Console) -> int:
    """Write packed images to files."""
    from recipes.files.layouts import unpack

    out = options["out"] or options["folder"]
    with console.phase("images") as bar:
        done = unpack(options["folder"], out, bar.advance)
    for line in done.missing:
        console.info(f"no image for {line}")
    rows = [("images written", str(done.num_written)), ("there already", str(done.num_there))]
    rows += [("rows", str(done.num_rows)), ("missing images", str(len(done.missing))), ("folder", str(out))]
    console.summary("Unpacked", rows)
    return int(bool(done.missing))


@named({f"inputs.{name}": option for name, option in LIMITS.items()})
def run_validate(options: dict[str, Any], console: Console) -> int:
    """Say row by row what cannot be used."""
    from recipes.files.row_check import validate_rows

    limits = [options[name] for name in LIMITS]
    with console.phase("rows") as bar:
        report = validate_rows(
            options["source"],
            options["purpose"],
            InputsConfig(*limits),
            prompt=options["prompt"],
            image_dir=options["image_dir"],
            model=options["model"],
            progress=bar.update,
        )
    for line in report.lines():
        console.info(line)
    if not options["model"]:
        console.info("tokens were not counted: give --model for that")
    return int(bool(report.bad))


def run_convert(options: dict[str, Any], console: Console) -> int:
    """Write other people's rows in our layout."""
    from recipes.answers.questions import named_prompt
    from recipes.files.layouts import convert
    from rsgrpo.data.prompts import read_template

    out, keep_good = options["out"], options["drop_bad"]
    template = read_template(named_prompt(options["row_prompt"]))
    done = convert(options["source"], out, template, image_dir=options["image_dir"], keep_good=keep_good)
    for line in done.faults:
        console.info(line)
    if done.system:
        console.info(f"all rows have the system message {done.system!r}; pass it to training: prompt.system=...")
    if not done.num_rows or (done.faults and not keep_good):
        total = done.num_rows + len(done.faults)
        raise InputError(
            f"{len(done.faults)} of {total} rows cannot be taken over, nothing is written; mend them, or leave them "
            "out with --drop-bad"
        )
    rows = [("rows", str(done.num_rows)), ("left out", str(len(done.faults))), ("file", str(out))]
    console.summary("Converted", [*rows, ("next", f"python -m recipes.prepare validate {out}")])
    return 0


def run_mini(options: dict[str, Any], console: Console) -> int:
    """Write the demo's rows as EVisRAG publishes its data, and two benchmarks."""
    from recipes.demo.evisrag_layout import write_mini

    demo, out, force = options.pop("demo"), options.pop("out"), options.pop("force")
    if not (demo / "data" / MANIFEST).is_file():
        raise InputError(f"{demo / 'data'} is not there: `python -m recipes.prepare demo` makes it")
    made_from = json.loads((demo / "data" / MANIFEST).read_text(encoding="utf-8"))["settings"]

    def fill(folder: Path) -> dict[str, Any]:
        packed = write_mini(demo / "data", folder, options["num_questions"], made_from["seed"])
        return {"rows": packed.rows, "images": packed.images}

    facts = make_folder(out, options | {"demo": made_from}, fill, force=force)
    rows = [(name, f"{count} rows") for name, count in facts["rows"].items()]
    rows += [(f"{name}/images.parquet", f"{count} pages") for name, count in facts["images"].items()]
    console.summary(f"In EVisRAG's layout: {out} ({facts['state']})", rows)
    return 0


def add_file_commands(commands: Any) -> None:
    """Add what is done with files that are there: unpack, validate, convert, mini."""
    formatter, limits = argparse.ArgumentDefaultsHelpFormatter, InputsConfig()
    unpack = commands.add_parser("unpack", help="images.parquet to image files", formatter_class=formatter)
    unpack.add_argument("folder", type=Path, help="a folder with images.parquet and .jsonl files")
    unpack.add_argument("--out", type=Path, help="folder that gets images and rows (default: FOLDER itself)")
    check = commands.add_parser("validate", help="say row by row what cannot be used", formatter_class=formatter)
    check.add_argument("source", metavar="FILE", help="a file, a folder or a hub id: see docs/howto/data.md")
    check.add_argument(
        "--for", dest="purpose", choices=["grpo", "sft", "test"], default="grpo", help="what rows are for"
    )
    check.add_argument("--prompt", default="", help="a name in conf/prompt or a file; the rows' own, else evidence")
    check.add_argument("--image-dir", default="", help="folder that the rows' image paths start from")
    check.add_argument("--model", default="", help="folder or hub id whose tokenizer counts tokens")
    for name, option in LIMITS.items():
        check.add_argument(option, type=int, default=getattr(limits, name), help=f"inputs.{name}")
    convert = commands.add_parser(
        "convert", help="own questions, or sharegpt and alpaca files, to rows", formatter_class=formatter
    )
    convert.add_argument("source", metavar="FILE", type=Path, help=".csv, .jsonl, .json or .parquet")
    convert.add_argument("--out", type=Path, required=True, help="jsonl to write")
    convert.add_argument("--image-dir", default="", help="folder that the rows' image paths start from")
    convert.add_argument("--row-prompt", default="evidence", help="the message of rows that bring a bare question")
    convert.add_argument("--drop-bad", action="store_true", help="write the others where rows cannot be taken over")
    mini = commands.add_parser("mini", help="the demo's data in EVisRAG's layout", formatter_class=formatter)
    mini.add_argument("--demo", type=Path, default=Path("demo"), help="folder that `prepare demo` wrote")
    mini.add_argument("--out", type=Path, default=Path("evisrag-mini/hub"), help="folder to write")
    mini.add_argument("--num-questions", type=int, default=200, help="of each benchmark")
    mini.add_argument("--force", action="store_true", help="replace what is there")


COMMANDS = {"unpack": run_unpack, "validate": run_validate, "convert": run_convert, "mini": run_mini}
