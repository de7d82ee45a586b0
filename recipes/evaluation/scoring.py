"""Scores: EM, Accuracy and F1 as released (`paper`) and with numbers kept whole (`strict`), abstention, evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import numpy as np

from recipes.answers.parsing import ParsedAnswer, parse_lenient, parse_trajectory, says_insufficient
from recipes.answers.predictions import FAILED, Prediction, Predictions
from recipes.answers.questions import Question
from recipes.evaluation.extra import ExtraScorer, Scored, Share, missing
from recipes.evaluation.intervals import Difference, Estimate, Ratio, compare, estimate, mean_of
from rewards.text import Mode, normalise

MODES: tuple[Mode, ...] = ("paper", "strict")
SPLITS = ("global", "sufficient", "insufficient")
ANSWER_METRICS = ("em", "acc", "f1")
ABSTENTION_GOLDS = ("no relevant information", "insufficient to answer", "insufficient to answer the question")
RELEASED_EPSILON = 1e-7  # in the denominator of the released F1


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """em, acc: 0 or 1. f1: in [0, 1]."""

    em: float
    acc: float
    f1: float


NO_SCORE = AnswerScores(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Decisions:
    """Counts of right claims, unfounded claims, and missed ones."""

    hits: int = 0
    false_alarms: int = 0
    misses: int = 0

    @classmethod
    def of(cls, claimed: Set[int], right: Set[int]) -> Decisions:
        """Return the counts of what was claimed against what is right."""
        return cls(len(claimed & right), len(claimed - right), len(right - claimed))


@dataclass(frozen=True, slots=True)
class ItemScore:
    """One question and what was predicted for it.

    prediction: None when the file has none, or when the question could not be asked; it then scores 0 everywhere.
    parsed: the prediction, read leniently; None when missing.
    predicted: mode -> the text that was compared with the gold answers.
    answer: mode -> its scores.
    abstention: whether it abstains, against whether it should; a missing answer does not abstain.
    slots, citations: of pages; None if the row does not say which pages are right.
    extra: further scores by name (`recipes.evaluation.extra`).
    """

    question: Question
    prediction: Prediction | None
    parsed: ParsedAnswer | None
    predicted: Mapping[str, str]
    answer: Mapping[str, AnswerScores]
    abstention: Decisions
    slots: Decisions | None
    citations: Decisions | None
    extra: Scored = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All scores of one prediction file on one benchmark.

    estimates: "paper/global/f1", "abstention/precision", "evidence/slot_f1", "output/format_ok", ... -> estimate.
    num_missing: questions without a prediction; num_failed of them could not be asked.
    num_unknown: predictions for ids that the benchmark does not have. num_repeated: lines that a later one replaced.
    """

    items: tuple[ItemScore, ...]
    estimates: Mapping[str, Estimate]
    num_missing: int
    num_failed: int
    num_unknown: int
    num_repeated: int


def released_prediction(text: str) -> str:
    """Return the answer as the released evaluation finds it.

    From the first <answer> to the next </answer>, or to the end; the whole text if there is no <answer>.
    """
    _, tag, rest = text.partition("<answer>")
    return rest.partition("</answer>")[0].strip() if tag else text.strip()


def score_answer(prediction: str, golds: Sequence[str], mode: Mode) -> AnswerScores:
    """Score one answer against all accepted ones; each metric takes its best gold.

    em: equal after normalisation. acc: the gold's words are all in the prediction. f1: of the two bags of words.
    A gold that shares no word with the prediction counts for nothing. In strict mode a gold that normalises to nothing
    is compared raw.

    >>> score_answer("a growth of 16 percent", ["16 percent"], "strict")
    AnswerScores(em=0.0, acc=1.0, f1=0.6666666666666666)
    """
    words = normalise(prediction, mode).split()
    best = NO_SCORE
    for gold in golds:
        gold_words = normalise(gold, mode).split()
        if mode == "strict" and not gold_words and prediction.strip().casefold() == gold.strip().casefold() != "":
            return AnswerScores(1.0, 1.0, 1.0)
        num_shared = (Counter(words) & Counter(gold_words)).total()
        if num_shared == 0:
            continue
        precision, recall = num_shared / len(words), num_shared / len(gold_words)
        epsilon = RELEASED_EPSILON if mode == "paper" else 0.0
        best = AnswerScores(
            em=max(best.em, float(words == gold_words)),
            acc=max(best.acc, float(set(gold_words) <= set(words))),
            f1=max(best.f1, 2 * precision * recall / (precision + recall + epsilon)),
        )
    return best


def score_item(question: Question, prediction: Prediction | None) -> ItemScore:
    """Score what was predicted for one question; None scores 0."""
    own = tuple(answer for answer in question.answers if question.is_sufficient or says_insufficient(answer))
    golds = own if question.is_sufficient else (*ABSTENTION_GOLDS, *own)
    text = None if prediction is None or prediction.finish_reason == FAILED else prediction.text
    parsed = None if prediction is None or text is None else _parsed(question, prediction)
    predicted = {"paper": released_prediction(text), "strict": parsed.answer} if text is not None and parsed else {}
    slots = citations = None
    if (relevant := question.relevant_pages) is not None:
        slots = Decisions.of(parsed.claimed_pages if parsed else set(), relevant)
        citations = Decisions.of(set(parsed.citations) if parsed else set(), relevant)
    abstains = {1} if parsed and parsed.insufficient else set()
    return ItemScore(
        question,
        prediction,
        parsed,
        predicted,
        answer={mode: score_answer(predicted[mode], golds, mode) if predicted else NO_SCORE for mode in MODES},
        abstention=Decisions.of(abstains, set() if question.is_sufficient else {1}),
        slots=slots,
        citations=citations,
    )


