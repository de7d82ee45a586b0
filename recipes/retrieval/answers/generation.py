"""From retrieved pages to one answer, by VisRAG's settings.

    multi_image            all pages in one prompt
    horizontal, vertical   all pages pasted into one image
    weighted               one prompt per page; the answer that maximises softmax(scores) x exp(mean log-probability)
    text                   the pages' text (layer or OCR) where the template shows images

Oracle pages are a choice of pages, not a setting: pass the gold pages.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from recipes.answers.batch import result_line
from recipes.answers.questions import IMAGE_MARK, Question, to_prompt
from recipes.answers.reader import Reader
from recipes.answers.types import Answer
from recipes.retrieval.search.found import FoundPage
from rollout.inputs.images import decode
from rollout.types import Prompt
from rsgrpo.data.prompts import render_template
from rsgrpo.errors import InputError, RsgrpoError

Setting = Literal["multi_image", "horizontal", "vertical", "weighted", "text"]
MAX_HISTORY = 3  # earlier questions that a follow-up is asked with
MAX_SIDE = 20_000  # pixels of a pasted image
MAX_QUESTION_CHARACTERS = 4_000
_IMAGE_PLACES = re.compile(r"\{(?:images|image_marks|numbered_marks)\}")


def check_question(question: str) -> None:
    """Raise InputError for a question that is empty, too long, or not whole characters."""
    if not question.strip():
        raise InputError("the question is empty")
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise InputError(f"the question has {len(question):,} characters, more than {MAX_QUESTION_CHARACTERS:,}")
    if question != question.encode(errors="ignore").decode():
        raise InputError("the question contains half a character (a lone surrogate); type it again")


@dataclass(frozen=True, slots=True)
class AskedQuestion:
    """One question with the pages that were retrieved for it."""

    id: str
    question: str
    pages: tuple[FoundPage, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with its answer.

    line: the parsed result, as `recipes.infer` writes it. sources: the pages that the answer may cite, in the order of
    its indexes. weights: per page, for `weighted`; else empty. pasted: the pages are one image and share index 1.
    """

    asked: AskedQuestion
    line: dict[str, Any]
    sources: tuple[FoundPage, ...]
    weights: tuple[float, ...] = ()
    pasted: bool = False

    @property
    def cited(self) -> list[FoundPage]:
        """Return the pages that the answer's evidence or citations name, in order of rank."""
        numbers = {slot["index"] for slot in self.line["evidence"] if slot["relevant"]} | set(self.line["citations"])
        return [page for page in self.sources if self.index_of(page) in numbers]

    def index_of(self, page: FoundPage) -> int:
        """Return the index by which the answer names a page; pasted pages can only be named together."""
        return 1 if self.pasted else self.sources.index(page) + 1


def answer_all(questions: Sequence[AskedQuestion], setting: Setting, reader: Reader) -> list[Answered]:
    """Answer every question from its pages, in order.

    Raises:
        RsgrpoError: a question has no pages, or `weighted` meets an answerer without log-probabilities.
    """
    answered = {found.asked.id: found for found in answer_each(questions, setting, reader)}
    return [answered[asked.id] for asked in questions]


def answer_each(questions: Sequence[AskedQuestion], setting: Setting, reader: Reader) -> Iterator[Answered]:
    """Yield every question as soon as it is answered, in any order; raises as `answer_all`."""
    asked_of: dict[str, AskedQuestion] = {}
    missing: dict[str, int] = {}
    prompts = []
    for asked in questions:
        own = prompts_of(asked, setting, reader)
        prompts += own
        asked_of |= {prompt.id: asked for prompt in own}
        missing[asked.id] = len(own)
    answers: dict[str, Answer] = {}
    for answer in reader.answerer.answer(prompts):
        asked = asked_of[answer.prompt.id]
        answers[answer.prompt.id] = answer
        missing[asked.id] -= 1
        if not missing[asked.id]:
            yield _answered(asked, setting, answers, reader.answerer.name)


def answer_stream(asked: AskedQuestion, setting: Setting, reader: Reader) -> Iterator[str | Answered]:
    """Yield the text in pieces as it is written, if the answerer can and there is one prompt, and finally the answer.

    Raises:
        As `answer_all`.
    """
    if setting == "weighted":  # several texts are written, and only one of them is the answer
        yield from answer_all([asked], setting, reader)
        return
    (prompt,) = prompts_of(asked, setting, reader)
    for piece in reader.answerer.stream(prompt):
        yield piece if isinstance(piece, str) else _answered(asked, setting, {asked.id: piece}, reader.answerer.name)


