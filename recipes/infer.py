"""Answer questions over page images: `python -m recipes.infer "how much?" --image a.png --model runs/x/export`.

One question, several about the same pages (each asked on its own), or a file of questions.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, get_args

from recipes.answers.at_desk import MAX_IMAGES, desk_turns
from recipes.answers.batch import answer_batch, result_line
from recipes.answers.conversations import open_conversing
from recipes.answers.options import Parser, option_of
from recipes.answers.questions import Question, named_prompt, read_questions, to_prompt
from recipes.answers.reader import Reader
from recipes.answers.spec import (
    MADE_BY,
    AnswerModelConfig,
    AnswerRolloutConfig,
    AnswerSpec,
    EndpointConfig,
    pixel_limits,
)
from recipes.answers.types import Answer, Answerer
from recipes.retrieval.search.retriever import By
from rollout.config import InputsConfig
from rollout.errors import printable
from rollout.keys import as_named, keys_of, named
from rollout.types import Observation
from rsgrpo.config.checks import require_model
from rsgrpo.data.foreign import IMAGE_MARK
from rsgrpo.data.prompt_file import prompt_of_model
from rsgrpo.data.prompts import read_template
from rsgrpo.errors import InputError, RsgrpoError, run_program
from rsgrpo.records.console import Console

SECTIONS: dict[str, type[Any]] = {
    "model": AnswerModelConfig,
    "endpoint": EndpointConfig,
    "rollout": AnswerRolloutConfig,
    "inputs": InputsConfig,
}
"""The parts of an `AnswerSpec`; a command line has a group of options for each."""
OPTIONS = {f"{section}.{name}": option_of(name) for section, schema in SECTIONS.items() for name in keys_of(schema)} | {
    "model.path": "--model",
    "endpoint.url": "--endpoint",
    "endpoint.model": "--model",
    "rollout.max_response_tokens": "--max-tokens",
    "rollout.max_batch_sequences": "--batch-size",
}
"""Key of the configuration -> the option that sets it; its type, default and help are the key's."""
HELP = (
    "A question, which is asked on its own, without the earlier ones; or: /images A.png B.png ... other pages; "
    "/json shows the last answer as JSON; /quit"
)


class Session:
    """A terminal at which questions about the same pages are answered one after another.

    images: the pages that questions are about; may be replaced.
    """

    def __init__(self, reader: Reader, images: Sequence[str], out: IO[str]) -> None:
        self.images = tuple(images)
        self._reader = reader
        self._out = out
        self._num_asked = 0

    def ask(self, question: str, *, show: bool = True) -> dict[str, Any]:
        """Answer one question, showing the text as it is written where the answerer can; return its result line."""
        self._num_asked += 1
        streamed = False
        piece: str | Observation | Answer = ""
        for piece in self._reader.steps(question, self.images, name=f"question-{self._num_asked}"):
            if show and not isinstance(piece, Answer):
                streamed = True
                self._out.write(printable(piece if isinstance(piece, str) else step_of(piece)))
                self._out.flush()
        assert isinstance(piece, Answer)
        line = result_line(piece, self._reader.answerer.name)
        if show:
            self._out.write("\n" if streamed else f"{printable(written(piece))}\n" if piece.text else "")
            self._out.write(f"{printable(summary_of(line))}\n")
            self._out.flush()
        return line


def step_of(observation: Observation) -> str:
    """Return what an environment answered, indented below the turn that it answers."""
    lines = observation.text.replace(IMAGE_MARK, " (image)").splitlines()
    return "".join(f"\n    {line}" for line in lines) + (f" [{observation.fault}]" if observation.fault else "") + "\n"


def written(answer: Answer) -> str:
    """Return a whole answer, with what an environment answered between its turns."""
    parts, start = [], 0
    for observation in answer.observations or ():
        parts += [answer.text[start : observation.at_char].rstrip("\n"), step_of(observation)]
        start = observation.at_char
    return "".join([*parts, answer.text[start:].lstrip("\n") if parts else answer.text])


def summary_of(line: dict[str, Any]) -> str:
    """Return the few lines that stand under an answer: the answer, the pages it rests on, and what is wrong."""
    if line["finish_reason"] == "error":
        return as_named(f"error: {line['errors'][0]}", OPTIONS)
    pages = [
        f"  [{slot['index']}] {slot['image'] or ''}: {slot['text']}" for slot in line["evidence"] if slot["relevant"]
    ]
    parts = [f"answer: {line['answer']}" + (" (the pages are insufficient)" if line["insufficient"] else "")]
    parts += ["evidence:", *pages] if pages else []
    if line["finish_reason"] == "length":
        parts.append("cut off at the token limit: raise --max-tokens")
    parts += [f"fault: {fault}" for fault in line["errors"]]
    return as_named("\n".join(parts), OPTIONS)


