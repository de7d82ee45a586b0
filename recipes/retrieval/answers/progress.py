"""How far the answer to a question is: the pages, the text, and what a model looked up by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from recipes.retrieval.answers.generation import Answered, Setting
from recipes.retrieval.answers.highlight import Box
from recipes.retrieval.search.found import FoundPage
from rollout.types import Observation


@dataclass(frozen=True, slots=True)
class AnswerProgress:
    """How far the answer to a question is.

    pages: retrieved, best first. text: written so far. answered: None until the answer is complete, or if there is no
        answer model.
    seconds: for retrieval, until the first piece of text, and until the end, as far as known.
    boxes: page id -> where its cited evidence is, once the answer is complete. notes: what the indexes lack.
    steps: what the page desk answered so far, to a model that looks up its pages by itself; `pages` are then those that
        it found, by the numbers that it knows. None for a model that is given its pages.
    """

    question: str
    setting: Setting
    pages: tuple[FoundPage, ...]
    text: str
    answered: Answered | None
    seconds: dict[str, float]
    boxes: Mapping[str, tuple[Box, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    steps: tuple[Observation, ...] | None = None

    @property
    def opened(self) -> set[int]:
        """Numbers of the pages that the model has opened or zoomed in on."""
        return {step.facts["number"] for step in self.steps or () if "number" in step.facts and not step.fault}

    @property
    def zooms(self) -> dict[int, tuple[Box, ...]]:
        """Number of a page -> the parts that the model zoomed in on."""
        zooms: dict[int, tuple[Box, ...]] = {}
        for step in self.steps or ():
            if "box" in step.facts and not step.fault:
                number = step.facts["number"]
                zooms[number] = (*zooms.get(number, ()), Box(*step.facts["box"]))
        return zooms
