"""The commands of `recipes.prepare` for existing files: unpack, validate, convert, and mini.

The work is done in `recipes.files.layouts`, `recipes.files.row_check` and `recipes.demo.evisrag_layout`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.answers.options import option_of
from recipes.files.whole_folder import MANIFEST, make_folder
from rollout.config import InputsConfig
from rollout.files import json_object
from rollout.keys import as_named, keys_of, named
from rsgrpo.data.foreign import TRAINERS
from rsgrpo.data.prompts import read_template
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console

if TYPE_CHECKING:
    from rsgrpo.config.train import RunConfig

OVERRIDE = re.compile(r"[+~]*[A-Za-z_][\w.]*=")
Run = Callable[[dict[str, Any], Console], int | None]
"""Runs a command with its options; returns the exit code, None for 0."""


def run_unpack(options: dict[str, Any], console: Console) -> int:
    """Write packed images to files."""
    from recipes.files.layouts import unpack

    out = options["out"] or options["folder"]
    with console.phase("images") as bar:
        done = unpack(options["folder"], out, bar.advance)
    for line in done.missing:
        console.info(f"no image for {line}")
    rows = [("images written", str(done.num_written)), ("already there", str(done.num_there))]
    rows += [("rows", str(done.num_rows)), ("missing images", str(len(done.missing))), ("folder", str(out))]
    console.summary("Unpacked", rows)
    return int(bool(done.missing))


VALIDATE_OPTIONS = {f"inputs.{name}": option_of(name) for name in keys_of(InputsConfig)} | {
    "data.image_dir": "--image-dir",
    "data.gold": "--gold",
}


@named(VALIDATE_OPTIONS)
def run_validate(options: dict[str, Any], console: Console) -> int:
    """Report each row that cannot be used, of a file or of both files of a recipe."""
    from rsgrpo.data.rows import open_rows

    run = _recipe(options)
    limits = {name: options.pop(name) for name in keys_of(InputsConfig)}
    given = {name: value for name, value in limits.items() if value is not None}
    inputs = InputsConfig(**given) if run is None else replace(run.inputs, **given)
    named_sources = options.pop("source")
    sources = named_sources or ([run.data.train, run.data.val] if run else [])
    if not sources:
        raise InputError("name a file to check, or a recipe (recipe=NAME) whose files are checked")
    for source in sources:
        open_rows(source)  # a missing file is noticed before the slow libraries are loaded
    from recipes.files.row_check import check_rows

    if run is not None and not options["model"] and Path(run.model.path).is_dir():
        options["model"] = run.model.path
    num_bad = 0
    for source in sources:
        with console.phase("rows") as bar:
            report = check_rows(source, inputs=inputs, run=run, progress=bar.update, **options)
        prefix = f"{source}: " if len(sources) > 1 else ""
        for line in report.lines():
            console.info(prefix + (as_named(line, VALIDATE_OPTIONS) if run is None else line))
        num_bad += len(report.bad)
    if not options["model"]:
        where = f" (model folder {run.model.path} does not exist)" if run else ""
        console.info(f"Tokens were not counted{where}. To count them, set --model.")
    return int(num_bad > 0)


def _recipe(options: dict[str, Any]) -> RunConfig | None:
    """Return the configuration of the overrides among the sources, which are taken out; None without any."""
    overrides = [source for source in options["source"] if OVERRIDE.match(source)]
    options["source"] = [source for source in options["source"] if source not in overrides]
    if not overrides:
        return None
    from rsgrpo import cli
    from rsgrpo.config.train import SftConfig, TrainConfig

    schema, config_name = (SftConfig, "sft") if options["purpose"] == "sft" else (TrainConfig, "config")
    return cli.compose_or_explain(schema, config_name, overrides)


def run_convert(options: dict[str, Any], console: Console) -> None:
    """Convert rows of another layout to ours."""
    from recipes.answers.questions import named_prompt
    from recipes.files.layouts import convert

    out, keep_good = options["out"], options["drop_bad"]
    template = read_template(named_prompt(options["row_prompt"]))
    limits = {"image_dir": options["image_dir"], "keep_good": keep_good, "trainer": options["trainer"]}
    done = convert(options["source"], out, template, **limits)
    for line in done.faults:
        console.info(line)
    if done.system:
        console.info(f"All rows have the system message {done.system!r}. Pass it to training as prompt.system=...")
    if not done.num_rows or (done.faults and not keep_good):
        raise InputError(
            f"{len(done.faults)} of {done.num_rows + len(done.faults)} rows cannot be converted, and nothing was "
            "written. Fix them, or leave them out with --drop-bad."
        )
    rows = [("rows", str(done.num_rows)), ("left out", str(len(done.faults))), ("file", str(out))]
    console.summary("Converted", [*rows, ("next", f"python -m recipes.prepare validate {out}")])


def run_settings(options: dict[str, Any], console: Console) -> None:
    """Translate the training yaml of another trainer into a recipe, check it, and write it or show it."""
    from recipes.files.trainer_yaml import open_points, translate, write_recipe

    found, out = translate(options["file"], options["override"]), options["out"]
    if out.suffix != ".yaml" or out.parent.name != "recipe":
        raise InputError(f"--out must be FOLDER/recipe/NAME.yaml, got {out}")
    undecided = open_points(found, out.stem)
    write_recipe(found, out)
    for key, value, why in found.left:
        console.info(f"no counterpart: {key}={value}: {why}")
    if undecided:
        console.info(f"to decide: {undecided}")
    rows = [("settings", str(len(found.groups) + len(found.keys))), ("no counterpart", str(len(found.left)))]
    run = f"python -m rsgrpo.plan --config-dir {out.parent.parent} recipe={out.stem}"
    console.summary("Translated", [*rows, ("file", str(out)), ("next", run)])


def run_harness(options: dict[str, Any], console: Console) -> None:
    """Write questions as a task of lmms-eval and as a table for VLMEvalKit."""
    from recipes.answers.questions import named_prompt, read_questions
    from recipes.files.harness_tasks import write_harness_tasks

    source, out, prompt = options["source"], options["out"], named_prompt(options["prompt"], options["model"])
    questions = read_questions(source, image_dir=options["image_dir"], need_answers=True)
    name = options["name"] or Path(source).stem
    with console.phase("questions", total=len(questions)) as bar:
        done = write_harness_tasks(
            questions, prompt, out, name=name, max_tokens=options["max_tokens"], advance=bar.advance
        )
    ask = f"lmms-eval --include_path {done.folder} --tasks {done.task} --log_samples"
    rows = [("questions", str(len(questions))), ("lmms-eval", ask), ("VLMEvalKit", str(done.table))]
    console.summary("Written for other harnesses", rows)


def run_mini(options: dict[str, Any], console: Console) -> None:
    """Write the demo's rows in EVisRAG's published layout, and two benchmarks."""
    from recipes.demo.evisrag_layout import write_mini

    data, out, force = options.pop("demo") / "data", options.pop("out"), options.pop("force")
    if not (data / MANIFEST).is_file():
        raise InputError(f"{data} does not exist. Run `python -m recipes.prepare demo` to make it.")
    if options["num_questions"] < 1:
        raise InputError(f"--num-questions must be >= 1, got {options['num_questions']}")
    made_from = json_object((data / MANIFEST).read_bytes(), str(data / MANIFEST))["settings"]
    facts = make_folder(
        out,
        options | {"demo": made_from},
        lambda folder: write_mini(data, folder, options["num_questions"], made_from["seed"]),
        force=force,
    )
    rows = [(name, f"{count} rows") for name, count in facts["rows"].items()]
    rows += [(f"{name}/images.parquet", f"{count} pages") for name, count in facts["images"].items()]
    console.summary(f"In EVisRAG's layout: {out} ({facts['state']})", rows)


def add_command(commands: Any, name: str, run: Run, meaning: str) -> argparse.ArgumentParser:
    """Add a command and return its parser."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=meaning)
    command.set_defaults(run=run)
    return command


