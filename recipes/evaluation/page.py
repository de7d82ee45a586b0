"""Show an evaluation: as JSON, as Markdown, and as one HTML page with the worst cases beside their pages.

The page holds its images and needs nothing from outside; what models wrote is shown as text only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.answers.parsing import Slot, is_irrelevant
from recipes.evaluation.intervals import Difference, Estimate
from recipes.evaluation.scoring import MODES, SPLITS, Evaluation, ItemScore
from rollout.inputs.images import PromptError, data_uri, name_of
from rollout.types import ImageSource
from rsgrpo.report.templates import render

LABELS = {"em": "EM", "acc": "Accuracy", "f1": "F1"}
MODE_NOTES = {
    "paper": "as released: numbers lose their sign and decimal point, and the first answer block counts",
    "strict": "numbers keep their sign and decimal point, and the last answer block after the reasoning counts",
}
DECISIONS = {
    "abstention/": "abstaining",
    "evidence/slot_": "pages in the evidence block",
    "evidence/citation_": "pages cited in reasoning or answer",
}
RATES = {
    "output/format_ok": "well formed",
    "output/truncated": "cut off at the token limit",
    "abstention/rate": "abstained",
}
STEPS = ("steps/", "read/", "tokens/")
STEPS_NOTE = (
    "What the policy called, how many calls were at fault, images it was shown, pages that it opened, which share of "
    "the gold pages is among them and which share of them is gold, and what that took in tokens."
)
BESIDE_NOTE = (
    "One turn is asked without the environment, over the images that fit into the image tokens of the question's "
    "trajectory: thumbnails, or whole pages, the first or best ones. Tokens per question: written by the model, "
    "answers of the environment, of all images, and processed: prompt, observations and response, each once (at an "
    "endpoint all prompts and responses of its requests)."
)
BESIDE_GAIN = "strict/global/f1"
BESIDE_SHARES = {
    BESIDE_GAIN: "F1",
    "strict/global/em": "EM",
    "read/recall": "gold pages read",
    "read/precision": "pages read that are gold",
}
BESIDE_NUMBERS = {
    "steps/turns": "turns",
    "tokens/model": "model tokens",
    "tokens/observation": "observation tokens",
    "tokens/image": "image tokens",
    "tokens/processed": "tokens processed",
}
"""Names of scores -> columns of the table of policies."""
EXTRA = ("protocol/", "metric/", "pages/", "joint/", "chain/", "boxes/")
EXTRA_NOTE = (
    "protocol: the benchmark's own rule; pages: the evidence block's pages, per question; joint: answer and pages "
    "together; chain: of the right answers, the share that rests on exactly the right pages; boxes: zooms on gold boxes"
)
COUNTS = {
    "num_questions": "questions",
    "num_missing": "without an answer",
    "num_failed": "of these, failed requests",
    "num_unknown": "predictions for unknown questions",
    "num_repeated": "repeated lines",
}
VERDICTS = {
    (True, True): ("found", "good"),
    (False, False): ("correctly left out", "good"),
    (True, False): ("unfounded claim", "bad"),
    (False, True): ("missed", "bad"),
}
"""(a slot claims evidence, the gold does) -> the verdict, and its style."""
NOTHING_COUNTED = "n/a"
MAX_IMAGE_SIDE = 640
ASSETS = "recipes.evaluation"


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to answer the same questions. gain: of the trajectories against it; None for the trajectories."""

    name: str
    evaluation: Evaluation
    gain: Mapping[str, Difference] | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """What is shown of an evaluation.

    title: benchmark and model. facts: (what, value) of the header.
    differences, other: against another prediction file, and that file's evaluation; None without one.
    worst: the cases to show, worst first. policies: trajectories, then baselines of one turn; empty without them.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    evaluation: Evaluation
    differences: Mapping[str, Difference] | None
    other: Evaluation | None
    worst: Sequence[ItemScore]
    policies: Sequence[Policy] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """A table of strings; note: a sentence above it, or ""."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def worst_cases(evaluation: Evaluation, other: Evaluation | None, limit: int) -> list[ItemScore]:
    """Return the answered questions that scored worst; beside another file, those that lost most against it."""

    def goodness(position: int) -> tuple[float, float, int]:
        item = evaluation.items[position]
        score = sum(item.answer[mode].f1 for mode in MODES)
        gained = score - sum(other.items[position].answer[mode].f1 for mode in MODES) if other else 0.0
        return gained, score, -(item.slots.false_alarms + item.slots.misses if item.slots else 0)

    answered = [position for position, item in enumerate(evaluation.items) if item.parsed is not None]
    wrong = [position for position in answered if evaluation.items[position].answer["strict"].em < 1]
    return [evaluation.items[position] for position in sorted(wrong, key=goodness)[:limit]]


