"""Let a teacher write training rows: `python -m recipes.synthesize trajectories --in qa.jsonl --out sft.jsonl`.

Trajectories: the teacher answers questions whose answer is known; what is well formed and right is kept.
`retries.py` asks again; `page_questions.py` writes queries about pages.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from recipes.answers.at_desk import MAX_IMAGES, desk_turns
from recipes.answers.batch import rewrite
from recipes.answers.options import Parser
from recipes.answers.parsing import parse_strict
from recipes.answers.questions import Question, named_prompt, read_questions, to_prompt
from recipes.answers.types import Answerer
from recipes.files.layouts import portable_image
from recipes.infer import add_answerer_options, answerer_of
from recipes.retrieval.search.retriever import By
from recipes.synthesize.desk import DeskSynthesisConfig, synthesize_desk
from recipes.synthesize.page_questions import REQUEST, QueryConfig, read_pages, synthesize_queries
from recipes.synthesize.retries import KEPT, Line, RetryConfig, ask_and_report, fault_of
from rewards.api import Response
from rewards.evisrag import accuracy, well_formed
from rollout.keys import at_least
from rsgrpo.data.prompts import read_template
from rsgrpo.errors import InputError, run_program
from rsgrpo.records.console import Console

MALFORMED = "not the four blocks"
WRONG_SLOTS = "not one evidence slot per page"
WRONG = "wrong answer"
GROUNDLESS = "no page is evidence for the answer"


@dataclass(frozen=True, slots=True)
class SynthesisConfig:
    """How trajectories are requested, judged and written.

    template, system: what the teacher is asked.
    row_template: the user message of the rows, which the student will be asked.
    retries: how often to ask. min_accuracy: set-token F1, numbers strict, that counts as right.
    """

    template: str
    system: str
    row_template: str
    retries: RetryConfig
    min_accuracy: float = 1.0

    def __post_init__(self) -> None:
        at_least(0, **{"--min-accuracy": self.min_accuracy})
        if not self.row_template:
            raise InputError("--row-prompt needs a template to write each row's message from: choose another prompt")


def judge(question: Question, line: Line, min_accuracy: float = 1.0) -> str:
    """Return KEPT, or why a result line of `recipes.infer` is not a trajectory to learn from."""
    if fault := fault_of(line):
        return fault
    text = line["raw"].strip()
    response = Response(text, truth={"answers": list(question.answers)})
    if well_formed(response) < 1:
        return MALFORMED
    parsed = parse_strict(text, question.images)
    said = [slot.index for slot in parsed.evidence if slot.text]
    if said != list(range(1, len(question.images) + 1)):
        return WRONG_SLOTS
    score = accuracy(response, normalise="strict")
    if score is None or score < min_accuracy:
        return WRONG
    if question.images and not parsed.insufficient and not any(slot.relevant for slot in parsed.evidence):
        return GROUNDLESS
    return KEPT


def synthesize(
    questions: Sequence[Question], answerer: Answerer, config: SynthesisConfig, out: Path, console: Console
) -> dict[str, Any]:
    """Ask until each question has a kept trajectory or no try is left; write rows and report beside each other.

    `out` gets whole responses, for `recipes.sft`; OUT.grpo.jsonl accepted answers with the evidence, for
    `rsgrpo.train`; the other files, errors and the report are those of `ask_and_report`.
    """
    by_id = {question.id: question for question in questions}
    prompts = [to_prompt(question, config.template, config.system) for question in questions]

    def verdict(question_id: str, line: Line) -> str:
        return judge(by_id[question_id], line, config.min_accuracy)

    def write(kept: Mapping[str, Line], tried: dict[str, Any]) -> dict[str, Any]:
        write_rows(questions, {item: line["raw"].strip() for item, line in kept.items()}, config, out)
        return {"questions": len(questions), **tried}

    return ask_and_report(prompts, verdict, config.retries, answerer, out, console, write)


def write_rows(questions: Sequence[Question], kept: Mapping[str, str], config: SynthesisConfig, out: Path) -> None:
    """Write the rows of both files, in the order of the questions."""
    whole, gold = [], []
    for question in questions:
        if question.id in kept:
            text = kept[question.id]
            row = {
                "id": question.id,
                "question": question.question,
                "prompt": to_prompt(question, config.row_template).text,
                "image": [portable_image(source, out) for source in question.images],
            }
            slots = [slot.text for slot in parse_strict(text, question.images).evidence]
            whole.append(row | {"answer": text})
            gold.append(row | {"answer": list(question.answers), "evidence": slots})
    rewrite(out, whole)
    rewrite(out.with_suffix(".grpo.jsonl"), gold)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = Parser(prog="python -m recipes.synthesize", description=__doc__.split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_trajectories(
        commands.add_parser("trajectories", help="observe, evidence, think and answer for questions with answers")
    )
    _add_queries(commands.add_parser("queries", help="questions with answers about pages, to train a retriever on"))
    _add_desk(commands.add_parser("desk", help="look the answers up in a page store: search, open, zoom, answer"))
    return top


def _add_trajectories(command: argparse.ArgumentParser) -> None:
    what = command.add_argument_group("what to ask, and what to keep")
    what.add_argument("--in", dest="source", required=True, metavar="FILE", help="rows with question, image and answer")
    what.add_argument("--out", type=Path, required=True, help="jsonl of rows for recipes.sft")
    what.add_argument("--image-dir", default="", help="folder that the rows' image paths start from (default: FILE's)")
    what.add_argument("--prompt", default="evidence_example", help="what the teacher is asked: a name or a file")
    what.add_argument("--system", default="", help="system message for the teacher")
    what.add_argument("--row-prompt", default="evidence", help="the message of the rows: a name or a file")
    what.add_argument("--min-accuracy", type=float, default=1.0, help="set-token F1 that counts as right")
    _add_tries(what, tries=4, item="question")
    add_answerer_options(command)
    command.set_defaults(temperature=0.7, run=_trajectories)


def _add_queries(command: argparse.ArgumentParser) -> None:
    limits = QueryConfig()
    what = command.add_argument_group("what to ask, and what to keep")
    what.add_argument(
        "--in", dest="source", type=Path, required=True, metavar="PAGES", help="a store, or a folder of images"
    )
    what.add_argument("--out", type=Path, required=True, help="jsonl of pairs for recipes.train_retriever")
    what.add_argument("--prompt", type=Path, metavar="FILE", help="another request, with {max_pairs} in it")
    what.add_argument("--max-pairs", type=int, default=limits.max_pairs, help="questions per page")
    what.add_argument("--max-question", type=int, default=limits.max_question, help="characters of a question")
    what.add_argument("--max-answer", type=int, default=limits.max_answer, help="characters of an answer")
    _add_tries(what, tries=2, item="page")
    add_answerer_options(command)
    command.set_defaults(temperature=0.7, run=_queries)


def _add_desk(command: argparse.ArgumentParser) -> None:
    what = command.add_argument_group("what to ask, and what to keep")
    what.add_argument("--store", required=True, metavar="STORE", help="the page store that is searched")
    what.add_argument("--desk-by", choices=get_args(By), default="words", help="what finds pages there")
    what.add_argument("--in", dest="source", required=True, metavar="FILE", help="rows with question and answer")
    what.add_argument("--out", type=Path, required=True, help="jsonl of rows for recipes.sft")
    what.add_argument("--prompt", default="desk", help="the message of the teacher and of the rows: a name or a file")
    what.add_argument("--min-accuracy", type=float, default=1.0, help="set-token F1 that counts as right")
    _add_tries(what, tries=4, item="question")
    add_answerer_options(command)
    command.set_defaults(temperature=0.7, max_images=MAX_IMAGES, run=_desk)


def _desk(options: argparse.Namespace, retries: RetryConfig) -> None:
    at_least(0, **{"--min-accuracy": options.min_accuracy})
    template = read_template(named_prompt(options.prompt))
    turns = desk_turns(options.store, by=options.desk_by)
    config = DeskSynthesisConfig(template, turns, retries, options.min_accuracy)
    questions = [replace(question, images=()) for question in read_questions(options.source, need_answers=True)]
    _report(options, lambda answerer, console: synthesize_desk(questions, answerer, config, options.out, console))


def _add_tries(what: argparse._ArgumentGroup, *, tries: int, item: str) -> None:
    what.add_argument("--tries", type=int, default=tries, help=f"responses per {item} until one is kept")
    what.add_argument("--price-in", type=float, default=0.0, help="of a million prompt tokens, for the report")
    what.add_argument("--price-out", type=float, default=0.0, help="of a million response tokens")


def run(options: argparse.Namespace) -> None:
    """Do what the command line says."""
    if options.tries > 1 and options.temperature == 0:
        raise InputError("--tries > 1 asks again, and greedy sampling would repeat itself: set --temperature > 0")
    if options.requests_per_minute and not options.endpoint:
        raise InputError("--requests-per-minute limits an endpoint, and none is given")
    options.run(options, RetryConfig(options.tries, options.price_in, options.price_out))


def _trajectories(options: argparse.Namespace, retries: RetryConfig) -> None:
    prompt = named_prompt(options.prompt)
    config = SynthesisConfig(
        template=read_template(prompt),
        system=options.system or prompt.system,
        row_template=read_template(named_prompt(options.row_prompt)),
        retries=retries,
        min_accuracy=options.min_accuracy,
    )
    questions = read_questions(options.source, image_dir=options.image_dir, need_answers=True)
    _report(options, lambda answerer, console: synthesize(questions, answerer, config, options.out, console))


def _queries(options: argparse.Namespace, retries: RetryConfig) -> None:
    limits = {"max_pairs": options.max_pairs, "max_question": options.max_question, "max_answer": options.max_answer}
    try:
        request = options.prompt.read_text(encoding="utf-8") if options.prompt else REQUEST
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt {options.prompt} cannot be read: {error}") from error
    config = QueryConfig(**limits, request=request)
    pages = read_pages(options.source)
    _report(
        options, lambda answerer, console: synthesize_queries(pages, answerer, config, retries, options.out, console)
    )


def _report(options: argparse.Namespace, work: Callable[[Answerer, Console], dict[str, Any]]) -> None:
    """Do the work and show its report."""
    answerer = answerer_of(options)
    try:
        with Console(sys.stderr) as console:
            report = work(answerer, console)
            rows = [(name.replace("_", " "), _shown(value)) for name, value in report.items()]
            console.summary("Synthesised", [*rows, ("rows", str(options.out))])
    finally:
        answerer.close()


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} x {name}" for name, count in value.items()) or "none"
    return "unknown" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 2 for wrong input, 1 for a failure, 130 when stopped by Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    options = parser().parse_args(argv)
    return run_program(lambda: run(options), kept="responses so far are kept; run the same command to resume")
