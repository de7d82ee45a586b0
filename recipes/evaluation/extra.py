"""Scores beside the released ones: a benchmark's own protocol, joint answer and evidence, and rewards of the user's."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from recipes.answers.parsing import ParsedAnswer
from recipes.answers.predictions import Prediction
from recipes.answers.questions import Question
from recipes.evaluation.official import NOT_ANSWERABLE, PROTOCOLS, Protocol
from recipes.evaluation.parts import Box, answer_parts, box_parts, joint_parts, page_parts
from rewards.api import Response, Reward, RewardError, Span, Turn, check_score, load_reward
from rsgrpo.errors import InputError


@dataclass(frozen=True, slots=True)
class Share:
    """One question's part of a score that is a ratio of sums over all questions."""

    part: float
    whole: float


Scored = Mapping[str, float | Share | None]
"""Name -> score of one question; None where it does not apply, which leaves the question out of the mean."""
GIVEN_PAGES = "given_pages"
"""Column of a question of a baseline: ids of the pages in its prompt."""
ExtraScorer = Callable[[Question, Prediction, ParsedAnswer], Scored]


def extra_scorers(
    protocol: str, metrics: Mapping[str, str], extracted: Mapping[str, str] | None = None
) -> list[ExtraScorer]:
    """Return what scores each answered question further.

    protocol: a name in `recipes.evaluation.official.PROTOCOLS`, or "". metrics: name -> module:function of a reward.
    extracted: id -> the answer that another model read out of the response, for the protocol to score; None: as parsed.

    Raises:
        InputError: a reward cannot be loaded.
    """
    scorers: list[ExtraScorer] = [_protocol(protocol, extracted)] if protocol else []
    for name, target in metrics.items():
        try:
            scorers.append(_reward(name, load_reward(target)))
        except RewardError as error:
            raise InputError(f"metrics.{name}: {error}") from error
    return [*scorers, with_evidence, with_steps, with_pages_read, with_tokens]


def _protocol(name: str, extracted: Mapping[str, str] | None) -> ExtraScorer:
    protocol = PROTOCOLS[name]

    def score(question: Question, prediction: Prediction, parsed: ParsedAnswer) -> Scored:
        answer = protocol.abstention if protocol.abstention and parsed.insufficient else parsed.answer
        answer = answer if extracted is None else extracted.get(question.id, "")
        columns = {**question.columns, "question": question.question}
        value = protocol.scorer(answer, question.answers, columns)
        found: dict[str, float | Share | None] = {f"protocol/{name}": value}
        if protocol.abstention:
            says = answer.strip().lower() != NOT_ANSWERABLE.lower()
            found[f"protocol/{name}_f1"] = Share(2 * value * _has_answer(question), _has_answer(question) + says)
        return found | _jointly(protocol, answer, question, parsed, columns)

    return score


def unread_columns(protocol: str, questions: Sequence[Question]) -> list[str]:
    """Return the columns by which a protocol chooses its rule and that no row has, in their first spelling."""
    reads = PROTOCOLS[protocol].reads if protocol else ()
    return [names[0] for names in reads if not any(name in one.columns for one in questions for name in names)]


def _has_answer(question: Question) -> bool:
    return NOT_ANSWERABLE not in question.answers


def _jointly(
    protocol: Protocol, answer: str, question: Question, parsed: ParsedAnswer, columns: Mapping[str, Any]
) -> dict[str, float | Share | None]:
    """Score the answer by parts, and with its pages where they are known, as a protocol does that has such scores."""
    if protocol.parts is None:
        return {}
    own = protocol.parts(answer, question.answers, columns)
    found: dict[str, float | Share | None] = {f"protocol/{protocol.name}_em": own.em}
    if question.relevant_pages is not None:
        joint = joint_parts(own, page_parts(parsed.claimed_pages, question.relevant_pages))
        found |= {f"protocol/{protocol.name}_joint_{part}": getattr(joint, part) for part in ("em", "f1")}
    return found


def with_evidence(question: Question, prediction: Prediction, parsed: ParsedAnswer) -> Scored:
    """Score the pages that the evidence block claims, alone and with the answer; {} where the row does not name them.

    Answers are compared as SQuAD does. `chain/score`: of the right answers (by EM), the share whose evidence pages are
    exactly the right ones.
    """
    if question.relevant_pages is None:
        return {}
    pages = page_parts(parsed.claimed_pages, question.relevant_pages)
    answer = answer_parts(parsed.answer, question.answers)
    joint = joint_parts(answer, pages)
    return {
        **{f"pages/{name}": value for name, value in asdict(pages).items()},
        "joint/em": joint.em,
        "joint/f1": joint.f1,
        "chain/score": pages.em if answer.em else None,
    }