def converse(session: Session, lines: IO[str], out: IO[str], *, prompts_user: bool) -> None:
    """Answer questions line by line until the input ends or says /quit."""
    last: dict[str, Any] | None = None
    if prompts_user:
        out.write(f"{HELP}\n")
    while True:
        if prompts_user:
            out.write("> ")
            out.flush()
        line = lines.readline()
        text = line.strip()
        if not line or text == "/quit":
            return
        try:
            if text.startswith("/images"):
                session.images = tuple(checked_images(text.split()[1:], hint=""))
            elif text == "/json":
                out.write(f"{json.dumps(last, ensure_ascii=False, indent=2)}\n")
            elif text.startswith("/"):
                out.write(f"unknown command {text.split()[0]}\n{HELP}\n")
            elif text:
                last = session.ask(text)
        except RsgrpoError as error:
            out.write(as_named(f"error: {error}\n", OPTIONS))


def checked_images(
    paths: Sequence[str], hint: str = " (on the command line, put the question before --image)"
) -> Sequence[str]:
    """Return the paths.

    Raises:
        InputError: one is not a file.
    """
    folders = [path for path in paths if os.path.isdir(path)]
    if folders:
        raise InputError(f"{folders[0]} is a folder. Name the images in it, such as {folders[0]}/*.png")
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise InputError(f"no such image: {', '.join(missing)}{hint}")
    return paths


def run_batch(options: argparse.Namespace, reader: Reader) -> None:
    """Answer a file of questions."""
    out = options.out or Path(options.batch.replace(":", ".").rstrip("/")).with_suffix(".answers.jsonl")
    inputs = InputsConfig(**inputs_of(options))
    questions = read_questions(options.batch, image_dir=options.image_dir, inputs=inputs)
    prompts = [to_prompt(question, reader.template, reader.system) for question in questions]
    with Console(sys.stderr) as console:
        summary = answer_batch(prompts, reader.answerer, out, share_equal=options.temperature == 0, console=console)
        console.summary(
            "Answered",
            [
                ("questions", str(len(questions))),
                ("asked", str(summary.asked)),
                ("same as another", str(summary.shared)),
                ("answered earlier", str(summary.reused)),
                ("failed", str(summary.failed)),
                ("answers", str(out)),
            ],
        )


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = Parser(prog="python -m recipes.infer", description=__doc__)
    top.add_argument(
        "question", nargs="?", help="one question; without it and without --batch, questions are read line by line"
    )
    what = top.add_argument_group("what to ask")
    what.add_argument("--question", dest="named_question", help="the same as QUESTION, by name")
    what.add_argument(
        "--image",
        "--images",
        nargs="+",
        action="extend",
        default=[],
        help="the pages, in order; put the question before it",
    )
    add_desk_options(what)
    what.add_argument("--batch", metavar="FILE", help="questions: rows with id, question and image")
    what.add_argument("--image-dir", default="", help="folder that the rows' image paths start from (default: FILE's)")
    what.add_argument("--out", type=Path, help="jsonl of answers (default: beside FILE, as NAME.answers.jsonl)")
    prompt_help = "a name in conf/prompt or a template file (default: the model's own, else evidence)"
    what.add_argument("--prompt", default="", help=prompt_help)
    what.add_argument(
        "--show-inputs",
        metavar="FOLDER",
        nargs="?",
        const="",
        help="ask nothing: print what the model sees of the question; with FOLDER, write its pages there",
    )
    what.add_argument("--system", default="", help="system message; the default is the prompt's, else the model's")
    what.add_argument("--json", action="store_true", help="print the result of one question as one JSON line")
    add_answerer_options(top)
    return top


def add_desk_options(what: argparse._ArgumentGroup) -> None:
    """Add the options with which `answerer_of` lets the model look for its pages."""
    what.add_argument(
        "--desk", metavar="STORE", default="", help="let the model look for its pages in this page store, step by step"
    )
    what.add_argument("--desk-by", choices=get_args(By), default="words", help="what finds pages there")


