"""Turn one row into a prompt: the user message, the gold columns, and every reason to refuse the row."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from rewards.api import RewardError
from rewards.truth import GoldError, load_gold_reader
from rollout.config import InputsConfig
from rollout.inputs.images import PromptError
from rollout.inputs.videos import VIDEO_MARK
from rollout.types import ImageSource, Prompt
from rsgrpo.config.train import DataConfig, PromptConfig
from rsgrpo.data.checked_images import CheckedImages
from rsgrpo.data.faults import (
    BROKEN,
    EMPTY_PROMPT,
    FOREIGN,
    MARKS,
    NO_IMAGE,
    OVERLONG,
    TOO_MANY_IMAGES,
    TOO_MANY_VIDEOS,
    VIDEO_MARKS,
    BadRow,
)
from rsgrpo.data.foreign import IMAGE_MARK, first_of, how_to_convert, in_our_columns
from rsgrpo.data.rows import ImageFolder, Row, image_entries
from rsgrpo.data.turns import TURNS, BrokenTurns, has_turns, images_of, read_turns
from rsgrpo.data.videos import Video, in_order, read_video, require_marks, video_entries
from rsgrpo.errors import InputError

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_PLACEHOLDERS = ("question", "images", "image_marks", "numbered_marks", "videos")


class RowFault(Exception):
    """A row cannot be used; the fields are those of `BadRow`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def read_template(prompt: PromptConfig) -> str:
    """Return the prompt template, "" for none.

    Raises:
        InputError: the file is missing, or the template has an unknown placeholder or none for the question.
    """
    template = prompt.template
    if prompt.file:
        try:
            template = Path(prompt.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"prompt.file {prompt.file} cannot be read: {error}") from error
    names = _PLACEHOLDER.findall(template)
    unknown = sorted(set(names) - set(_PLACEHOLDERS))
    if unknown:
        known = ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
        raise InputError(f"the prompt template has the unknown placeholder {{{unknown[0]}}}. Use {known}")
    if template and "question" not in names:
        raise InputError("the prompt template must have {question}. To use the rows' own prompts, leave it empty")
    return template


def render_template(template: str, question: str, num_images: int, num_videos: int = 0) -> str:
    r"""Fill a template.

    {images} becomes one numbered line per image, {numbered_marks} the same without line breaks and colons,
    {image_marks} the images and nothing else, {videos} the videos, one per line.

    >>> render_template("{images}\n{question}", "what amount?", 2)
    '[1]: <image>\n[2]: <image>\nwhat amount?'
    """
    numbers = range(1, num_images + 1)
    values = {
        "question": question,
        "images": "\n".join(f"[{number}]: {IMAGE_MARK}" for number in numbers),
        "image_marks": IMAGE_MARK * num_images,
        "videos": "\n".join([VIDEO_MARK] * num_videos),
        "numbered_marks": "".join(f"[{number}]{IMAGE_MARK}" for number in numbers),
    }
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def as_ours(columns: Mapping[str, Any], data: DataConfig) -> Mapping[str, Any]:
    """Return a row in the columns of the configuration, whichever trainer it was written for.

    Raises:
        ValueError: it is like the row of another trainer and lacks something.
    """
    names = data.columns
    found = in_our_columns(
        columns, texts=(names["prompt"], names["question"]), image=names["image"], video=names["video"]
    )
    renamed = {"prompt": names["prompt"], "answer": names["answer"], "id": names["id"]}
    return columns if found is columns else {renamed.get(name, name): value for name, value in found.items()}


class TokenCounter(Protocol):
    """The part of an input processor that a check uses."""

    inputs: InputsConfig

    def count_tokens(self, prompt: Prompt) -> int:
        """Return the tokens of the rendered prompt; PromptError if it cannot be rendered."""
        ...