def as_json(results: Results) -> dict[str, Any]:
    """Return everything that is shown but the images, JSON-ready."""
    scores: dict[str, Any] = {}
    for name, estimate in results.evaluation.estimates.items():
        *path, last = name.split("/")
        node = scores
        for part in path:
            node = node.setdefault(part, {})
        node[last] = dataclasses.asdict(estimate)
    found: dict[str, Any] = {
        "title": results.title,
        **{what.replace(" ", "_"): value for what, value in results.facts},
        **_counts(results.evaluation),
        "scores": scores,
        "worst": [item.question.id for item in results.worst],
    }
    if results.differences is not None:
        found["differences"] = {name: dataclasses.asdict(one) for name, one in results.differences.items()}
    if results.policies:
        found["policies"] = {policy.name: _policy(policy) for policy in results.policies}
    return found


def _policy(policy: Policy) -> dict[str, Any]:
    found = {name: dataclasses.asdict(one) for name, one in policy.evaluation.estimates.items()}
    gain = {name: dataclasses.asdict(one) for name, one in (policy.gain or {}).items()}
    return {"scores": found} | ({"gain_of_trajectories": gain} if gain else {})


def as_markdown(results: Results) -> str:
    """Return the tables as Markdown; scores in percent, with 95% intervals."""
    return render("results.md", package=ASSETS, title=results.title, facts=results.facts, tables=_tables(results))


def as_page(results: Results) -> str:
    """Return the HTML page."""
    return render(
        "evaluation.html",
        package=ASSETS,
        brand="Evaluation",
        title=results.title,
        facts=results.facts,
        tables=_tables(results),
        num_wrong=sum(item.answer["strict"].em < 1 for item in results.evaluation.items),
        compared=results.other is not None,
        cases=[_case(item, results.other) for item in results.worst],
    )


def _tables(results: Results) -> list[Table]:
    estimates = results.evaluation.estimates
    tables = []
    for mode in MODES:
        rows = []
        for split in SPLITS:
            found = [estimates[f"{mode}/{split}/{metric}"] for metric in LABELS]
            rows.append([split, f"{found[0].count:.0f}", *map(percent, found)])
        tables.append(Table(f"Answers, {mode}", MODE_NOTES[mode], ["split", "questions", *LABELS.values()], rows))
    parts = ("precision", "recall", "f1")
    rows = [
        [label, *(percent(estimates[prefix + part]) for part in parts)]
        for prefix, label in DECISIONS.items()
        if f"{prefix}f1" in estimates
    ]
    tables.append(Table("Decisions", "", ["decision", "precision", "recall", "F1"], rows))
    extra = [name for name in estimates if name.startswith(EXTRA)]
    if extra:
        rows = [[name, f"{estimates[name].count:.0f}", percent(estimates[name])] for name in extra]
        tables.append(Table("Further scores", EXTRA_NOTE, ["score", "questions", "mean"], rows))
    steps = [name for name in estimates if name.startswith(STEPS)]
    if any(name.startswith("steps/") for name in steps):
        rows = [[name, f"{estimates[name].count:.0f}", _plain(estimates[name])] for name in steps]
        tables.append(Table("At the page desk", STEPS_NOTE, ["per question", "questions", "mean"], rows))
    if results.policies:
        tables.append(_beside(results.policies))
    rows = [[label, percent(estimates[name])] for name, label in RATES.items()]
    rows += [[COUNTS[what], str(count)] for what, count in _counts(results.evaluation).items()]
    tables.append(Table("Outputs", "", ["", "share or count"], rows))
    if (differences := results.differences) is not None:
        rows = [
            [mode, split, *(signed(differences[f"{mode}/{split}/{metric}"]) for metric in LABELS)]
            for mode in MODES
            for split in SPLITS
        ]
        note = "This file minus the other, question by question; p from a paired permutation test."
        tables.append(Table("Against the other file", note, ["mode", "split", *LABELS.values()], rows))
        rows = [[name, signed(differences[name])] for name in extra if name in differences]
        if rows:
            tables.append(Table("Further scores against the other file", note, ["score", "difference"], rows))
    return tables


