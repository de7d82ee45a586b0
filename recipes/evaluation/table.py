"""Several evaluations in one table: `python -m recipes.evaluation.table runs/evaluation/a runs/evaluation/b`.

Results that were scored or predicted differently do not stand in one table unless that is said.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.answers.options import Parser
from recipes.evaluation.intervals import Estimate
from recipes.evaluation.page import percent
from rollout.errors import run_program
from rollout.files import json_object
from rsgrpo.errors import ConfigError, InputError

RESULTS_FILE = "results.json"
FACTS = (
    "question_hash", "num_questions", "protocol", "extractor", "settings", "prompt_hash", "pages", "pixels", "decoding",
)  # fmt: skip
"""What two numbers must share to be compared; `settings` is there where they are not known."""
SHOWN = ("strict/global/em", "strict/global/f1", "pages/f1", "joint/f1", "chain/score")
NONE = "-"


@dataclass(frozen=True, slots=True)
class Entry:
    """One evaluation. name: of its folder. facts: by FACTS, NONE where it has none. scores: name -> estimate."""

    name: str
    facts: Mapping[str, str]
    scores: Mapping[str, Estimate]


def read_entry(path: Path) -> Entry:
    """Read a folder that recipes.evaluate wrote, or its results.json.

    Raises:
        InputError: there is no such file, or it is not one of recipes.evaluate.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path} has no {RESULTS_FILE}: name a folder that recipes.evaluate wrote")
    found = json_object(file.read_bytes(), str(file))
    if not isinstance(found.get("scores"), dict):
        raise InputError(f"{file} has no scores: it is not a file of recipes.evaluate")
    scores = {name: Estimate(**one) for name, one in _flat(found["scores"]).items()}
    return Entry(file.parent.name, {name: str(found.get(name, NONE)) for name in FACTS}, scores)


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    if "value" in node:
        return {prefix[:-1]: dict(node)}
    return {name: one for key, value in node.items() for name, one in _flat(value, f"{prefix}{key}/").items()}


def table(entries: Sequence[Entry], scores: Sequence[str] = (), *, mixed: bool = False) -> str:
    """Return a Markdown table, a line per evaluation, above it what they share.

    scores: their names in results.json; none chooses the protocol's and SHOWN. mixed: allow evaluations that were made
        differently; what differs becomes a column.

    Raises:
        ConfigError: they were made differently. InputError: a score is in none of them.
    """
    differ = [name for name in FACTS if len({entry.facts[name] for entry in entries}) > 1]
    if differ and not mixed:
        lines = [f"  {name}: {' | '.join(f'{one.name}: {one.facts[name]}' for one in entries)}" for name in differ]
        raise ConfigError(
            "these evaluations were made differently, so their numbers are not of the models alone:\n"
            + "\n".join(lines)
            + "\nEvaluate them alike, or set --mixed, which shows the differences beside the numbers."
        )
    known = list(dict.fromkeys(name for entry in entries for name in entry.scores))
    if unknown := [name for name in scores if name not in known]:
        raise InputError(f"no evaluation has the score {unknown[0]}; they have {', '.join(known)}")
    names = list(scores) or [name for name in known if name.startswith("protocol/") or name in SHOWN]
    shared = [f"- {name.replace('_', ' ')}: {entries[0].facts[name]}" for name in FACTS if name not in differ]
    header = ["evaluation", *(name.replace("_", " ") for name in differ), *names]
    rows = [
        [entry.name, *(entry.facts[name] for name in differ), *(_shown(entry.scores.get(name)) for name in names)]
        for entry in entries
    ]
    rule = ["---"] * len(header)
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (header, rule, *rows)]
    return "\n".join([*(line for line in shared if not line.endswith(f": {NONE}")), "", *lines])


def _shown(found: Estimate | None) -> str:
    return NONE if found is None else percent(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    top = Parser(prog="python -m recipes.evaluation.table", description=__doc__.split("\n")[0])
    top.add_argument("results", metavar="FOLDER", type=Path, nargs="+", help="that recipes.evaluate wrote")
    top.add_argument("--scores", default="", help="names in results.json, separated by commas")
    top.add_argument("--mixed", action="store_true", help="allow different protocols and settings, and show them")
    options = top.parse_args(argv)

    def work() -> None:
        entries = [read_entry(path) for path in options.results]
        print(table(entries, [name for name in options.scores.split(",") if name], mixed=options.mixed))

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
