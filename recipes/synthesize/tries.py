"""Ask a teacher until each item has a response that is kept; count what was not, and what it all cost.

Asking, and resuming after a stop, is in `recipes.answers.batch`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes.answers.batch import answer_batch, read_lines
from recipes.answers.types import Answerer
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


@dataclass(frozen=True, slots=True)
class TryConfig:
    """tries: responses per item until one is kept. price_in, price_out: of a million prompt (response) tokens."""

    tries: int = 4
    price_in: float = 0.0
    price_out: float = 0.0

    def __post_init__(self) -> None:
        at_least(1, tries=self.tries)
        at_least(0, price_in=self.price_in, price_out=self.price_out)


def ask_until_kept(
    prompts: Sequence[Prompt], judge: Judge, config: TryConfig, answerer: Answerer, file: Path, console: Console
) -> None:
    """Ask each prompt, whose id is the item's, until a response is kept or no try is left; all go to `file`.

    Raises:
        RsgrpoError: the teacher gave up; what was finished is in the file, and the same call resumes from there.
    """
    for number in range(1, config.tries + 1):
        kept = first_kept([prompt.id for prompt in prompts], read_lines(file), judge, config.tries)
        asked = [replace(prompt, id=_try_id(prompt.id, number)) for prompt in prompts if prompt.id not in kept]
        if not asked:
            return
        console.info(f"try {number} of {config.tries}: {len(asked)} to ask")
        answer_batch(asked, answerer, file, share_equal=False, console=console)


def first_kept(items: Sequence[str], lines: Mapping[str, Line], judge: Judge, tries: int) -> dict[str, Line]:
    """Return item -> its first response that is kept."""
    kept: dict[str, Line] = {}
    for item in items:
        for _, line in _tried(item, lines, tries):
            if judge(item, line) == KEPT:
                kept[item] = line
                break
    return kept


def tries_report(items: Sequence[str], lines: Mapping[str, Line], judge: Judge, config: TryConfig) -> dict[str, Any]:
    """Return how many items were kept, why other responses were not, and what they cost.

    Tokens are None if the teacher told none for some response.
    """
    verdicts: Counter[str] = Counter()
    asked: list[Line] = []
    kept_at: Counter[int] = Counter()
    for item in items:
        for number, line in _tried(item, lines, config.tries):
            verdict = judge(item, line)
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


def _tried(item: str, lines: Mapping[str, Line], tries: int) -> Iterator[tuple[int, Line]]:
    for number in range(1, tries + 1):
        if (line := lines.get(_try_id(item, number))) is not None:
            yield number, line


def _total(lines: Sequence[Line], name: str) -> int | None:
    counts = [line.get(name) for line in lines if line["finish_reason"] != "error"]
    return None if None in counts else sum(count for count in counts if count is not None)


def _try_id(item: str, number: int) -> str:
    return f"{item}#{number}"
