"""Questions of one turn beside trajectories: what a policy is asked that cannot look anything up, at the same budget.

The budget of a question is what all images took that its trajectory was shown, in the prompt and by the environment.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from recipes.answers.predictions import Prediction
from recipes.answers.questions import IMAGE_MARK, Question, to_prompt
from recipes.answers.spec import AnswerSpec
from recipes.evaluation.extra import GIVEN_PAGES
from rollout.config import TurnsConfig
from rollout.inputs.images import PromptError, decode
from rollout.turns.environment import load_environment
from rollout.types import ImageSource, Prompt
from rsgrpo.errors import InputError

THUMBNAILS, PAGES = "thumbnails", "pages"
MOST_PAGES = 50  # that a search may find for one prompt
FITTING = 6  # attempts to shrink a page to its budget

CountTokens = Callable[[ImageSource], int]


@runtime_checkable
class ShowsAtOnce(Protocol):
    """An environment whose pages can also be given in one prompt, such as the page desk."""

    def at_once(self, question: str, most: int) -> Sequence[tuple[str, ImageSource, ImageSource]]:
        """Return (id, thumbnail, page) of the first pages, at most `most`."""
        ...


def image_counter(spec: AnswerSpec) -> CountTokens:
    """Return what counts the tokens of an image as the answerer of these settings takes it; no weights are loaded."""
    if spec.endpoint.url:
        from recipes.answers.endpoint.sent import sent_tokens

        return lambda image: sent_tokens(image, spec.inputs)
    from rollout.inputs.processor import InputProcessor

    model = spec.model
    processor = InputProcessor(
        model.path, spec.inputs, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return lambda image: processor.page_tokens(Prompt("image", IMAGE_MARK, (image,)))[0]


def baselines(
    questions: Sequence[Question], trajectories: Mapping[str, Prediction], turns: TurnsConfig, count: CountTokens
) -> dict[str, list[Question]]:
    """Return the questions of each baseline: over thumbnails, and over whole pages, as many as the budget allows.

    Thumbnails are those of the question's own prompt, if it has any. The last page is shrunk if only that is left for
    it, and none is given to a question whose trajectory saw no image. A trajectory that failed has the mean budget.

    Raises:
        InputError: the environment cannot give its pages at once, or the file does not say what images took.
    """
    make = load_environment(turns)
    known = [found.num_tokens["image"] for found in trajectories.values() if "image" in found.num_tokens]
    if not known:
        raise InputError("baselines: the predictions do not say how many tokens images took; predict them again")
    made: dict[str, list[Question]] = {THUMBNAILS: [], PAGES: []}
    for question in questions:
        environment = make(to_prompt(question, "{images}{question}")) if make is not None else None
        if not isinstance(environment, ShowsAtOnce):
            raise InputError(
                f"baselines: {turns.environment or 'a model without an environment'} cannot give its pages in one "
                "prompt. Set rollout.turns.environment to the page desk, or to a class with at_once(question, most)."
            )
        found = trajectories.get(question.id)
        budget = found.num_tokens.get("image") if found is not None else None
        budget = sum(known) // len(known) if budget is None else budget
        shown = environment.at_once(question.question, MOST_PAGES)
        small = [("", image) for image in question.images] or [("", image) for _, image, _ in shown]
        made[THUMBNAILS].append(_within(question, small, budget, count))
        made[PAGES].append(_within(question, [(page_id, page) for page_id, _, page in shown], budget, count))
    return made


def _within(question: Question, images: Sequence[tuple[str, ImageSource]], budget: int, count: CountTokens) -> Question:
    """Return a question over the first images that fit into the budget."""
    kept: list[tuple[str, ImageSource]] = []
    left = budget
    for page_id, image in images:
        fitting = fitted(image, left, count) if left else None
        if fitting is None:
            break
        kept.append((page_id, fitting))
        left -= count(fitting)
    given = {GIVEN_PAGES: [page_id for page_id, _ in kept if page_id]}
    columns = {**question.columns, **given}
    pages = tuple(image for _, image in kept)
    return dataclasses.replace(question, images=pages, prompt="", evidence=None, columns=columns)


def fitted(image: ImageSource, budget: int, count: CountTokens) -> ImageSource | None:
    """Return an image of at most `budget` tokens: itself, or a smaller one; None if even that takes more.

    Raises:
        InputError: it cannot be read.
    """
    try:
        needed = count(image)
        if needed <= budget:
            return image
        whole = decode(image)
        share = budget / needed
        for _ in range(FITTING):
            side = math.sqrt(share)
            smaller = whole.resize((max(1, int(whole.width * side)), max(1, int(whole.height * side))))
            buffer = io.BytesIO()
            smaller.save(buffer, "PNG")
            if count(buffer.getvalue()) <= budget:
                return buffer.getvalue()
            share *= 0.8
    except PromptError as error:
        raise InputError(f"baselines: {error}") from error
    return None