def add_answerer_options(top: argparse.ArgumentParser) -> None:
    """Add the options that `answerer_of` reads."""
    titles = {
        "model": "the model",
        "endpoint": "a server instead of it, which knows its model as --model",
        "rollout": "how it answers",
        "inputs": "limits of a prompt",
    }
    groups = {section: top.add_argument_group(title) for section, title in titles.items()}
    for key, option in OPTIONS.items():
        section, _, name = key.partition(".")
        about = keys_of(SECTIONS[section])[name]
        text = as_named(about.help, OPTIONS).replace("%", "%%")
        if key == "endpoint.model":
            continue  # --model, once more
        if about.default is False:
            groups[section].add_argument(option, action="store_true", help=text)
            continue
        default = about.default
        if name in ("min_pixels", "max_pixels"):
            text, default = f"{text} Default: what an exported model was trained with, else {default:,}.", None
        kind, choices = type(about.default), about.one_of or None
        groups[section].add_argument(option, type=kind, choices=choices, default=default, help=text)
    groups["rollout"].add_argument("--seed", type=int, default=0, help="Seed of the sampling.")


@named(OPTIONS)
def answerer_of(options: argparse.Namespace) -> Answerer:
    """Open what the command line chooses."""
    settings: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, option in OPTIONS.items():
        section, _, name = key.partition(".")
        settings[section][name] = getattr(options, option.removeprefix("--").replace("-", "_"))
    if not options.endpoint:
        settings["endpoint"]["model"] = ""
    settings["inputs"] = inputs_of(options)
    if desk := getattr(options, "desk", ""):
        settings["rollout"]["turns"] = desk_turns(desk, by=options.desk_by)
        settings["inputs"]["max_images"] = max(MAX_IMAGES, settings["inputs"]["max_images"])
    parts = {section: SECTIONS[section](**given) for section, given in settings.items()}
    return open_conversing(AnswerSpec(**parts, seed=options.seed))


def show(options: argparse.Namespace, template: str, system: str) -> int:
    """Print what the model sees of one question, or of the first one of a file; no weights are loaded."""
    from recipes.answers.shown_inputs import show_inputs
    from rollout.inputs.processor import InputProcessor

    require_model("model.path", options.model, MADE_BY)
    if options.batch:
        inputs = InputsConfig(**inputs_of(options))
        question = read_questions(options.batch, image_dir=options.image_dir, inputs=inputs)[0]
    elif options.question:
        question = Question("question", options.question, tuple(options.image))
    else:
        raise InputError("--show-inputs needs a question, or --batch, whose first question is shown")
    inputs = InputsConfig(**inputs_of(options))
    processor = InputProcessor(
        options.model, inputs, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    folder = Path(options.show_inputs) if options.show_inputs else None
    for line in show_inputs(to_prompt(question, template, system), processor, folder):
        print(as_named(line, OPTIONS))
    return 0


def inputs_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the limits of a prompt; those of pixels default to what the model was trained with."""
    limits = {name: getattr(options, name) for name in keys_of(InputsConfig)}
    for name, own in zip(("min_pixels", "max_pixels"), pixel_limits(options.model), strict=True):
        limits[name] = limits[name] or own
    return limits


def default_prompt(options: argparse.Namespace) -> str:
    """Return the prompt of --desk for a model that does not bring one; "" leaves the choice to `named_prompt`."""
    return "desk" if options.desk and not prompt_of_model(options.model) else ""


def answer(options: argparse.Namespace) -> int:
    """Do what the command line says; return the exit code."""
    images = checked_images(options.image)
    prompt = named_prompt(options.prompt or default_prompt(options), options.model)
    template, system = read_template(prompt), options.system or prompt.system
    if options.batch and (options.question or options.image):
        raise InputError("--batch brings its own questions and pages: omit the question and --image")
    if not options.batch and not template:
        raise InputError(
            f"--prompt {options.prompt or prompt.file} has no template for a question: choose another prompt"
        )
    if options.show_inputs is not None:
        return show(options, template, system)
    reader = Reader(answerer_of(options), template, system)
    try:
        if options.batch:
            run_batch(options, reader)
            return 0
        session = Session(reader, images, sys.stdout)
        if not options.question:
            reader.answerer.start()  # so that the first question does not wait for it
            converse(session, sys.stdin, sys.stdout, prompts_user=sys.stdin.isatty())
            return 0
        line = session.ask(options.question, show=not options.json)
        if options.json:
            print(json.dumps(line, ensure_ascii=False))
        return int(line["finish_reason"] == "error")
    finally:
        reader.answerer.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 2 for wrong input, 1 for a failure, 130 when stopped by Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    top = parser()
    options = top.parse_args(argv)
    if options.question and options.named_question:
        top.error("the question is given twice: as QUESTION and as --question")
    options.question = options.question or options.named_question
    kept = "answers so far are kept; run the same command to resume" if options.batch else ""
    with_own_names = named(OPTIONS)(answer)
    return run_program(lambda: with_own_names(options), kept=kept)


if __name__ == "__main__":
    sys.exit(main())
