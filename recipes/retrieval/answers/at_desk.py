"""A question to a model that looks up its pages by itself: its text and its steps at the page desk, as they come."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

from recipes.answers.batch import result_line
from recipes.answers.reader import Reader
from recipes.answers.types import Answer
from recipes.retrieval.answers.generation import Answered, AskedQuestion
from recipes.retrieval.answers.progress import AnswerProgress
from recipes.retrieval.desk.shelf import Sheet
from recipes.retrieval.pages.store import Page
from recipes.retrieval.search.found import FoundPage
from rollout.types import Observation

FindPages = Callable[[Sequence[str]], Mapping[str, Page]]
"""Page ids -> those of them that are in the store."""


class LibraryShelf:
    """Lets the desk search a library: by its index, encoder and filters, over the documents of this moment."""

    def __init__(self, found: Callable[[str, int], Sequence[FoundPage]], k: int) -> None:
        self._found, self._k = found, k

    def search(self, query: str) -> Sequence[Sheet]:
        """Return the best pages, best first; InputError for a query that cannot be searched."""
        return [Sheet(page.page_id, page.place, page.image, page.score) for page in self._found(query, self._k)]


def look_up(question: str, reader: Reader, find: FindPages) -> Generator[AnswerProgress]:
    """Yield the progress after each piece of text and each step, and finally with the answer.

    Raises:
        RsgrpoError: nothing answers.
    """
    progress = AnswerProgress(question, "multi_image", (), "", None, {}, steps=())
    yield progress
    with ExitStack() as on_end:
        pieces = reader.steps(question, ())
        if isinstance(pieces, Generator):
            on_end.enter_context(closing(pieces))  # who stops listening stops the sampling
        for piece in pieces:
            if isinstance(piece, str):
                progress = replace(progress, text=progress.text + piece)
            elif isinstance(piece, Answer):
                progress = _answered(progress, piece, reader.answerer.name, find)
            else:
                progress = _with_steps(progress, (*(progress.steps or ()), piece), find)
            yield progress


def _answered(progress: AnswerProgress, answer: Answer, model: str, find: FindPages) -> AnswerProgress:
    progress = _with_steps(progress, tuple(answer.observations or ()), find)
    asked = AskedQuestion(answer.prompt.id, progress.question, progress.pages)
    answered = Answered(asked, result_line(answer, model), progress.pages)
    return replace(progress, text=answer.text, answered=answered)


def _with_steps(progress: AnswerProgress, steps: tuple[Observation, ...], find: FindPages) -> AnswerProgress:
    return replace(progress, steps=steps, pages=pages_of(steps, find))


def pages_of(steps: Sequence[Observation], find: FindPages) -> tuple[FoundPage, ...]:
    """Return the pages that searches at the desk found, by number; their rank is that number.

    A page keeps the score of the first search that found it. One that has left the store since has no image.
    """
    scores: dict[int, tuple[str, float]] = {}
    for step in steps:
        if "numbers" in step.facts:  # also of a search whose pages could not be shown: the desk has numbered them
            found = zip(step.facts["numbers"], step.facts["pages"], step.facts["scores"], strict=True)
            scores = {number: (page_id, score) for number, page_id, score in found} | scores
    pages = find([page_id for page_id, _ in scores.values()])
    return tuple(_page(number, *scores[number], pages) for number in sorted(scores))


def _page(number: int, page_id: str, score: float, pages: Mapping[str, Page]) -> FoundPage:
    page = pages.get(page_id)
    if page is None:
        return FoundPage(number, score, page_id, "(no longer in the store)", 0, "", "")
    return FoundPage(
        number, score, page_id, page.document, page.number, page.image, page.text, page.root, page.copies, page.label,
        width=page.width, height=page.height,
    )  # fmt: skip
