"""Convert packed images, tables of questions and LLaMA-Factory's SFT files to our rows.

`recipes.files.row_check` checks whether rows can be trained on.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from recipes.answers.batch import rewrite
from recipes.answers.questions import ANSWER_KEYS, ID_KEYS, IMAGE_KEYS, IMAGE_MARK, QUESTION_KEYS, first_of, read_table
from rewards.evisrag import read_gold
from rollout.files import write_bytes
from rollout.inputs.images import PromptError, bytes_of, opened, read_size
from rollout.types import ImageSource
from rsgrpo.data.foreign import from_trainer, trainer_of
from rsgrpo.data.image_packs import packed_images, packs_in
from rsgrpo.data.prompts import render_template
from rsgrpo.data.rows import ImageFolder, Row, find_images, image_entries, image_paths, read_rows
from rsgrpo.errors import InputError

USER_ROLES, ASSISTANT_ROLES = ("human", "user"), ("gpt", "assistant")
UNSUPPORTED = ("videos", "audios", "tools", "history", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What `unpack` did. missing: "place: path" of each image that a row names and no file has."""

    num_written: int
    num_there: int
    num_rows: int
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Converted:
    """What `convert` did. faults: "place: why" of each row left out. system: the system message of all rows."""

    num_rows: int
    faults: tuple[str, ...]
    system: str


def unpack(folder: Path, out: Path, advance: Callable[[], None] = lambda: None) -> Unpacked:
    """Write the images of `images*.parquet` to their paths below `out`, and copy the .jsonl files there.

    A file that already has these bytes is not rewritten, so an interrupted call can be repeated.

    Raises:
        InputError: there is nothing to unpack, a path leads out of `out`, or two images claim one path.
    """
    packs = packs_in(folder) if folder.is_dir() else []
    if not packs:
        raise InputError(f"{folder} has no images.parquet (or images-*.parquet) to unpack")
    num_written, num_there, seen = 0, 0, set[Path]()
    for pack in packs:
        for name, content in packed_images(pack):
            target = _inside(out, name, pack)
            is_there = target.is_file() and target.stat().st_size == len(content) and target.read_bytes() == content
            if target in seen and not is_there:
                raise InputError(f"{pack} has two different images for the path {name}")
            seen.add(target)
            if not is_there:
                target.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(target, content)
            num_there, num_written = num_there + is_there, num_written + (not is_there)
            advance()
    rows: list[Row] = []
    for file in sorted(folder.glob("*.jsonl")):
        rows += read_rows(str(file))[0]
        if out.resolve() != folder.resolve():
            shutil.copy(file, out / file.name)
    missing = [
        f"{row.place}: {path}"
        for row in rows
        for key in IMAGE_KEYS
        for path in image_paths(row.columns.get(key))
        if not (out / path).is_file()
    ]
    return Unpacked(num_written, num_there, len(rows), tuple(missing))


def convert(
    source: Path, out: Path, template: str, *, image_dir: str = "", keep_good: bool = False, trainer: str = ""
) -> Converted:
    """Write the rows of a table of questions, or of a sharegpt or alpaca file, to `out` in our layout.

    template: the user message of rows that only have a question.
    keep_good: write the good rows even if others cannot be converted; otherwise, nothing is written then.
    trainer: whose rows they are, one of `rsgrpo.data.foreign.TRAINERS`; "" tells it by their columns.

    Raises:
        InputError: the file cannot be read, or its rows have different system messages.
    """
    readers = {".csv": read_csv, ".tsv": read_table}
    if reader := readers.get(source.suffix):
        rows, folder = reader(source), source.parent
    else:
        rows, folder = read_rows(str(source), keep_broken=True)
    images = find_images(folder, image_dir)
    written: list[dict[str, Any]] = []
    faults: list[str] = []
    systems: dict[str, str] = {}
    for row in rows:
        try:
            converted, system = _convert_row(row, images, template, out, source.stem, trainer)
        except ValueError as error:
            faults.append(f"{row.place}: {error}")
            continue
        written.append(converted)
        systems.setdefault(system, row.place)
    if len(systems) > 1:
        named = "; ".join(f"{place}: {system!r:.60}" for system, place in systems.items())
        raise InputError(
            f"{source} has rows with different system messages ({named}). Split it into one file per message."
        )
    if written and (keep_good or not faults):
        out.parent.mkdir(parents=True, exist_ok=True)
        rewrite(out, written)
    return Converted(len(written), tuple(faults), next(iter(systems), ""))


def read_csv(path: Path) -> list[Row]:
    """Read a table with a header line. Image cells are split at ";"; a cell that starts with "[" is a JSON list.

    Raises:
        InputError: it cannot be read, or a line has more cells than the header.
    """
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, strict=True)
            for number, cells in enumerate(table, start=1):
                place = f"line {table.line_num} of {path.name}"
                if None in cells:
                    raise InputError(f"{place} has more cells than the header. Quote cells that contain a comma.")
                columns = {name: _cell(name, value, place) for name, value in cells.items() if value}
                rows.append(Row(place, number, columns))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table: {error}") from error
    if not rows:
        raise InputError(f"{path} has no rows")
    return rows


