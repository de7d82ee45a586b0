"""Write an evaluation into the README.md of an exported model: scores with all that they depend on."""

from __future__ import annotations

import re
from pathlib import Path

from recipes.evaluation.intervals import Estimate
from recipes.evaluation.page import Results
from recipes.evaluation.scoring import MODES
from rollout.files import write_text
from rsgrpo.errors import InputError
from rsgrpo.records.integrity import SUMS_FILE, write_sums
from rsgrpo.report.model_card import CARD_FILE

HEADING = "## Evaluations"
_BEFORE = "## Use"
_FACTS = ("protocol", "question hash", "extractor", "prompt hash", "pages", "pixels", "decoding")


def add_to_card(export: Path, results: Results) -> None:
    """Add the evaluation to the card, or put it in the place of an earlier one of the same benchmark and facts.

    Raises:
        InputError: the folder has no card of ours.
    """
    card = export / CARD_FILE
    if not card.is_file():
        raise InputError(f"model_card=true: {export} has no {CARD_FILE}; it is written into exports of rsgrpo")
    text = card.read_text(encoding="utf-8")
    facts = dict(results.facts)
    name = re.sub(r"[^\w.-]+", "-", f"{facts.get('benchmark', '')} {facts.get('protocol', '')}").strip("-")
    start, end = f"<!-- evaluation {name} -->", "<!-- end -->"
    block = f"{start}\n{_section(results)}{end}\n"
    if start in text:
        before, _, rest = text.partition(start)
        text = before + block + rest.partition(f"{end}\n")[2]
    elif HEADING in text:
        text = text.replace(f"{HEADING}\n\n", f"{HEADING}\n\n{block}\n", 1)
    else:
        before, use, rest = text.partition(f"{_BEFORE}\n")
        text = f"{before.rstrip()}\n\n{HEADING}\n\n{block}\n{use}{rest}"
    write_text(card, text)
    if (export / SUMS_FILE).is_file():
        write_sums(export)


def _section(results: Results) -> str:
    facts, estimates = dict(results.facts), results.evaluation.estimates
    shown = {f"answers, {mode}: EM": f"{mode}/global/em" for mode in MODES}
    shown |= {name: name for name in estimates if name.startswith(("protocol/", "pages/f1", "joint/f1", "chain/"))}
    rows = [
        f"| {label} | {100 * one.value:.1f}{_interval(one)} |"
        for label, name in shown.items()
        if (one := estimates.get(name)) is not None and one.value is not None
    ]
    about = [f"- {name}: {facts[name]}" for name in _FACTS if name in facts]
    title = f"### {facts.get('benchmark', results.title)}, {len(results.evaluation.items)} questions\n"
    return "\n".join([title, *about, "", "| score, 95% interval | % |", "|---|---|", *rows, ""])


def _interval(one: Estimate) -> str:
    return "" if one.low is None or one.high is None else f" ({100 * one.low:.1f} to {100 * one.high:.1f})"