class RowChecker:
    """Turns one row into a prompt, or says why it cannot; called from several threads.

    checked: images that need not be decoded again. It remembers every image, and may be replaced.

    Raises:
        InputError: the template or the gold reader of the configuration cannot be used.
    """

    def __init__(
        self,
        data: DataConfig,
        prompt: PromptConfig,
        images: ImageFolder,
        processor: TokenCounter,
        checked: CheckedImages | None = None,
    ) -> None:
        self.checked = checked or CheckedImages()
        self._data, self._images, self._processor = data, images, processor
        self._video_columns = (data.columns["video"], "videos")
        self._template, self._system = read_template(prompt), prompt.system
        try:
            self._read_gold = load_gold_reader(data.gold)
        except RewardError as error:
            raise InputError(str(error)) from error

    def check(self, row: Row) -> Prompt | BadRow:
        """Return the row's prompt, or the first reason not to use it."""
        columns, fault = row.columns, row.fault
        try:
            columns = as_ours(columns, self._data)
        except ValueError as error:
            fault = str(error)
        given_id = columns.get(self._data.columns["id"])
        row_id = f"row-{row.number}" if given_id is None else str(given_id)
        try:
            if fault:
                raise RowFault(BROKEN, fault)
            system = "" if columns is row.columns else str(columns.get("system") or "")
            return self._prompt(row_id, columns, self._system or system)
        except (RowFault, GoldError) as why:
            return BadRow(row.place, row_id, why.reason, why.detail)

    def _prompt(self, row_id: str, columns: Mapping[str, Any], system: str) -> Prompt:
        images, videos = self._row_images(columns), self._row_videos(columns)
        text, question = self._texts(columns, len(images), len(videos))
        used = [*(self._data.columns[name] for name in ("prompt", "answer", "image")), *self._video_columns]
        others = {name: value for name, value in columns.items() if name not in used}
        turns = self._turns(others)
        answer = columns.get(self._data.columns["answer"])
        truth = others if turns and answer is None else self._read_gold(answer, others, len(images))
        if turns:
            truth = {**truth, TURNS: turns}
        num_marks = text.count(IMAGE_MARK)
        if num_marks != len(images):
            raise RowFault(
                MARKS, f"{num_marks} <image> marks for {len(images)} images{self._why_marks_differ(num_marks)}"
            )
        if why := require_marks(text, len(videos)):
            raise RowFault(VIDEO_MARKS, why)
        seen, times = in_order(text, images, videos)
        prompt = Prompt(row_id, text, seen, truth, question, system, videos=times)
        for source in (*seen, *images_of(turns)):
            if isinstance(source, str) and not os.path.isfile(source):
                what = "is a folder, not an image" if os.path.isdir(source) else "does not exist; see data.image_dir"
                raise RowFault(NO_IMAGE, f"image {source} {what}")
            if fault := self.checked.fault_of(source):
                raise RowFault("unreadable image", fault)
        try:
            num_tokens = self._processor.count_tokens(prompt)
        except PromptError as error:
            raise RowFault("unusable prompt", str(error)) from error
        limit = self._processor.inputs.max_prompt_tokens
        if num_tokens > limit:
            pixels = self._processor.inputs.max_pixels
            raise RowFault(
                OVERLONG,
                f"{num_tokens:,} tokens, inputs.max_prompt_tokens is {limit:,}; with inputs.max_pixels={pixels:,} "
                f"{len(images)} pages take most of them",
            )
        return replace(prompt, num_tokens=num_tokens)

    def _turns(self, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the turns of a row that brings a trajectory to imitate."""
        try:
            return read_turns(columns[TURNS], self._images) if has_turns(columns.get(TURNS)) else []
        except BrokenTurns as error:
            raise RowFault("broken turns", str(error)) from error

    def _row_images(self, columns: Mapping[str, Any]) -> tuple[ImageSource, ...]:
        entries = image_entries(columns.get(self._data.columns["image"]))
        limit = self._processor.inputs.max_images
        if len(entries) > limit:
            raise RowFault(TOO_MANY_IMAGES, f"{len(entries)} images, inputs.max_images is {limit}")
        try:
            return tuple(self._images.resolve(entry) for entry in entries)
        except (ValueError, PromptError) as error:
            raise RowFault("unreadable image", str(error)) from error

    def _row_videos(self, columns: Mapping[str, Any]) -> list[Video]:
        inputs = self._processor.inputs
        try:
            entries = video_entries(first_of(columns, self._video_columns))
            if len(entries) > inputs.max_videos:
                raise RowFault(TOO_MANY_VIDEOS, f"{len(entries)} videos, inputs.max_videos is {inputs.max_videos}")
            return [read_video(entry, self._images, inputs) for entry in entries]
        except (ValueError, PromptError) as error:
            raise RowFault("unreadable video", str(error)) from error

    def _why_marks_differ(self, num_marks: int) -> str:
        if not self._template:
            return ""
        if num_marks == 0:
            return "; the prompt template does not show them: write {images} into it"
        return "; the question itself has marks, and the template adds its own"

    def _texts(self, columns: Mapping[str, Any], num_images: int, num_videos: int) -> tuple[str, str]:
        """Return the user message and the bare question."""
        data = self._data
        own, question = columns.get(data.columns["prompt"]), columns.get(data.columns["question"])
        convert = how_to_convert(columns)
        kind = FOREIGN if convert else EMPTY_PROMPT
        if own is not None and not isinstance(own, str):
            got = f"column {data.columns['prompt']!r} must be text, got {type(own).__name__}"
            raise RowFault(kind, got + convert)
        if question is None:
            question = (own or "").replace(IMAGE_MARK, "").replace(VIDEO_MARK, "").strip()
        question = str(question)
        text = render_template(self._template, question, num_images, num_videos) if self._template else (own or "")
        if not text.replace(IMAGE_MARK, "").strip() or (self._template and not question):
            column, has = data.columns["question" if self._template else "prompt"], ", ".join(columns)
            raise RowFault(kind, f"column {column!r} is missing or empty; the row has {has}{convert}")
        return text, question
