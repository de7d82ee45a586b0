"""What a model did at the page desk as HTML: its turns, and what the desk answered to each. All of it is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from recipes.retrieval.answers.page_view import writing_html
from recipes.retrieval.answers.progress import AnswerProgress
from recipes.retrieval.desk.calls import without_call
from rollout.types import Observation
from rsgrpo.data.foreign import IMAGE_MARK

_THINK = re.compile(r"</?think>")
MAX_SAID = 600  # characters of a turn that are shown


def steps_html(progress: AnswerProgress) -> str:
    """Return the finished turns in order, each with its call in words, and the one that is being written."""
    lines, start = [], 0
    for step in progress.steps or ():
        said = without_call(progress.text[start : step.at_char]).strip()
        lines.append(f"<li>{_said(said)}{_call(step)}</li>")
        start = step.at_char
    steps = f'<ol class="steps">{"".join(lines)}</ol>' if lines else ""
    if progress.answered is not None:
        return steps
    now = progress.text[start:].strip()
    return steps + (writing_html(now) if now or not lines else "<div>reading</div>")


def _said(text: str) -> str:
    text = _THINK.sub("", text).strip()
    shown = text if len(text) <= MAX_SAID else f"{text[:MAX_SAID]} ..."
    return f'<div class="said">{escape(shown)}</div>' if shown else ""


def _call(step: Observation) -> str:
    if step.fault:
        return f'<div class="faults">{escape(step.text.replace(IMAGE_MARK, "").strip() or step.fault)}</div>'
    facts = step.facts
    if facts.get("call") == "search":
        found = "".join(map(_page, facts["numbers"])) or "nothing"
        return f"searched for \u201c{escape(facts['query'])}\u201d: {found}"
    if facts.get("call") == "open":
        return f"opened {_page(facts['number'])}"
    return f"zoomed in on {_page(facts['number'])} {_part(facts)}"


def _page(number: int) -> str:
    return f'<button popovertarget="page-{number}">[{number}]</button>'


def _part(facts: Mapping[str, Any]) -> str:
    left, top, right, bottom = (f"{100 * edge:.0f}" for edge in facts["box"])
    return f"from {left} to {right}% across, {top} to {bottom}% down"