def add_file_commands(commands: Any) -> None:
    """Add the commands for existing files."""
    unpack = add_command(commands, "unpack", run_unpack, "write the images of an images.parquet as files")
    unpack.add_argument("folder", type=Path, help="a folder with images.parquet and .jsonl files")
    unpack.add_argument("--out", type=Path, help="folder for images and rows (default: FOLDER itself)")

    check = add_command(commands, "validate", run_validate, "report each row that cannot be used")
    source_help = "a file, a folder or a hub id (org/name:split); or recipe=NAME key=value ..., as a run takes them"
    check.add_argument("source", metavar="FILE", nargs="+", help=source_help)
    purposes = ["grpo", "sft", "test"]
    check.add_argument("--for", dest="purpose", choices=purposes, default="grpo", help="what the rows are used for")
    prompt_help = "a name in conf/prompt or a file (default: the rows' own prompts, else evidence)"
    check.add_argument("--prompt", default="", help=prompt_help)
    check.add_argument("--image-dir", default="", help="folder that relative image paths start from")
    gold_help = "module:function that reads a row's gold answer, or rewards.gold:plain for plain ones"
    check.add_argument("--gold", default="", help=f"{gold_help} (default: the recipe's, else blocks of EVisRAG)")
    check.add_argument("--model", default="", help="folder or hub id of the model whose tokenizer counts tokens")
    for name, about in keys_of(InputsConfig).items():
        text = f"{about.help} Default: the recipe's, else {about.shown_default}."
        check.add_argument(option_of(name), type=type(about.default), default=None, help=text)

    convert = add_command(commands, "convert", run_convert, "convert a table, or the rows of another trainer, to ours")
    convert.add_argument(
        "source", metavar="FILE", type=Path, help=".csv, .tsv (VLMEvalKit's), .jsonl, .json or .parquet"
    )
    convert.add_argument("--out", type=Path, required=True, help="jsonl file to write")
    convert.add_argument("--image-dir", default="", help="folder that relative image paths start from")
    trainers_help = "whose rows they are (default: told by their columns)"
    convert.add_argument("--from", dest="trainer", choices=TRAINERS, default="", help=trainers_help)
    convert.add_argument("--row-prompt", default="evidence", help="prompt for rows that only have a question")
    convert.add_argument("--drop-bad", action="store_true", help="leave out rows that cannot be converted")

    meaning = "questions as a task of lmms-eval and a table for VLMEvalKit"
    harness = add_command(commands, "harness", run_harness, meaning)
    harness.add_argument("source", metavar="FILE", help="rows with question, image and answer, as recipes.infer reads")
    harness.add_argument("--out", type=Path, required=True, help="folder to write")
    harness.add_argument("--name", default="", help="of the data set (default: FILE's)")
    harness.add_argument("--image-dir", default="", help="folder that relative image paths start from")
    own_help = "a name in conf/prompt or a file (default: the model's own, else evidence)"
    harness.add_argument("--prompt", default="", help=own_help)
    harness.add_argument("--model", default="", help="model whose own prompt is used")
    harness.add_argument("--max-tokens", type=int, default=2048, help="longest answer, which lmms-eval asks for")

    settings = add_command(
        commands, "settings", run_settings, "turn a training yaml of EasyR1 or EVisRAG into a recipe"
    )
    settings.add_argument("file", metavar="YAML", type=Path, help="their training yaml")
    settings.add_argument("override", metavar="key=value", nargs="*", help="their overrides, which win over the file")
    settings.add_argument("--out", type=Path, required=True, help="recipe file to write, FOLDER/recipe/NAME.yaml")

    mini = add_command(commands, "mini", run_mini, "the demo's data in EVisRAG's layout")
    mini.add_argument("--demo", type=Path, default=Path("demo"), help="folder that `prepare demo` wrote")
    mini.add_argument("--out", type=Path, default=Path("evisrag-mini/hub"), help="folder to write")
    mini.add_argument("--num-questions", type=int, default=200, help="questions per benchmark")
    mini.add_argument("--force", action="store_true", help="replace an existing folder")
