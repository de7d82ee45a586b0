"""Try a reward on responses in a file.

Prints, per response, the score and the text with the reward's scope highlighted (in colour on a terminal, between
[[ ]] elsewhere), then the mean, the spread, missing scope markers and errors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rewards.api import Credit, Response, Reward, RewardError, Span, Turn, check_score, load_reward
from rewards.calls import Lanes
from rewards.evisrag import parse_gold
from rewards.failures import where_raised
from rewards.hints import why_never, why_no_scope
from rewards.turns import place_turns

POLICIES = {
    "void": "the reward teaches nothing there",
    "widen": "the reward teaches the whole response there",
    "error": "each counts as an error",
}
TEXT_KEYS = ("text", "response")
NUM_TOKENS_KEYS = ("num_tokens", "response_length")
TRUTH_KEYS = ("truth", "ground_truth", "answer")
HIGHLIGHTS = ("\x1b[30;42m", "\x1b[30;46m")
RESET = "\x1b[0m"
NUM_HINT_RESPONSES = 20

EPILOG = """\
FILE is a .jsonl with one response per line:
  text (or response)                  the response
  truth, or ground_truth or answer    an object with `answers` and `evidence`, such an object as a JSON string, a list
                                      of answers, or gold text with <evidence> and <answer> blocks; if none of these
                                      is given, the row's own columns are the truth
  num_tokens, truncated, question, images, id   if the reward reads them
or the stored rollouts of a run: a .parquet file, its folder, or the run's folder.

A reward in a file rewards.py of yours needs Python's -P, or Python runs that file in the place of this program:
  python -P -m rewards rewards:mine responses.jsonl

examples:
  python -m rewards rewards.evisrag:accuracy responses.jsonl --limit 3
  python -m rewards rewards.evisrag:overlong runs/demo --args '{"max_tokens": 512, "buffer_tokens": 128}' --summary
  python -m rewards my_rewards.pages:cites_page runs/demo/rollouts/step_000010.parquet

exit status: 0 all scored, 1 the reward failed on some response, 2 it could not be tried."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What a reward did with one response.

    value: None if it did not apply or failed. spans: the characters it teaches. missed: whether a scope marker is
    missing. error: the exception and where it was raised; "" if there was none. kind: the same for all rows where the
    same line failed.
    """

    value: float | tuple[Credit, ...] | None = None
    spans: tuple[Span, ...] = ()
    missed: bool = False
    error: str = ""
    kind: str = ""

    @property
    def score(self) -> float | None:
        if isinstance(self.value, tuple):
            return statistics.fmean(credit.score for credit in self.value)
        return self.value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rewards",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("reward", metavar="MODULE:FUNCTION", help="The reward, such as rewards.evisrag:accuracy.")
    add("files", metavar="FILE", nargs="+", type=Path, help="Responses (.jsonl) or stored rollouts.")
    add("--args", metavar="JSON", default="{}", help="Keyword arguments of the reward, as a JSON object.")
    add("--limit", metavar="N", type=int, default=0, help="Score only the first N responses.")
    add("--policy", choices=POLICIES, default="void", help="What a missing marker means (default: %(default)s).")
    add("--timeout", metavar="S", type=float, default=0, help="Time limit per response in seconds (default: none).")
    add("--summary", action="store_true", help="Print only the summary and the errors.")
    options = parser.parse_args(argv)
    try:
        function = load_reward(options.reward, parse_arguments(options.args))
        status = asyncio.run(try_all(function, options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RewardError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse_arguments(text: str) -> dict[str, Any]:
    """Return the keyword arguments in a JSON object."""
    try:
        arguments = json.loads(text)
    except json.JSONDecodeError as error:
        raise RewardError(f"--args is not JSON: {error}. Write it like '{{\"max_tokens\": 512}}'.") from error
    if not isinstance(arguments, dict):
        raise RewardError(f"--args must be a JSON object of keyword arguments, got {text}")
    return arguments


async def try_all(function: Reward, options: argparse.Namespace) -> int:
    """Score every response, print each and the summary; return the exit status."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    trials: list[Trial] = []
    seen: list[Response] = []
    responses = chain.from_iterable(map(read_responses, options.files))
    for name, response in islice(responses, options.limit if options.limit > 0 else None):
        trial = await try_reward(function, response, options.policy, options.timeout)
        is_new = trial.kind not in {earlier.kind for earlier in trials}
        trials.append(trial)
        seen.append(response)
        if is_new if trial.error else not options.summary:
            print(describe(name, response, trial, colour), end="\n\n")
    if not trials:
        raise RewardError(f"no responses in {', '.join(map(str, options.files))}")
    print(summarise(options.reward, trials, options.policy))
    applied = [trial for trial in trials if trial.value is not None]
    has_errors = any(trial.error for trial in trials)
    if not applied and not has_errors:
        print(await why_never(function, seen[:NUM_HINT_RESPONSES]))
    elif applied and all(trial.missed for trial in applied):
        print(why_no_scope(function, seen))
    if not any(response.num_tokens for response in seen):
        print("note: no response has num_tokens, so rewards of length saw 0 tokens")
    return int(has_errors)


