"""Let a teacher write training rows: `python -m recipes.synthesize trajectories --in qa.jsonl --out sft.jsonl`.

The teacher answers questions whose answer is known; what is well formed and right is kept. Owns the judgement, the rows
and the report; asking, and going on after a stop, is `recipes.batch`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.answering import Answerer
from recipes.batch import answer_batch, read_lines, rewrite
from recipes.infer import INTERRUPTED, add_answerer_options, answerer_of
from recipes.layouts import portable_image
from recipes.parsing import parse_strict
from recipes.questions import Question, named_prompt, read_questions, to_prompt
from rewards.api import Response
from rewards.evisrag import accuracy, well_formed
from rollout.config import ConfigError
from rsgrpo.checks import at_least
from rsgrpo.console import Console
from rsgrpo.errors import InputError, RsgrpoError

KEPT = "kept"
FAILED = "request failed"
CUT_OFF = "cut off at the token limit"
MALFORMED = "not the four blocks"
WRONG_SLOTS = "not one evidence slot per page"
WRONG = "wrong answer"
GROUNDLESS = "no page is evidence for the answer"


@dataclass(frozen=True, slots=True)
class SynthesisConfig:
    """How trajectories are asked for, judged and written.

    template, system: what the teacher is asked.
    row_template: the user message of the rows, which the student will be asked.
    tries: responses per question until one is kept. min_accuracy: set-token F1, numbers strict, that counts as right.
    price_in, price_out: cost of a million prompt (response) tokens, in any currency.
    """

    template: str
    system: str
    row_template: str
    tries: int = 4
    min_accuracy: float = 1.0
    price_in: float = 0.0
    price_out: float = 0.0

    def __post_init__(self) -> None:
        at_least(1, tries=self.tries)
        at_least(0, min_accuracy=self.min_accuracy, price_in=self.price_in, price_out=self.price_out)
        if not self.row_template:
            raise InputError("--row-prompt must have a template: the rows' own message cannot be written from it")


def judge(question: Question, line: Mapping[str, Any], min_accuracy: float = 1.0) -> str:
    """Return KEPT, or why a result line of `recipes.infer` is no trajectory to learn from."""
    text = line["raw"].strip()
    if line["finish_reason"] == "error":
        return FAILED
    if line["finish_reason"] == "length":
        return CUT_OFF
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
    """Ask until each question has a kept trajectory or no try left; write rows and report beside each other.

    `out` gets whole responses, for `recipes.sft`; OUT.grpo.jsonl accepted answers with the evidence, for
    `rsgrpo.train`; OUT.tries.jsonl every response, from which the same command goes on; OUT.report.json the report that
    is returned.

    Raises:
        RsgrpoError: the teacher gave up. All files are written from what was finished.
    """
    tries_file = out.with_suffix(".tries.jsonl")
    lines: dict[str, dict[str, Any]] = {}
    try:
        for number in range(1, config.tries + 1):
            kept = kept_trajectories(questions, lines, config)
            open_questions = [question for question in questions if question.id not in kept]
            if not open_questions:
                break
            prompts = [
                to_prompt(_numbered(question, number), config.template, config.system) for question in open_questions
            ]
            console.info(f"try {number} of {config.tries}: {len(prompts)} questions")
            answer_batch(prompts, answerer, tries_file, share_equal=False, console=console)
            lines = read_lines(tries_file)
    finally:
        lines = read_lines(tries_file)
        kept = kept_trajectories(questions, lines, config)
        write_rows(questions, kept, config, out)
        report = report_of(questions, lines, config) | {"model": answerer.name}
        out.with_suffix(".report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def kept_trajectories(
    questions: Sequence[Question], lines: Mapping[str, Mapping[str, Any]], config: SynthesisConfig
) -> dict[str, str]:
    """Return question id -> its first response that is kept."""
    kept: dict[str, str] = {}
    for question in questions:
        for number in range(1, config.tries + 1):
            line = lines.get(_try_id(question, number))
            if line is not None and judge(question, line, config.min_accuracy) == KEPT:
                kept[question.id] = line["raw"].strip()
                break
    return kept


def write_rows(questions: Sequence[Question], kept: Mapping[str, str], config: SynthesisConfig, out: Path) -> None:
    """Write the rows of both files, in the order of the questions."""
    out.parent.mkdir(parents=True, exist_ok=True)
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


def report_of(
    questions: Sequence[Question], lines: Mapping[str, Mapping[str, Any]], config: SynthesisConfig
) -> dict[str, Any]:
    """Return what was kept, why the rest was not, and what it cost.

    Tokens are None if the teacher told none for some response.
    """
    verdicts: Counter[str] = Counter()
    asked: list[Mapping[str, Any]] = []
    kept_at: Counter[int] = Counter()
    for question in questions:
        for number in range(1, config.tries + 1):
            line = lines.get(_try_id(question, number))
            if line is None:
                continue
            verdict = judge(question, line, config.min_accuracy)
            verdicts[verdict] += 1
            asked.append(line)
            if verdict == KEPT:
                kept_at[number] += 1
                break
    num_kept, num_answered = verdicts.pop(KEPT, 0), len(asked) - verdicts[FAILED]
    tokens_in, tokens_out = (_total(asked, name) for name in ("num_prompt_tokens", "num_response_tokens"))
    cost = None
    if tokens_in is not None and tokens_out is not None:
        cost = round((tokens_in * config.price_in + tokens_out * config.price_out) / 1e6, 6)
    return {
        "questions": len(questions),
        "kept": num_kept,
        "kept_by_try": {str(number): count for number, count in sorted(kept_at.items())},
        "responses": num_answered,
        "acceptance": round(num_kept / num_answered, 4) if num_answered else 0.0,
        "rejected": {reason: count for reason, count in verdicts.most_common() if count},
        "prompt_tokens": tokens_in,
        "response_tokens": tokens_out,
        "cost": cost,
        "cost_per_kept": round(cost / num_kept, 6) if cost is not None and num_kept else None,
    }


def _total(lines: Sequence[Mapping[str, Any]], name: str) -> int | None:
    counts = [line.get(name) for line in lines if line["finish_reason"] != "error"]
    return None if None in counts else sum(count for count in counts if count is not None)


def _try_id(question: Question, number: int) -> str:
    return f"{question.id}#{number}"


def _numbered(question: Question, number: int) -> Question:
    return Question(_try_id(question, number), question.question, question.images, question.prompt)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(prog="python -m recipes.synthesize", description=__doc__.split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sub = commands.add_parser("trajectories", help="observe, evidence, think and answer for questions with answers")
    what = sub.add_argument_group("what is asked, and what is kept")
    what.add_argument("--in", dest="source", required=True, metavar="FILE", help="rows with question, image and answer")
    what.add_argument("--out", type=Path, required=True, help="jsonl of rows for recipes.sft")
    what.add_argument("--image-dir", default="", help="folder that the rows' image paths start from (default: FILE's)")
    what.add_argument("--prompt", default="evidence_example", help="what the teacher is asked: a name or a file")
    what.add_argument("--system", default="", help="system message for the teacher")
    what.add_argument("--row-prompt", default="evidence", help="the message of the rows: a name or a file")
    what.add_argument("--tries", type=int, default=4, help="responses per question until one is kept")
    what.add_argument("--min-accuracy", type=float, default=1.0, help="set-token F1 that counts as right")
    what.add_argument("--price-in", type=float, default=0.0, help="of a million prompt tokens, for the report")
    what.add_argument("--price-out", type=float, default=0.0, help="of a million response tokens")
    add_answerer_options(sub)
    sub.set_defaults(temperature=0.7)
    return top


def run(options: argparse.Namespace) -> None:
    """Do what the command line says."""
    from rsgrpo.prompts import read_template

    if options.tries > 1 and options.temperature == 0:
        raise InputError("--tries > 1 asks again for another response, greedy gives the same: set --temperature > 0")
    if options.requests_per_minute and not options.endpoint:
        raise InputError("--requests-per-minute limits an endpoint, and none is given")
    prompt = named_prompt(options.prompt)
    config = SynthesisConfig(
        template=read_template(prompt),
        system=options.system or prompt.system,
        row_template=read_template(named_prompt(options.row_prompt)),
        tries=options.tries,
        min_accuracy=options.min_accuracy,
        price_in=options.price_in,
        price_out=options.price_out,
    )
    questions = read_questions(options.source, image_dir=options.image_dir, need_answers=True)
    answerer = answerer_of(options)
    try:
        with Console(sys.stderr) as console:
            report = synthesize(questions, answerer, config, options.out, console)
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
    try:
        run(options)
    except (RsgrpoError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; responses so far are kept, the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
