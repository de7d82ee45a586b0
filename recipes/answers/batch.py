"""Answer many questions into one jsonl file: resumable by id, deduplicated, and never losing finished answers.

The file has one line per question, appended as answers arrive and put into the order of the questions at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from recipes.answers.parsing import Form, ParsedAnswer, parse_lenient, parse_trajectory
from recipes.answers.predictions import FAILED
from recipes.answers.questions import prompt_hash
from recipes.answers.types import Answer, Answerer
from rewards.evisrag import BLOCKS
from rollout.files import naming_full_disk, write_text
from rollout.types import ImageSource, Observation, Prompt
from rsgrpo.errors import InputError, RsgrpoError
from rsgrpo.records.console import Console

FURTHER_COUNTS = ("num_observation_tokens", "num_image_tokens")
_UNREAD = ParsedAnswer("", False, "", (), "", (), False, ())


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """What one call of `answer_batch` did.

    asked: prompts sent to the model. reused: questions whose line was there already.
    shared: questions that got the answer of an equal prompt. failed: questions whose line is an error.
    """

    asked: int
    reused: int
    shared: int
    failed: int


def result_line(output: Answer, model: str, pages: Sequence[ImageSource] | None = None) -> dict[str, Any]:
    """Return the JSON line of an answer: what was asked, the parsed fields, and the raw text.

    An output with an error has empty fields, its error in `errors`, and "error" as finish_reason.

    Args:
        pages: that the answer may name; default: the prompt's images.
    """
    prompt = output.prompt
    shown = prompt.images if pages is None else pages
    if output.error and not output.text:
        parsed = _UNREAD
    elif output.observations is None:
        parsed = parse_lenient(output.text, shown)
    else:
        known = _numbered(shown, output.observations)
        parsed = parse_trajectory(output.text, _last_turn(output.observations), known, _form_of(prompt))
    fields = parsed.as_dict()
    if output.error:
        fields["errors"] = [output.error, *fields["errors"]]
    return {
        "id": prompt.id,
        "question": prompt.question,
        **fields,
        "raw": output.text,
        "finish_reason": output.finish_reason,
        "prompt_hash": prompt_hash(prompt),
        "model": model,
        "num_prompt_tokens": output.num_prompt_tokens,
        "num_response_tokens": output.num_response_tokens,
        **{name: count for name in FURTHER_COUNTS if (count := getattr(output, name)) is not None},
    } | ({} if output.observations is None else {"steps": [step_line(step) for step in output.observations]})


def _form_of(prompt: Prompt) -> Form:
    """Return what a trajectory is asked to be: with an answer, and with the blocks that its prompt shows."""
    shown = f"{prompt.system}\n{prompt.text}"
    wanted = tuple(name for name in BLOCKS if name == "answer" or f"<{name}>" in shown)
    return Form(wanted, is_all=False, every_page=False)


def _last_turn(observations: Sequence[Observation]) -> int:
    return observations[-1].at_char if observations else 0


def _numbered(images: Sequence[ImageSource], observations: Sequence[Observation]) -> Sequence[ImageSource]:
    """Return the pages that a policy knows by a number: those of its prompt, or those that its searches found.

    A page that it opened whole is what it was shown, so that its path is known; another one is its thumbnail.
    """
    known: dict[int, ImageSource] = dict(enumerate(images, start=1))
    for step in observations:
        numbers, number = step.facts.get("numbers"), step.facts.get("number")
        if isinstance(numbers, list):
            known = dict(zip(numbers, step.images, strict=False)) | known
        if isinstance(number, int) and step.facts.get("call") == "open" and step.images:
            known[number] = step.images[0]
    return [known[number] for number in sorted(known)]


def step_line(step: Observation) -> dict[str, Any]:
    """Return what an environment did between two turns as JSON; images are counted.

    at_char: where in the raw text the turn before it ends.
    """
    about = {"at_char": step.at_char, "fault": step.fault, "text": step.text, "images": len(step.images)}
    return {**step.facts, **about}


def answer_batch(
    prompts: Sequence[Prompt], answerer: Answerer, out: Path, *, share_equal: bool, console: Console
) -> BatchSummary:
    """Answer all prompts that `out` does not answer yet; lines of failed questions are asked again.

    Args:
        share_equal: ask equal prompts with different ids once; correct where sampling is greedy.

    Raises:
        RsgrpoError: `out` holds answers to other prompts or of another model; two prompts share an id; the disk is
            full; or the answerer gave up, and what was finished is in `out`.
    """
    unique = _by_id(prompts)
    done = read_lines(out)
    for prompt_id, line in done.items():
        if prompt_id in unique:
            _refuse_other(out, line, unique[prompt_id], answerer.name)
    reused = {prompt_id for prompt_id in unique if prompt_id in done and done[prompt_id]["finish_reason"] != FAILED}
    twins: dict[Any, list[Prompt]] = {}
    for prompt in unique.values():
        if prompt.id not in reused:
            key = (prompt.system, prompt.text, prompt.images) if share_equal else prompt.id
            twins.setdefault(key, []).append(prompt)
    leaders = {group[0].id: group for group in twins.values()}
    num_written = 0
    asked = [group[0] for group in leaders.values()]
    total = sum(map(len, leaders.values()))
    with naming_full_disk(out), _appending(out) as file, console.phase("answers", total=total) as bar:
        try:
            for output in answerer.answer(asked) if asked else ():
                for prompt in leaders[output.prompt.id]:
                    line = result_line(replace(output, prompt=prompt), answerer.name)
                    file.write(json.dumps(line) + "\n")
                    done[prompt.id] = line
                    num_written += 1
                    bar.advance()
                file.flush()
        except RsgrpoError as error:
            raise RsgrpoError(
                f"{error}\n{num_written} answers of this run and {len(reused)} earlier ones are kept in {out}; "
                "run the same command to resume"
            ) from error
    rewrite(out, [done[prompt_id] for prompt_id in (*unique, *(set(done) - set(unique))) if prompt_id in done])
    num_failed = sum(done[prompt_id]["finish_reason"] == FAILED for prompt_id in unique if prompt_id in done)
    num_shared = sum(len(group) - 1 for group in leaders.values())
    return BatchSummary(len(leaders), len(reused), num_shared, num_failed)


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Return id -> the last line of that id in a file that `answer_batch` wrote, {} if there is none.

    A last line that was cut off while it was written is dropped from the file.

    Raises:
        RsgrpoError: another line is not one of ours.
    """
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines: dict[str, dict[str, Any]] = {}
    for number, text in enumerate(whole.split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            lines[str(line["id"])] = line
            line["finish_reason"], line["prompt_hash"], line["model"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"line {number} of {path} is not an answer that this program wrote ({type(error).__name__}: {error}); "
                "choose another output file"
            ) from error
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return lines


def rewrite(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Replace the file by these lines, whole or not at all."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def _by_id(prompts: Sequence[Prompt]) -> dict[str, Prompt]:
    unique: dict[str, Prompt] = {}
    for prompt in prompts:
        known = unique.setdefault(prompt.id, prompt)
        if (known.system, known.text, known.images) != (prompt.system, prompt.text, prompt.images):
            raise InputError(f"two different questions have the id {prompt.id!r}; give each its own")
    return unique


def _refuse_other(out: Path, line: dict[str, Any], prompt: Prompt, model: str) -> None:
    for what, then, now in (("model", line["model"], model), ("prompt", line["prompt_hash"], prompt_hash(prompt))):
        if then != now:
            raise InputError(
                f"{out} answers question {prompt.id!r} with another {what} ({then}, now {now}); choose another output "
                "file, or remove this one"
            )


def _appending(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error