def portable_image(source: ImageSource, out: Path) -> str:
    """Return a page's path relative to the file `out`; bytes, packed or not, are written beside it."""
    if isinstance(source, str):
        return os.path.relpath(source, out.parent)
    content = bytes_of(source)
    with opened(content) as image:
        suffix = (image.format or "img").lower()
    path = out.parent / f"{out.stem}_images" / f"{hashlib.sha256(content).hexdigest()[:16]}.{suffix}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    return os.path.relpath(path, out.parent)


def _convert_row(
    row: Row, folder: ImageFolder, template: str, out: Path, stem: str, trainer: str
) -> tuple[dict[str, Any], str]:
    """Return our row and its system message; raise ValueError if it cannot be converted."""
    if row.fault:
        raise ValueError(row.fault)
    trainer = trainer or trainer_of(row.columns)
    columns = from_trainer(row.columns, trainer)
    if refused := [name for name in UNSUPPORTED if columns.get(name)]:
        raise ValueError(f"column {refused[0]!r} cannot be converted")
    images = [folder.resolve(entry) for entry in image_entries(first_of(columns, IMAGE_KEYS))]
    for source in images:
        if isinstance(source, str) and not os.path.isfile(source):
            raise ValueError(f"image {source} does not exist (see --image-dir)")
        try:
            read_size(source)
        except PromptError as error:
            raise ValueError(str(error)) from error
    system = str(columns.get("system") or "")
    if trainer in ("verl", "easyr1", "trl", "swift"):
        kept = ("prompt", "answer", "evidence", "data_source", "extra_info")
        fields = {name: columns[name] for name in kept if name in columns}
    elif "conversations" in columns or "messages" in columns:
        own_system, prompt, answer = _turns(columns.get("conversations") or columns.get("messages"))
        system, fields = system or own_system, {"prompt": prompt, "answer": answer}
    elif "instruction" in columns:
        fields = _alpaca(columns)
    else:
        fields = _own(columns, template, len(images))
    if (num_marks := fields["prompt"].count(IMAGE_MARK)) != len(images):
        raise ValueError(f"{num_marks} {IMAGE_MARK} marks for {len(images)} images")
    row_id = first_of(columns, ID_KEYS)
    head = {"id": f"{stem}-{row.number:06d}" if row_id is None else str(row_id)}
    return head | fields | {"image": [portable_image(source, out) for source in images]}, system


def _turns(turns: Any) -> tuple[str, str, str]:
    """Return (system, user, assistant) of a conversation of one turn."""
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError("a conversation must be a list of objects with from and value, or role and content")
    said = [(str(turn.get("from", turn.get("role"))), turn.get("value", turn.get("content"))) for turn in turns]
    system = said.pop(0)[1] if said and said[0][0] == "system" else ""
    if not isinstance(system, str):
        raise ValueError(f"the system message must be text, got {system!r:.80}")
    roles = [role for role, _ in said]
    if len(said) != 2 or roles[0] not in USER_ROLES or roles[1] not in ASSISTANT_ROLES:
        had = ", ".join(roles) or "no turns"
        raise ValueError(f"a row must be one question and its answer, but this conversation has {had}")
    if not all(isinstance(text, str) and text.strip() for _, text in said):
        raise ValueError("a turn of the conversation has no text")
    return system, said[0][1], said[1][1]


def _alpaca(columns: Mapping[str, Any]) -> dict[str, Any]:
    instruction, further, answer = (columns.get(name) or "" for name in ("instruction", "input", "output"))
    if not all(isinstance(text, str) for text in (instruction, further, answer)) or not answer.strip():
        raise ValueError("an alpaca row needs the text columns instruction and output")
    return {"prompt": f"{instruction}\n{further}" if further else instruction, "answer": answer}


def _own(columns: Mapping[str, Any], template: str, num_images: int) -> dict[str, Any]:
    question, answer = first_of(columns, QUESTION_KEYS), first_of(columns, ANSWER_KEYS)
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"no question: a row needs a column {' or '.join(QUESTION_KEYS)}, got {', '.join(columns)}")
    if isinstance(answer, list):
        answer = [str(text) for text in answer]
    elif isinstance(answer, str | int | float) and "</answer>" not in str(answer):
        answer = [str(answer)]
    evidence = columns.get("evidence")
    read_gold(answer, {"evidence": evidence}, num_images)
    fields = {"question": question, "prompt": render_template(template, question, num_images), "answer": answer}
    return fields if evidence is None else fields | {"evidence": evidence}


def _cell(name: str, value: str, place: str) -> Any:
    if value.startswith("["):
        try:
            return json.loads(value)
        except ValueError as error:
            raise InputError(f"{place}: column {name!r} starts with [ but is not a JSON list: {error}") from error
    return [path.strip() for path in value.split(";") if path.strip()] if name in IMAGE_KEYS else value


def _inside(out: Path, name: str, pack: Path) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        raise InputError(f"{pack} has an image with the path {name!r:.80}, which leads out of the folder")
    return out / path