async def try_reward(function: Reward, response: Response, policy: str, timeout_s: float = 0) -> Trial:
    """Call the reward once and find what it teaches; an exception becomes the trial's error.

    timeout_s: time limit; 0 is none.
    """
    try:
        value = check_score(await Lanes().call(function, response, timeout_s), len(response.text))
        spans = [credit.span for credit in value] if isinstance(value, tuple) else [function.scope(response)]
    except TimeoutError:
        text = f"took longer than --timeout {timeout_s:g} s"
        return Trial(error=text, kind=text)
    except (Exception, SystemExit) as error:
        where, name = where_raised(error, function), type(error).__name__
        what = f"it called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"{name}: {error}"
        return Trial(error=f"{what} ({where})", kind=f"{name} at {where}")
    if value is None:
        return Trial()
    missed = None in spans
    if missed and isinstance(value, float) and policy == "error":
        text = "a scope marker is missing, and --policy is 'error'"
        return Trial(missed=True, error=text, kind=text)
    if missed and isinstance(value, float) and policy == "widen":
        spans = [Span(0, len(response.text))]
    return Trial(value, tuple(span for span in spans if span is not None), missed)


def read_responses(path: Path) -> Iterator[tuple[str, Response]]:
    """Yield (name, response) of a .jsonl file, or of a stored rollout file or folder.

    Raises:
        RewardError: there is nothing to read, or a line is not a response.
    """
    if not path.exists():
        raise RewardError(f"no file or folder {path}")
    if path.is_dir():
        names = ("step_*.parquet", "val_*.parquet")  # validation only where nothing has been trained on yet
        found = [sorted([*path.glob(name), *path.glob(f"rollouts/{name}")]) for name in names]
        files = next(filter(None, found), [])
        if not files:
            raise RewardError(f"no step_*.parquet or val_*.parquet in {path} or {path / 'rollouts'}")
        yield from chain.from_iterable(map(_read_parquet, files))
    else:
        yield from _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Response]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                if not isinstance(row, dict):
                    raise ValueError(f"a line must be a JSON object, got {type(row).__name__}")
                yield str(row.get("id", f"line {number}")), _to_response(row)
            except ValueError as error:
                raise RewardError(f"{path}, line {number}: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Response]]:
    import pyarrow.parquet as pq

    columns = {"prompt_id", "sample", "text", "num_tokens", "truncated", "question", "images", "truth", "observations"}
    try:
        file = pq.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise ValueError("there is no column 'text', so these are not stored rollouts")
        for batch in file.iter_batches(batch_size=64, columns=[c for c in file.schema_arrow.names if c in columns]):
            for row in batch.to_pylist():
                run_folder = path.parent.parent  # images that were sampled from bytes are stored relative to it
                for shown in (row, *(row.get("observations") or ())):
                    shown["images"] = [os.path.join(run_folder, image) for image in shown.get("images") or ()]
                yield f"{path.stem} {row.pop('prompt_id', '')}#{row.pop('sample', '')}", _to_response(row)
    except ValueError as error:  # of pyarrow too: ArrowInvalid
        raise RewardError(f"{path}: {error}") from error


def _to_response(row: Mapping[str, Any]) -> Response:
    text = _first(row, TEXT_KEYS)
    if not isinstance(text, str):
        raise ValueError(f"the text must be under 'text' or 'response', got the keys {', '.join(row) or 'none'}")
    num_tokens = _first(row, NUM_TOKENS_KEYS) or 0
    if not isinstance(num_tokens, int):
        raise ValueError(f"num_tokens must be an integer, got {num_tokens!r}")
    return Response(
        text=text,
        truth=_truth(row),
        num_tokens=num_tokens,
        truncated=bool(row.get("truncated", False)),
        question=row.get("question") or "",
        images=tuple(row.get("images") or ()),
        turns=tuple(_turns(text, row.get("observations"))),
    )


def _turns(text: str, observations: Any) -> Iterator[Turn]:
    """Yield the turns of a stored rollout; none of a row that is not one."""
    found = [o for o in observations if isinstance(o, Mapping)] if isinstance(observations, list) else None
    if found is not None and all("at_char" in observation for observation in found):
        yield from place_turns(text, map(_answer, found))


def _answer(observation: Mapping[str, Any]) -> tuple[int, Turn]:
    """Return where the turn ended that a stored observation answers, and the answer."""
    facts = json.loads(observation["facts"])
    answer = Turn(Span(0, 0), observation["text"], tuple(observation["images"]), facts, observation["fault"])
    return observation["at_char"], answer


def _first(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _truth(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the gold columns of a row, from any of the forms that the help text lists."""
    gold = _first(row, TRUTH_KEYS)
    if isinstance(gold, str) and gold.lstrip().startswith("{"):
        gold = json.loads(gold)
    if isinstance(gold, dict):
        return gold
    columns = {key: value for key, value in row.items() if key not in TEXT_KEYS}
    if isinstance(gold, list):
        return {**columns, "answers": gold}
    return columns if gold is None else {**columns, **parse_gold(str(gold))}


def describe(name: str, response: Response, trial: Trial, colour: bool) -> str:
    """Return the lines that show a response: its name and score, its credits if there are several, its text."""
    heading = "did not apply" if trial.score is None else f"{trial.score:.4f}"
    heading += "  (scope marker missing)" if trial.missed else ""
    lines = [f"--- {name}: " + (f"ERROR {trial.error}" if trial.error else heading)]
    for credit in trial.value if isinstance(trial.value, tuple) else ():
        place = f"characters {credit.span.start}-{credit.span.end}" if credit.span else "nothing to teach"
        lines.append(f"    {credit.key}: {credit.score:.4f} on {place}")
    return "\n".join([*lines, highlight(response.text, trial.spans, colour)])


def highlight(text: str, spans: Sequence[Span], colour: bool) -> str:
    """Return the text with its spans marked and control characters made visible; overlapping spans are cut short.

    >>> highlight("abc", [Span(1, 2)], colour=False)
    'a[[b]]c'
    """
    pieces, position = [], 0
    for index, span in enumerate(sorted(spans, key=lambda span: (span.start, span.end))):
        start, end = max(span.start, position), max(span.end, position)
        opening, closing = (HIGHLIGHTS[index % 2], RESET) if colour else ("[[", "]]")
        pieces += [_visible(text[position:start]), opening, _visible(text[start:end]), closing]
        position = end
    return "".join([*pieces, _visible(text[position:])])


def _visible(text: str) -> str:
    """Escape control characters, so that model output cannot control the terminal."""
    return "".join(
        char if char in "\n\t" or char.isprintable() or (char.isspace() and char > "\x7f") else repr(char)[1:-1]
        for char in text
    )


def summarise(target: str, trials: Sequence[Trial], policy: str) -> str:
    """Return the closing lines: how often the reward applied, its mean and spread, missed markers, errors."""
    scores = [trial.score for trial in trials if trial.score is not None]
    num_missed = sum(trial.missed for trial in trials)
    lines = [f"{target} on {len(trials)} responses", f"  applied         {len(scores)} of {len(trials)}"]
    if scores:
        spread = f"std {statistics.stdev(scores):.4f}, " if len(scores) > 1 else ""
        mean = statistics.fmean(scores)
        lines.append(f"  score           mean {mean:.4f}, {spread}{min(scores):g} to {max(scores):g}")
    lines.append(f"  missed marker   {num_missed}" + (f" ({policy}: {POLICIES[policy]})" if num_missed else ""))
    lines.append(f"  errors          {sum(bool(trial.error) for trial in trials)}")
    kinds = Counter(trial.kind for trial in trials if trial.error)
    first = {trial.kind: trial.error for trial in reversed(trials)}
    lines += [f"    {count} x {' '.join(first[kind].split())}" for kind, count in kinds.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
