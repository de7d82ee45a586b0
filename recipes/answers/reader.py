"""Ask questions about pages: an answerer together with its prompt template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from recipes.answers.questions import Question, to_prompt
from recipes.answers.types import Answer, Answerer, Steps
from rollout.types import ImageSource, Observation, Prompt


def per_thousand(width: int, height: int) -> tuple[float, float]:
    """Return the size of any page in the coordinates of a model that writes boxes from 0 to 1000."""
    return 1000.0, 1000.0


@dataclass(frozen=True, slots=True)
class Reader:
    """Answers questions from pages.

    template: what a question is put into. system: the system message, "" for none.
    text_template: instead of `template`, for pages that are given as text; "" is `template`.
    box_frame: takes a page's width and height in pixels; returns them in the coordinates of the model's boxes.
    """

    answerer: Answerer
    template: str
    system: str = ""
    text_template: str = ""
    box_frame: Callable[[int, int], tuple[float, float]] = per_thousand

    def ask(self, question: str, pages: Sequence[ImageSource], *, name: str = "question") -> Answer:
        """Return the answer to one question. name: the prompt's id.

        Raises:
            RsgrpoError: the question cannot be asked, or nothing answers.
        """
        *_, answer = self.stream(question, pages, name=name)
        assert isinstance(answer, Answer)
        return answer

    def stream(self, question: str, pages: Sequence[ImageSource], *, name: str = "question") -> Iterator[str | Answer]:
        """Yield the text in pieces as it is written, where that is possible, and finally the answer; see `ask`."""
        return self.answerer.stream(self._prompt(question, pages, name))

    def steps(
        self, question: str, pages: Sequence[ImageSource], *, name: str = "question"
    ) -> Iterator[str | Observation | Answer]:
        """Do as `stream`, and yield what an environment answers between two turns, where the answerer has one."""
        prompt = self._prompt(question, pages, name)
        return self.answerer.steps(prompt) if isinstance(self.answerer, Steps) else self.answerer.stream(prompt)

    def _prompt(self, question: str, pages: Sequence[ImageSource], name: str) -> Prompt:
        return to_prompt(Question(name, question, tuple(pages)), self.template, self.system)
