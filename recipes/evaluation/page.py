"""Show an evaluation: as JSON, as markdown, and as one HTML page with the worst cases beside their pages.

The page holds its images and needs nothing from outside; what models wrote is shown as text only. Computes no scores.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from PIL import Image

from recipes.answers.parsing import is_irrelevant
from recipes.evaluation.intervals import Difference, Estimate
from recipes.evaluation.scoring import ANSWER_METRICS, MODES, SPLITS, Evaluation, ItemScore
from rollout.inputs.images import PromptError, decode, name_of
from rollout.types import ImageSource

LABELS = {"em": "EM", "acc": "Accuracy", "f1": "F1"}
MODE_NOTES = {
    "paper": "as released: numbers lose sign and point, the first answer block counts",
    "strict": "numbers keep sign and point, the last answer block after the reasoning counts",
}
COUNT_LABELS = {
    "num_questions": "questions",
    "num_missing": "without an answer",
    "num_failed": "of these, could not be asked",
    "num_unknown": "predictions of unknown questions",
    "num_repeated": "repeated lines",
}
NOTHING_COUNTED = "n/a"
MAX_IMAGE_SIDE = 640
STYLE = """
#scores { display: flex; flex-wrap: wrap; gap: 4px 24px; }
.case { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.case { padding: 16px 20px; margin: 18px 0; }
.case h3 { margin: 0 0 4px; text-transform: none; letter-spacing: 0; font-size: 15px; color: var(--ink); }
.pages { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 14px; margin: 14px 0; }
.pages img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; image-rendering: auto; }
.pages p { font-size: 13px; overflow-wrap: anywhere; } .pages b { font-weight: 600; }
.said { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; font-size: 14px; margin: 8px 0; }
.said dt { color: var(--quiet); } .said dd { margin: 0; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; } table { margin-bottom: 4px; }
"""


@dataclass(frozen=True, slots=True)
class Report:
    """What is shown.

    title: benchmark and model. facts: (what, value) of the header.
    differences: against another prediction file, None without one; `other` is that file's evaluation.
    worst: the cases to show, worst first.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    evaluation: Evaluation
    differences: Mapping[str, Difference] | None
    other: Evaluation | None
    worst: Sequence[ItemScore]


def worst_cases(evaluation: Evaluation, other: Evaluation | None, limit: int) -> list[ItemScore]:
    """Return the answered questions that scored worst; beside another file, those that lost most against it."""

    def badness(pair: tuple[int, ItemScore]) -> tuple[float, float, int, int]:
        position, item = pair
        score = sum(item.answer[mode].f1 for mode in MODES)
        lost = score - sum(other.items[position].answer[mode].f1 for mode in MODES) if other else 0.0
        slots = item.slots.false_alarms + item.slots.misses if item.slots else 0
        return lost, score, -slots, position

    wrong = [
        (position, item)
        for position, item in enumerate(evaluation.items)
        if item.parsed is not None and item.answer["strict"].em < 1
    ]
    return [item for _, item in sorted(wrong, key=badness)[:limit]]


def as_json(report: Report) -> dict[str, Any]:
    """Return everything that is shown but the images, JSON-ready."""
    scores: dict[str, Any] = {}
    for name, estimate in report.evaluation.estimates.items():
        *path, last = name.split("/")
        node = scores
        for part in path:
            node = node.setdefault(part, {})
        node[last] = dataclasses.asdict(estimate)
    result: dict[str, Any] = {
        "title": report.title,
        **{what.replace(" ", "_"): value for what, value in report.facts},
        **_counts(report.evaluation),
        "scores": scores,
        "worst": [item.question.id for item in report.worst],
    }
    if report.differences is not None:
        result["differences"] = {name: dataclasses.asdict(found) for name, found in report.differences.items()}
    return result