def prompts_of(asked: AskedQuestion, setting: Setting, reader: Reader) -> list[Prompt]:
    """Return the prompts of one question: one, or one per page for `weighted`."""
    if not asked.pages:
        raise RsgrpoError(f"{short(asked.question)!r} has no pages to answer from")
    if setting == "text":
        return [text_prompt(asked, reader)]
    paths = tuple(page.image for page in asked.pages)
    questions = [Question(asked.id, asked.question, paths)]
    if setting == "weighted":
        questions = [Question(f"{asked.id}#{page.rank}", asked.question, (page.image,)) for page in asked.pages]
    elif setting != "multi_image":
        questions = [Question(asked.id, asked.question, (paste(paths, setting),))]
    return [to_prompt(question, reader.template, reader.system) for question in questions]


def text_prompt(asked: AskedQuestion, reader: Reader) -> Prompt:
    """Return a prompt with the numbered texts of the pages where its template shows images.

    Raises:
        RsgrpoError: no page has text.
    """
    if not any(page.text.strip() for page in asked.pages):
        nothing = f"none of the pages of {short(asked.question)!r} has text"
        raise RsgrpoError(f"{nothing}; use their images, or ingest with --ocr")
    template = reader.text_template or reader.template
    texts = "\n\n".join(
        f"[{number}]\n{page.text.replace(IMAGE_MARK, '')}" for number, page in enumerate(asked.pages, start=1)
    )
    # each part of the template is filled by itself, because a page may hold what looks like a placeholder
    first, *others = (render_template(part, asked.question, 0) for part in _IMAGE_PLACES.split(template))
    text = f"{first}{texts}{''.join(others)}" if others else f"{texts}\n\n{first}"
    return Prompt(asked.id, text, (), {"is_sufficient": True}, asked.question, reader.system)


def with_history(question: str, history: Sequence[tuple[str, str]]) -> str:
    """Return a question preceded by the last ones with their answers."""
    if not history:
        return question
    earlier = [f"Earlier question: {asked}\nIts answer: {answer}" for asked, answer in history[-MAX_HISTORY:]]
    return "\n".join([*earlier, f"Question now: {question}"])


def short(question: str) -> str:
    """Return a question shortened for a message."""
    return textwrap.shorten(question, 80)


def paste(paths: Sequence[str], direction: Literal["horizontal", "vertical"]) -> bytes:
    """Return a PNG of all pages on white, side by side or one below the other.

    Raises:
        RsgrpoError: the result would be too large.
    """
    images = [decode(path) for path in paths]
    widths, heights = [image.width for image in images], [image.height for image in images]
    across = direction == "horizontal"
    size = (sum(widths), max(heights)) if across else (max(widths), sum(heights))
    if max(size) > MAX_SIDE:
        raise InputError(f"{len(paths)} pages pasted together are {size[0]} x {size[1]} pixels; use fewer (lower -k)")
    canvas, offset = Image.new("RGB", size, "white"), 0
    for image in images:
        canvas.paste(image, (offset, 0) if across else (0, offset))
        offset += image.width if across else image.height
    stream = io.BytesIO()
    canvas.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def page_weights(scores: Sequence[float], mean_logprobs: Sequence[float]) -> list[float]:
    """Return softmax(scores) x exp(mean log-probability) per page.

    >>> page_weights([0.0, 0.0], [0.0, math.log(0.5)])
    [0.5, 0.25]
    """
    top = max(scores)
    exponentials = [math.exp(score - top) for score in scores]
    total = sum(exponentials)
    return [e / total * math.exp(logprob) for e, logprob in zip(exponentials, mean_logprobs, strict=True)]


def _answered(asked: AskedQuestion, setting: Setting, outputs: dict[str, Answer], model: str) -> Answered:
    if setting != "weighted":
        pasted = setting in ("horizontal", "vertical")
        images = tuple(page.image for page in asked.pages) if setting == "text" else None
        return Answered(asked, result_line(outputs[asked.id], model, images), asked.pages, pasted=pasted)
    found = [outputs[f"{asked.id}#{page.rank}"] for page in asked.pages]
    usable = [(page, output) for page, output in zip(asked.pages, found, strict=True) if not output.error]
    if not usable:
        return Answered(asked, result_line(found[0], model) | {"id": asked.id}, asked.pages)
    logprobs = [output.mean_logprob for _, output in usable if output.mean_logprob is not None]
    if len(logprobs) != len(usable):
        raise InputError(f"--setting weighted needs log-probabilities, but {model} returns none; use a local engine")
    weights = page_weights([page.score for page, _ in usable], logprobs)
    best = max(range(len(usable)), key=lambda row: (weights[row], -row))
    page, output = usable[best]
    return Answered(asked, result_line(output, model) | {"id": asked.id}, (page,), tuple(weights))
