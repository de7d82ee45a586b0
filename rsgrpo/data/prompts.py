"""From one row to one prompt: rendering the user message, reading the gold answer, and every reason to refuse the row.

Knows what a row must have to be trained on; nothing of file formats (`rsgrpo.data.rows`), of data sets or of sampling.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rewards.evisrag import parse_gold
from rollout.config import InputsConfig
from rollout.inputs.images import PromptError
from rollout.inputs.processor import IMAGE_MARK
from rollout.types import ImageSource, Prompt
from rsgrpo.config.train import DataConfig, PromptConfig
from rsgrpo.data.checked_images import CheckedImages
from rsgrpo.data.rows import ImageFolder, Row, image_entries
from rsgrpo.errors import InputError

OVERLONG = "over-long prompt"
BROKEN = "broken row"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_PLACEHOLDERS = ("question", "images", "image_marks", "numbered_marks")
_ANSWER_BLOCK = re.compile(r"<answer>.*?</answer>", re.DOTALL)
_GOLD_TAG = re.compile(r"</?(answer|evidence)>")


@dataclass(frozen=True, slots=True)
class BadRow:
    """Why a row cannot be used.

    place, id: of the row. reason: one of a few kinds, under which rows are counted. detail: what exactly is wrong.
    """

    place: str
    id: str
    reason: str
    detail: str


class RowFault(Exception):
    """A row cannot be used: a kind of fault under which rows are counted, and what exactly is wrong."""

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
    unknown = sorted({name for name in names if name not in _PLACEHOLDERS})
    if unknown:
        raise InputError(
            f"the prompt template has the unknown placeholder {{{unknown[0]}}}; use {{question}}, {{images}}, "
            "{image_marks}, {numbered_marks}"
        )
    if template and "question" not in names:
        raise InputError("the prompt template must have {question}; to use the rows' own prompts, leave it empty")
    return template


def render_template(template: str, question: str, num_images: int) -> str:
    r"""Fill a template.

    {images} becomes one numbered line per image, {numbered_marks} the same without line breaks and colons,
    {image_marks} the images and nothing else.

    >>> render_template("{images}\n{question}", "what amount?", 2)
    '[1]: <image>\n[2]: <image>\nwhat amount?'
    """
    images = "\n".join(f"[{number}]: {IMAGE_MARK}" for number in range(1, num_images + 1))
    numbered = "".join(f"[{number}]{IMAGE_MARK}" for number in range(1, num_images + 1))
    values = {
        "question": question,
        "images": images,
        "image_marks": IMAGE_MARK * num_images,
        "numbered_marks": numbered,
    }
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


class TokenCounter(Protocol):
    """What a check needs of an input processor."""

    inputs: InputsConfig

    def count_tokens(self, prompt: Prompt) -> int:
        """Return the tokens of the rendered prompt; PromptError if it cannot be rendered."""
        ...


class RowChecker:
    """Makes one row into a prompt or says why not; called from several threads."""

    def __init__(
        self,
        data: DataConfig,
        template: str,
        system: str,
        images: ImageFolder,
        processor: TokenCounter,
        checked: CheckedImages,
    ) -> None:
        self._data = data
        self._template = template
        self._system = system
        self._images = images
        self._processor = processor
        self._checked = checked

    def check(self, row: Row) -> Prompt | BadRow:
        columns = row.columns
        given_id = columns.get(self._data.id_key)
        row_id = f"row-{row.number}" if given_id is None else str(given_id)
        try:
            if row.fault:
                raise RowFault(BROKEN, row.fault)
            return self._prompt(row_id, columns)
        except RowFault as fault:
            return BadRow(row.place, row_id, fault.reason, fault.detail)

    def _prompt(self, row_id: str, columns: Mapping[str, Any]) -> Prompt:
        images = self._row_images(columns)
        text, question = self._texts(columns, len(images))
        truth = self._truth(columns, len(images))
        prompt = Prompt(row_id, text, images, truth, question, self._system)
        num_marks = text.count(IMAGE_MARK)
        if num_marks != len(images):
            raise RowFault("<image> marks differ from images", f"{num_marks} <image> marks for {len(images)} images")
        for source in images:
            self._check_image(source)
        try:
            num_tokens = self._processor.count_tokens(prompt)
        except PromptError as error:
            raise RowFault("unusable prompt", str(error)) from error
        limit = self._processor.inputs.max_prompt_tokens
        if num_tokens > limit:
            raise RowFault(OVERLONG, f"{num_tokens:,} tokens, inputs.max_prompt_tokens is {limit:,}")
        return prompt

    def _row_images(self, columns: Mapping[str, Any]) -> tuple[ImageSource, ...]:
        entries = image_entries(columns.get(self._data.image_key))
        limit = self._processor.inputs.max_images
        if len(entries) > limit:
            raise RowFault("too many images", f"{len(entries)} images, inputs.max_images is {limit}")
        try:
            return tuple(self._images.resolve(entry) for entry in entries)
        except ValueError as error:
            raise RowFault("unreadable image", str(error)) from error

    def _check_image(self, source: ImageSource) -> None:
        if isinstance(source, str) and not os.path.isfile(source):
            raise RowFault("missing image", f"image {source} does not exist; see data.image_dir")
        fault = self._checked.fault_of(source)
        if fault:
            raise RowFault("unreadable image", fault)

    def _texts(self, columns: Mapping[str, Any], num_images: int) -> tuple[str, str]:
        """Return the user message and the bare question."""
        data = self._data
        own = columns.get(data.prompt_key)
        question = columns.get(data.question_key)
        if own is not None and not isinstance(own, str):
            raise RowFault("empty prompt", f"column {data.prompt_key!r} must be text, got {type(own).__name__}")
        question = (own or "").replace(IMAGE_MARK, "").strip() if question is None else str(question)
        text = render_template(self._template, question, num_images) if self._template else (own or "")
        if not text.replace(IMAGE_MARK, "").strip() or (self._template and not question):
            column = data.question_key if self._template else data.prompt_key
            raise RowFault("empty prompt", f"column {column!r} is missing or empty; the row has {', '.join(columns)}")
        return text, question

    def _truth(self, columns: Mapping[str, Any], num_images: int) -> dict[str, Any]:
        data = self._data
        used = (data.prompt_key, data.answer_key, data.image_key)
        truth = {name: value for name, value in columns.items() if name not in used}
        answer = columns.get(data.answer_key)
        truth.update(read_gold(answer, truth.pop("evidence", None), data.answer_key))
        entries = truth.get("evidence")
        if entries is not None and len(entries) != num_images:
            raise RowFault(
                "evidence entries differ from images",
                f"gold evidence has {len(entries)} entries for {num_images} images",
            )
        return truth


def read_gold(answer: Any, evidence: Any, column: str = "answer") -> dict[str, Any]:
    """Return the truth columns of a gold answer: `answers`, `evidence` (if known) and `gold` (if `answer` is text).

    answer: text with <evidence> and <answer> blocks; or, beside an `evidence` column, plain text; or a list of accepted
        plain answers.
    evidence: the row's own list of texts, one per image; it counts where `answer` has no evidence block.

    Raises:
        RowFault: there is no gold answer, it lacks its tags, or a gold column has the wrong type.
    """
    truth: dict[str, Any] = {}
    if isinstance(answer, str) and answer.strip():
        truth = {"gold": answer, "answers": [answer.strip()]}
        if _GOLD_TAG.search(answer) or evidence is None:
            if not _ANSWER_BLOCK.search(answer):
                raise RowFault("gold answer without <answer> tags", f"column {column!r}: {answer!r:.80}")
            truth.update(parse_gold(answer))
    elif _is_texts(answer) and answer:
        if any(_GOLD_TAG.search(text) for text in answer):
            raise RowFault("unusable gold", f"a list in column {column!r} must hold plain texts, got {answer!r:.80}")
        truth = {"answers": list(answer)}
    else:
        raise RowFault("no gold answer", f"column {column!r} must have text or a list of texts, got {answer!r:.80}")
    if "evidence" in truth:
        return truth
    if evidence is not None:
        if not _is_texts(evidence):
            raise RowFault(
                "unusable gold", f"column 'evidence' must be a list, one text per image, got {evidence!r:.80}"
            )
        truth["evidence"] = list(evidence)
    elif "gold" in truth:
        raise RowFault("gold answer without <evidence> tags", f"column {column!r}: {answer!r:.80}")
    return truth


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)