def as_markdown(report: Report) -> str:
    """Return the tables as markdown; scores in percent, with 95% intervals."""
    lines = [f"# {report.title}", ""]
    lines += [f"- {what}: {value}" for what, value in report.facts]
    for title, note, header, rows in _tables(report):
        lines += ["", f"## {title}", *(["", note] if note else [])]
        lines += ["", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def as_page(report: Report) -> str:
    """Return the HTML page."""
    style = resources.files("rsgrpo").joinpath("report", "assets", "style.css").read_text(encoding="utf-8") + STYLE
    facts = " · ".join(f"{escape(what)} {escape(value)}" for what, value in report.facts)
    tables = "".join(_html_table(*table) for table in _tables(report))
    num_wrong = sum(item.answer["strict"].em < 1 for item in report.evaluation.items)
    lead = f"{len(report.worst)} of {num_wrong} questions that are not answered exactly."
    if report.other is not None:
        lead += " Those come first that lost most against the other file."
    cases = "".join(_case(item, report) for item in report.worst) or '<p class="empty">None.</p>'
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(report.title)}</title>
<style>{style}</style>
</head>
<body>
<header><div class="wide"><div class="brand">Evaluation</div><h1>{escape(report.title)}</h1>
<p class="quiet">{facts}</p>
<nav><a href="#scores">Scores</a><a href="#cases">Worst cases</a></nav></div></header>
<main class="wide">
<section id="scores">{tables}</section>
<section id="cases"><h2>Worst cases</h2><p class="lead">{lead}</p>{cases}</section>
</main>
</body>
</html>
"""


Table = tuple[str, str, Sequence[str], list[list[str]]]


def _tables(report: Report) -> list[Table]:
    """Return (title, note, header, rows) of every table."""
    estimates = report.evaluation.estimates
    tables: list[Table] = []
    for mode in MODES:
        rows = []
        for split in SPLITS:
            found = [estimates[f"{mode}/{split}/{metric}"] for metric in ANSWER_METRICS]
            rows.append([split, f"{found[0].count:.0f}", *(_percent(estimate) for estimate in found)])
        header = ["split", "questions", *(LABELS[metric] for metric in ANSWER_METRICS)]
        tables.append((f"Answers, {mode}", MODE_NOTES[mode], header, rows))
    decisions = [
        (label, prefix)
        for label, prefix in (
            ("abstaining", "abstention/"),
            ("pages in the evidence block", "evidence/slot_"),
            ("pages cited in reasoning or answer", "evidence/citation_"),
        )
        if f"{prefix}f1" in estimates
    ]
    tables.append(
        (
            "Decisions",
            "",
            ["decision", "precision", "recall", "F1"],
            [
                [label, *(_percent(estimates[prefix + name]) for name in ("precision", "recall", "f1"))]
                for label, prefix in decisions
            ],
        )
    )
    rates = [("well formed", "output/format_ok"), ("cut off at the token limit", "output/truncated")]
    rates.append(("abstained", "abstention/rate"))
    rows = [[label, _percent(estimates[name])] for label, name in rates]
    rows += [[COUNT_LABELS[what], str(count)] for what, count in _counts(report.evaluation).items()]
    tables.append(("Outputs", "", ["", "share or count"], rows))
    if report.differences is not None:
        tables.append(_difference_table(report.differences))
    return tables


def _difference_table(differences: Mapping[str, Difference]) -> Table:
    rows = [
        [mode, split, *(_signed(differences[f"{mode}/{split}/{metric}"]) for metric in ANSWER_METRICS)]
        for mode in MODES
        for split in SPLITS
    ]
    note = "This file minus the other, question by question; p from a paired permutation test."
    return "Against the other file", note, ["mode", "split", *(LABELS[metric] for metric in ANSWER_METRICS)], rows


def _signed(found: Difference) -> str:
    if found.value is None or found.p_value is None:
        return NOTHING_COUNTED
    interval = ""
    if found.low is not None and found.high is not None:
        interval = f" ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    p_value = "p < 0.001" if found.p_value < 0.001 else f"p {found.p_value:.3f}"
    return f"{100 * found.value:+.1f}{interval}, {p_value}"


def _counts(evaluation: Evaluation) -> dict[str, int]:
    return {
        "num_questions": len(evaluation.items),
        "num_missing": evaluation.num_missing,
        "num_failed": evaluation.num_failed,
        "num_unknown": evaluation.num_unknown,
        "num_repeated": evaluation.num_repeated,
    }


def _percent(estimate: Estimate) -> str:
    if estimate.value is None:
        return NOTHING_COUNTED
    if estimate.low is None or estimate.high is None:
        return f"{100 * estimate.value:.1f}"
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def _html_table(title: str, note: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    lead = f'<p class="lead">{escape(note)}</p>' if note else ""
    table = f'<div class="sheet"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<div><h3>{escape(title)}</h3>{lead}{table}</div>"


def _case(item: ItemScore, report: Report) -> str:
    """Return one question: gold and answer, each page with what was found on it, and the whole output."""
    question, parsed, prediction = item.question, item.parsed, item.prediction
    assert parsed is not None
    assert prediction is not None
    gold = " | ".join(question.answers) if question.is_sufficient else "(the pages are insufficient)"
    scores = ", ".join(f"F1 {mode} {100 * item.answer[mode].f1:.0f}" for mode in MODES)
    said = [("gold", gold), ("answer", parsed.answer), ("scores", scores), ("reasoning", parsed.think)]
    if report.other is not None:
        other = next(found for found in report.other.items if found.question.id == question.id)
        said.insert(2, ("other file", other.parsed.answer if other.parsed else "(missing)"))
    if parsed.errors:
        said.append(("faults", "; ".join(parsed.errors)))
    terms = "".join(f"<dt>{escape(what)}</dt><dd>{escape(text)}</dd>" for what, text in said if text)
    pages = "".join(_page(item, number, source) for number, source in enumerate(question.images, start=1))
    return (
        f'<article class="case"><h3>{escape(question.question)}</h3><p class="quiet">{escape(question.id)}</p>'
        f'<dl class="said">{terms}</dl><div class="pages">{pages}</div>'
        f"<details><summary>whole output</summary><pre>{escape(prediction.text)}</pre></details></article>\n"
    )


def _page(item: ItemScore, number: int, source: ImageSource) -> str:
    assert item.parsed is not None
    slot = next((slot for slot in item.parsed.evidence if slot.index == number), None)
    written = slot.text if slot else "(no slot)"
    lines = [f"<p><b>[{number}]</b> {escape(written)}</p>"]
    if item.question.evidence is not None:
        gold = item.question.evidence[number - 1]
        claims, holds = slot is not None and slot.relevant, not is_irrelevant(gold)
        verdict, kind = {
            (True, True): ("found", "good"),
            (False, False): ("rightly left out", "good"),
            (True, False): ("claimed without ground", "bad"),
            (False, True): ("overlooked", "bad"),
        }[claims, holds]
        lines.append(f'<p class="quiet">gold: {escape(gold)}</p><p class="{kind}">{verdict}</p>')
    return f"<div>{_picture(source, number)}{''.join(lines)}</div>"


def _picture(source: ImageSource, number: int) -> str:
    """Return the page at a screen's size; a note where it cannot be read."""
    try:
        image = decode(source)
    except PromptError as error:
        return f'<p class="empty">{escape(str(error))}</p>'
    kind = "PNG" if max(image.size) <= 256 else "JPEG"
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=78)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="page {number}: {escape(name_of(source))}" src="data:image/{kind.lower()};base64,{data}">'