def with_steps(question: Question, prediction: Prediction, parsed: ParsedAnswer) -> Scored:
    """Score what a policy did at the page desk; {} for an answer without an environment.

    steps/turns, /calls, /faults, /images: per question. steps/opened: pages that were opened.
    boxes/*: of all zooms against the row's `gold_box` on its gold pages (`box_parts`).
    """
    steps = prediction.steps
    if steps is None:
        return {}
    has_last = not steps or bool(prediction.text[int(steps[-1]["at_char"]) :].strip())
    return _boxes(question, steps) | {
        "steps/turns": float(len(steps) + has_last),
        "steps/calls": float(len(steps)),
        "steps/faults": float(sum(bool(step.get("fault")) for step in steps)),
        "steps/images": float(sum(step.get("images") or 0 for step in steps)),
        "steps/opened": float(len(_opened(steps))),
    }


def with_pages_read(question: Question, prediction: Prediction, parsed: ParsedAnswer) -> Scored:
    """Score which pages were read: those opened at the desk, or those that a baseline was given (GIVEN_PAGES).

    read/recall: share of the row's `gold_pages` among them; read/precision: share of them that are gold; None if no
    page was read. {} for rows without `gold_pages`, and where it is not known what was read.
    """
    gold, given = set(question.columns.get("gold_pages") or ()), question.columns.get(GIVEN_PAGES)
    if not gold or (prediction.steps is None and given is None):
        return {}
    read = _opened(prediction.steps) if prediction.steps is not None else set(given or ())
    return {
        "read/recall": len(gold & read) / len(gold),
        "read/precision": len(gold & read) / len(read) if read else None,
    }


def with_tokens(question: Question, prediction: Prediction, parsed: ParsedAnswer) -> Scored:
    """Return what an answer cost in tokens, as far as the file says.

    tokens/model: written by the model. tokens/observation: answers of an environment. tokens/image: of all images, each
    counted once. tokens/processed: prompt, observations and response, each once; at an endpoint the prompts and
    responses of all requests, as it counts them.
    """
    counts = prediction.num_tokens
    known = {"model": counts.get("response"), "observation": counts.get("observation"), "image": counts.get("image")}
    if "prompt" in counts and "response" in counts:
        known["processed"] = counts["prompt"] + counts["response"] + counts.get("observation", 0)
    return {f"tokens/{kind}": float(count) for kind, count in known.items() if count is not None}


def _opened(steps: Sequence[Mapping[str, Any]]) -> set[str]:
    return {step["page"] for step in steps if "page" in step and not step.get("fault")}


def _boxes(question: Question, steps: Sequence[Mapping[str, Any]]) -> dict[str, float | Share | None]:
    gold = question.columns.get("gold_box")
    if not gold:
        return {}
    nowhere: Box = (0.0, 0.0, 0.0, 0.0)  # of a page without a gold box: it hits nothing
    pages = set(question.columns.get("gold_pages") or ())
    zooms = [step for step in steps if "box" in step and not step.get("fault")]
    claimed = [tuple(step["box"]) if step.get("page") in pages else nowhere for step in zooms]
    right = [tuple(gold)] if isinstance(gold[0], int | float) else [tuple(box) for box in gold]
    return {f"boxes/{part}": value for part, value in asdict(box_parts(claimed, right)).items()}


def turns_of(prediction: Prediction) -> tuple[Turn, ...]:
    """Return the turns of a trajectory, as rewards read them; none without an environment."""
    turns, start, text = [], 0, prediction.text
    for step in prediction.steps or ():
        end = min(max(int(step["at_char"]), start), len(text))
        turns.append(Turn(Span(start, end), str(step.get("text", "")), facts=step, fault=str(step.get("fault", ""))))
        start = min(end + 1, len(text))
    return (*turns, Turn(Span(start, len(text)))) if turns else ()


def _reward(name: str, reward: Reward) -> ExtraScorer:
    def score(question: Question, prediction: Prediction, parsed: ParsedAnswer) -> Scored:
        truth: dict[str, Any] = {"answers": list(question.answers), "is_sufficient": question.is_sufficient}
        if question.evidence is not None:
            truth["evidence"] = list(question.evidence)
        paths = tuple(source for source in question.images if isinstance(source, str | bytes))
        response = Response(
            prediction.text,
            {**question.columns, **truth},
            num_tokens=len(prediction.text.split()),
            truncated=prediction.finish_reason == "length",
            question=question.question,
            images=paths,
            turns=turns_of(prediction),
        )
        try:
            value = reward(response)
            value = check_score(asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value)
        except Exception as error:
            raise InputError(
                f"metrics.{name} failed on question {question.id}: {type(error).__name__}: {error}"
            ) from error
        if isinstance(value, tuple):
            value = sum(credit.score for credit in value) / len(value)
        return {f"metric/{name}": value}

    return score


async def _awaited(value: Any) -> Any:
    return await value


def missing(scored: Sequence[Scored], question: Question) -> Scored:
    """Return the score of a question without an answer: 0 for whatever others are scored by, but chain and tokens."""
    found: dict[str, float | Share | None] = {}
    for name, value in ((name, value) for one in scored for name, value in one.items()):
        found[name] = Share(0.0, 1.0 + _has_answer(question)) if isinstance(value, Share) else 0.0
        if name.startswith(("chain/", "tokens/")):
            found[name] = None
    return found