def _beside(policies: Sequence[Policy]) -> Table:
    """Return the table of trajectories beside policies of one turn."""
    rows = []
    for policy in policies:
        found = policy.evaluation.estimates
        shares = [percent(found[name]) if name in found else NOTHING_COUNTED for name in BESIDE_SHARES]
        numbers = [_plain(found[name], 1) if name in found else NOTHING_COUNTED for name in BESIDE_NUMBERS]
        turns = numbers[0] if policy.gain is None else "1"
        gain = signed(policy.gain[BESIDE_GAIN]) if policy.gain is not None else ""
        rows.append([policy.name, *shares, turns, *numbers[1:], gain])
    header = ["policy", *BESIDE_SHARES.values(), *BESIDE_NUMBERS.values(), "F1 of the trajectories minus it"]
    return Table("Trajectories beside one turn", BESIDE_NOTE, header, rows)


def _counts(evaluation: Evaluation) -> dict[str, int]:
    return {"num_questions": len(evaluation.items)} | {
        name: getattr(evaluation, name) for name in COUNTS if name != "num_questions"
    }


def _plain(found: Estimate, decimals: int = 2) -> str:
    """Return a value with its interval, not in percent."""
    if found.value is None:
        return NOTHING_COUNTED
    interval = (
        "" if found.low is None or found.high is None else f" ({found.low:.{decimals}f} to {found.high:.{decimals}f})"
    )
    return f"{found.value:.{decimals}f}{interval}"


def percent(found: Estimate | Difference, sign: str = "") -> str:
    """Return a value in percent with its interval; sign: "+" writes the sign of positive numbers too."""
    if found.value is None:
        return NOTHING_COUNTED
    text = f"{100 * found.value:{sign}.1f}"
    if found.low is None or found.high is None:
        return text
    return f"{text} ({100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f})"


def signed(found: Difference) -> str:
    """Return a difference with its interval and p-value."""
    if found.p_value is None:
        return NOTHING_COUNTED
    return f"{percent(found, '+')}, p {'< 0.001' if found.p_value < 0.001 else format(found.p_value, '.3f')}"


def _case(item: ItemScore, other: Evaluation | None) -> dict[str, Any]:
    """Return one question: gold and answer, each page with what was found on it, and the whole output."""
    question, parsed, prediction = item.question, item.parsed, item.prediction
    assert parsed is not None
    assert prediction is not None
    said = [
        ("gold", " | ".join(question.answers) if question.is_sufficient else "(the pages are insufficient)"),
        ("answer", parsed.answer),
        ("scores", ", ".join(f"F1 {mode} {100 * item.answer[mode].f1:.0f}" for mode in MODES)),
        ("reasoning", parsed.think),
        ("faults", "; ".join(parsed.errors)),
    ]
    if other is not None:
        theirs = next(found for found in other.items if found.question.id == question.id)
        said.insert(2, ("other file", theirs.parsed.answer if theirs.parsed else "(missing)"))
    slots = {slot.index: slot for slot in parsed.evidence}
    golds = question.evidence or [None] * len(question.images)
    pages = [
        _page(number, source, slots.get(number), gold)
        for number, (source, gold) in enumerate(zip(question.images, golds, strict=True), start=1)
    ]
    return {"question": question.question, "id": question.id, "said": said, "pages": pages, "text": prediction.text}


def _page(number: int, source: ImageSource, slot: Slot | None, gold: str | None) -> dict[str, Any]:
    """Return a page at a screen's size, or why it cannot be read, and what was found on it; gold: None if unknown."""
    page = {"number": number, "written": slot.text if slot else "(no slot)"}
    if gold is not None:
        verdict, kind = VERDICTS[slot is not None and slot.relevant, not is_irrelevant(gold)]
        page |= {"gold": gold, "verdict": verdict, "kind": kind}
    try:
        return page | {"image": data_uri(source, MAX_IMAGE_SIDE), "name": name_of(source)}
    except PromptError as error:
        return page | {"error": str(error)}
