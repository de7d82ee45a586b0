"""Let a teacher look up answers: `python -m recipes.synthesize desk --store STORE --in qa.jsonl --out FILE`.

What is right, cites only pages that it opened and is whole is kept, as rows with `turns` for `recipes.sft`; turns whose
call could not be carried out are read and not learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.answers.batch import rewrite
from recipes.answers.conversations import TURNS, Conversations
from recipes.answers.questions import Question, to_prompt
from recipes.answers.types import Answerer
from recipes.files.layouts import portable_image
from recipes.synthesize.retries import KEPT, Line, RetryConfig, ask_and_report, fault_of
from rewards.api import Response, Span, Turn
from rewards.desk import answer_f1, cited_numbers, cites_opened
from rollout.config import TurnsConfig
from rollout.turns.environment import Reply, load_environment
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console

WRONG = "wrong answer"
UNSEEN = "cites a page that it did not open, or none"
TOO_MANY_TURNS = "no answer within the turns"


@dataclass(frozen=True, slots=True)
class DeskSynthesisConfig:
    """How trajectories are requested, judged and written.

    template: the message of the teacher and of the rows. turns: the desk and its limits.
    min_accuracy: set-token F1, numbers strict, that counts as right.
    """

    template: str
    turns: TurnsConfig
    retries: RetryConfig
    min_accuracy: float = 1.0


def judge(question: Question, line: Line, min_accuracy: float) -> str:
    """Return KEPT, or why a result line of a conversation is not a trajectory to learn from."""
    if line["finish_reason"] == TURNS:
        return TOO_MANY_TURNS
    if fault := fault_of(line):
        return fault
    turns = tuple(Turn(Span(0, 0), facts=step, fault=step["fault"]) for step in line.get("steps", ()))
    response = Response(line["raw"], {"answers": list(question.answers)}, turns=turns)
    score = answer_f1(response, normalise="strict")
    if score is None or score < min_accuracy:
        return WRONG
    return KEPT if cites_opened(response) == 1.0 else UNSEEN


def synthesize_desk(
    questions: Sequence[Question], answerer: Answerer, config: DeskSynthesisConfig, out: Path, console: Console
) -> dict[str, Any]:
    """Ask until each question has a kept trajectory or no try is left; write rows and report beside each other.

    `out` gets trajectories for `recipes.sft`; OUT.grpo.jsonl the questions with answers and the pages that the teacher
    cited, as `gold_pages`, for `rsgrpo.train`. The other files, errors and the report are those of `ask_and_report`.
    """
    by_id = {question.id: question for question in questions}
    prompts = [to_prompt(question, config.template) for question in questions]
    teacher = Conversations(answerer, config.turns)

    def verdict(question_id: str, line: Line) -> str:
        return judge(by_id[question_id], line, config.min_accuracy)

    def write(kept: Mapping[str, Line], tried: dict[str, Any]) -> dict[str, Any]:
        trajectories, gold = [], []
        for question in questions:
            if question.id in kept:
                row, turns = _row(question, config, kept[question.id], out)
                trajectories.append(row | {"turns": turns})
                gold.append(row)
        rewrite(out, trajectories)
        rewrite(out.with_suffix(".grpo.jsonl"), gold)
        return {"questions": len(questions), **tried}

    return ask_and_report(prompts, verdict, config.retries, teacher, out, console, write)


def _row(
    question: Question, config: DeskSynthesisConfig, line: Line, out: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a row without its turns, and its turns: the desk answers the same calls in the same way once more."""
    make, prompt = load_environment(config.turns), to_prompt(question, config.template)
    assert make is not None, "Conversations has refused to be without"
    desk, turns, start = make(prompt), [], 0
    cited, pages = cited_numbers(line["raw"]), []
    for step in line.get("steps", ()):
        text = line["raw"][start : step["at_char"]].removeprefix("\n")
        start = step["at_char"]
        reply = desk.step(text)
        if not isinstance(reply, Reply):
            raise InputError(f"{question.id}: the desk does not answer as before; write to another --out")
        turn = {"turn": text, "observation": reply.text, "images": [portable_image(one, out) for one in reply.images]}
        turns.append(turn if not step["fault"] else turn | {"learn": False})
        if step.get("number") in cited and not step["fault"] and step["page"] not in pages:
            pages.append(step["page"])
    turns.append({"turn": line["raw"][start:].removeprefix("\n")})
    row = {
        "id": question.id,
        "question": question.question,
        "prompt": prompt.text,
        "answer": list(question.answers),
        "gold_pages": pages,
        "image": [portable_image(source, out) for source in question.images],
    }
    return row, turns
