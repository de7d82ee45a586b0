"""How far the answer to a question is: the pages, the text, what a model looked up by itself; and all of it as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recipes.answers.reader import Reader
from recipes.retrieval.answers.generation import Answered, Setting
from recipes.retrieval.answers.highlight import Box
from recipes.retrieval.encoders.base import PageEncoder
from recipes.retrieval.search.found import FoundPage
from recipes.retrieval.search.retriever import SearchSettings
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
    maps: page id -> (rows, columns) similarities with the question, if an index of the search is of late interaction.
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
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)

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


def trace_of(
    asking: AnswerProgress,
    store: Path,
    encoder: PageEncoder | None,
    search: SearchSettings,
    reader: Reader | None,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Return everything about a question as JSON: the pages, the prompt and the answer, if there is one."""
    answered, identity = asking.answered, encoder.identity if encoder else None
    numbers = {page.page_id: answered.index_of(page) for page in answered.sources} if answered else {}
    cited = {page.page_id for page in answered.cited} if answered else set()
    pages = [
        asdict(page)
        | {"index": numbers.get(page.page_id), "cited": page.page_id in cited}
        | {"marks": [asdict(box) for box in asking.boxes.get(page.page_id, ())]}
        | {"similarity_map": asking.maps[page.page_id].round(4).tolist() if page.page_id in asking.maps else None}
        for page in asking.pages
    ]
    return {
        "question": asking.question,
        "setting": asking.setting if asking.steps is None else "desk",
        "store": str(store.absolute()),
        "encoder": dict(identity.description) | {"fingerprint": identity.fingerprint} if identity else None,
        "by": search.by,
        "notes": list(notes),
        "backend": search.backend,
        "reranker": search.reranker[0].identity.fingerprint if search.reranker else None,
        "prompt_template": reader.template if reader else None,
        "system": reader.system if reader else None,
        "pages": pages,
        "weights": list(answered.weights) if answered else [],
        "result": answered.line if answered else None,
        "seconds": {name: round(value, 4) for name, value in asking.seconds.items()},
    }