def _parsed(question: Question, prediction: Prediction) -> ParsedAnswer:
    steps = prediction.steps
    if steps is None:
        return parse_lenient(prediction.text, question.images)
    return parse_trajectory(prediction.text, int(steps[-1]["at_char"]) if steps else 0)


def evaluate_predictions(
    questions: Sequence[Question],
    predictions: Predictions,
    *,
    num_samples: int = 1000,
    seed: int = 0,
    scorers: Sequence[ExtraScorer] = (),
) -> Evaluation:
    """Score a prediction file.

    num_samples: bootstrap samples of the intervals; 0 for none. scorers: of further scores (`with_extra`).
    """
    found = predictions.by_id
    items = with_extra([score_item(question, found.get(question.id)) for question in questions], scorers)
    return Evaluation(
        items=items,
        estimates=estimate(ratios_of(items), num_samples, seed),
        num_missing=sum(item.parsed is None for item in items),
        num_failed=sum(item.parsed is None and item.prediction is not None for item in items),
        num_unknown=len(predictions.by_id.keys() - {question.id for question in questions}),
        num_repeated=predictions.num_repeated,
    )


def with_extra(items: Sequence[ItemScore], scorers: Sequence[ExtraScorer]) -> tuple[ItemScore, ...]:
    """Return the items with their further scores; a question without an answer scores 0 in each."""
    extra = [
        {name: value for score in scorers for name, value in score(item.question, item.prediction, item.parsed).items()}
        if item.prediction is not None and item.parsed is not None
        else None
        for item in items
    ]
    given = [one for one in extra if one is not None]
    return tuple(
        replace(item, extra=missing(given, item.question) if one is None else one)
        for item, one in zip(items, extra, strict=True)
    )


def compare_evaluations(
    first: Evaluation, second: Evaluation, *, num_samples: int = 1000, num_permutations: int = 10_000, seed: int = 0
) -> dict[str, Difference]:
    """Return first minus second for every score that is a mean over the same questions in both.

    Both have the same questions in the same order. Scores whose denominators differ, such as the precision of
    evidence, are left out: swapping two predictions would change what is counted.
    """
    assert [item.question.id for item in first.items] == [item.question.id for item in second.items]
    one, two = ratios_of(first.items), ratios_of(second.items)
    names = [name for name in one if name in two and np.array_equal(one[name].below_N, two[name].below_N)]
    ours, theirs = ({name: ratios[name] for name in names} for ratios in (one, two))
    return compare(ours, theirs, num_samples, num_permutations, seed)


def ratios_of(items: Sequence[ItemScore]) -> dict[str, Ratio]:
    """Return every metric as a ratio of sums; those of evidence only where a row has gold evidence."""
    ratios = answer_ratios(items)
    ratios |= _decision_ratios("abstention/", [item.abstention for item in items])
    ratios |= _decision_ratios("evidence/slot_", [item.slots for item in items])
    ratios |= _decision_ratios("evidence/citation_", [item.citations for item in items])
    present_N = np.array([item.parsed is not None for item in items], dtype=bool)
    abstains_N = np.array([item.parsed is not None and item.parsed.insufficient for item in items], dtype=bool)
    formed_N = np.array([item.parsed is not None and item.parsed.format_ok for item in items])
    cut_N = np.array([item.prediction is not None and item.prediction.finish_reason == "length" for item in items])
    for name in sorted({name for item in items for name in item.extra}):
        shares = [_share(item.extra.get(name)) for item in items]
        ratios[name] = Ratio(np.array([one.part for one in shares]), np.array([one.whole for one in shares]))
    return ratios | {
        "abstention/rate": mean_of(abstains_N),
        "output/format_ok": mean_of(formed_N, present_N),
        "output/truncated": mean_of(cut_N, present_N),
    }


def _share(value: float | Share | None) -> Share:
    if isinstance(value, Share):
        return value
    return Share(0.0, 0.0) if value is None else Share(float(value), 1.0)


def answer_ratios(items: Sequence[ItemScore]) -> dict[str, Ratio]:
    """Return "mode/split/metric" -> the mean over the split's questions."""
    sufficient_N = np.array([item.question.is_sufficient for item in items], dtype=bool)
    splits = {"global": np.ones(len(items), dtype=bool), "sufficient": sufficient_N, "insufficient": ~sufficient_N}
    return {
        f"{mode}/{split}/{metric}": mean_of(
            np.array([getattr(item.answer[mode], metric) for item in items], dtype=float), splits[split]
        )
        for mode in MODES
        for split in SPLITS
        for metric in ANSWER_METRICS
    }


def _decision_ratios(prefix: str, decisions: Sequence[Decisions | None]) -> dict[str, Ratio]:
    """Return precision, recall and F1 of decisions summed over items; {} if no item has any."""
    if not any(decisions):
        return {}
    counts = [(found.hits, found.false_alarms, found.misses) if found else (0, 0, 0) for found in decisions]
    hits_N, false_N, missed_N = np.array(counts, dtype=float).T
    return {
        f"{prefix}precision": Ratio(hits_N, hits_N + false_N),
        f"{prefix}recall": Ratio(hits_N, hits_N + missed_N),
        f"{prefix}f1": Ratio(2 * hits_N, 2 * hits_N + false_N + missed_N),
    }
