"""Ask a teacher until each item has a response that is kept; count what was not, and what it all cost.

Each try is another draw for the same prompt. Asking, and resuming after a stop, is in `recipes.answers.batch`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes.answers.batch import answer_batch, read_lines
from recipes.answers.types import Answerer
from rollout.files import write_text
from rollout.keys import at_least
from rollout.types import Prompt
from rsgrpo.records.console import Console

KEPT = "kept"
FAILED = "request failed"
CUT_OFF = "cut off at the token limit"

Line = Mapping[str, Any]
"""A result line of `recipes.infer`."""

Judge = Callable[[str, Line], str]
"""Takes an item's id and a response to it; returns KEPT, or why it is not kept."""


Writer = Callable[[Mapping[str, Line], dict[str, Any]], dict[str, Any]]
"""Takes the kept line of each item that has one and the report on the tries; writes the rows, returns the report."""


@dataclass(frozen=True, slots=True)
class RetryConfig:
    """tries: responses per item until one is kept. price_in, price_out: of a million prompt (response) tokens."""

    tries: int = 4
    price_in: float = 0.0
    price_out: float = 0.0

    def __post_init__(self) -> None:
        at_least(1, **{"--tries": self.tries})
        at_least(0, **{"--price-in": self.price_in, "--price-out": self.price_out})


def ask_and_report(
    prompts: Sequence[Prompt],
    judge: Judge,
    config: RetryConfig,
    answerer: Answerer,
    out: Path,
    console: Console,
    write: Writer,
) -> dict[str, Any]:
    """Ask each prompt, whose id is the item's, until a response is kept or no try is left.

    OUT.tries.jsonl gets every response, from which the same call resumes; OUT.report.json the report that is returned.

    Raises:
        RsgrpoError: the teacher gave up. All files are written from what was finished.
    """
    file, items = out.with_suffix(".tries.jsonl"), [prompt.id for prompt in prompts]
    try:
        for number in range(1, config.tries + 1):
            kept = first_kept(items, read_lines(file), judge, config.tries)
            asked = [replace(prompt, id=_try_id(prompt.id, number)) for prompt in prompts if prompt.id not in kept]
            if not asked:
                break
            console.info(f"try {number} of {config.tries}: {len(asked)} to ask")
            answer_batch(asked, answerer, file, share_equal=False, console=console)
    finally:
        lines = read_lines(file)
        out.parent.mkdir(parents=True, exist_ok=True)
        tried = tries_report(items, lines, judge, config)
        report = write(first_kept(items, lines, judge, config.tries), tried) | {"model": answerer.name}
        write_text(out.with_suffix(".report.json"), json.dumps(report, indent=2) + "\n")
    return report


def first_kept(items: Sequence[str], lines: Mapping[str, Line], judge: Judge, tries: int) -> dict[str, Line]:
    """Return item -> its first response that is kept."""
    return {item: line for item, _, line, verdict in _judged(items, lines, judge, tries) if verdict == KEPT}


def tries_report(items: Sequence[str], lines: Mapping[str, Line], judge: Judge, config: RetryConfig) -> dict[str, Any]:
    """Return how many items were kept, why other responses were not, and what they cost.

    Tokens are None if the teacher reported none for some response.
    """
    judged = list(_judged(items, lines, judge, config.tries))
    verdicts = Counter(verdict for *_, verdict in judged)
    kept_at = Counter(number for _, number, _, verdict in judged if verdict == KEPT)
    num_kept, num_answered = verdicts.pop(KEPT, 0), len(judged) - verdicts[FAILED]
    answered = [line for _, _, line, verdict in judged if verdict != FAILED]
    tokens_in, tokens_out = (_total(answered, name) for name in ("num_prompt_tokens", "num_response_tokens"))
    cost = None
    if tokens_in is not None and tokens_out is not None:
        cost = round((tokens_in * config.price_in + tokens_out * config.price_out) / 1e6, 6)
    return {
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


def fault_of(line: Line) -> str | None:
    """Return FAILED or CUT_OFF where a response did not come whole."""
    return {"error": FAILED, "length": CUT_OFF}.get(line["finish_reason"])


def _judged(
    items: Sequence[str], lines: Mapping[str, Line], judge: Judge, tries: int
) -> Iterator[tuple[str, int, Line, str]]:
    """Yield (item, number of the try, response, verdict), of each item up to the first response that is kept."""
    for item in items:
        for number in range(1, tries + 1):
            if (line := lines.get(_try_id(item, number))) is not None:
                verdict = judge(item, line)
                yield item, number, line, verdict
                if verdict == KEPT:
                    break


def _total(lines: Sequence[Line], name: str) -> int | None:
    counts = [line.get(name) for line in lines]
    return None if None in counts else sum(count for count in counts if count is not None)


def _try_id(item: str, number: int) -> str:
    return f"{item}#{number}"
