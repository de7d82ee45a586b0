"""Prompts, a page, and an answerer that answers from a function: for tests of whatever asks and answers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from recipes.answers.batch import answer_batch
from recipes.answers.types import Answer
from rollout.config import InputsConfig
from rollout.types import Prompt, SamplingParams
from rsgrpo.errors import RsgrpoError
from rsgrpo.records.console import Console
from tests.material.http_stub import ANSWER

SMALL = InputsConfig(min_pixels=784, max_pixels=3136, max_images=2)
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)


def write_page(folder: Path) -> str:
    """Write one white page and return its path."""
    Image.new("RGB", (200, 100), "white").save(folder / "page.png")
    return str(folder / "page.png")


def prompts_of(count: int, page: str | None = None) -> list[Prompt]:
    images, mark = ((page,), "<image>") if page else ((), "")
    return [Prompt(f"q{number}", f"{mark}question {number}", images) for number in range(count)]


def response(answer: str, *slots: str, think: str = "so") -> str:
    """Return a whole response with these evidence slots."""
    lines = "\n".join(f"[{number}]: {slot}" for number, slot in enumerate(slots, start=1))
    return f"<observe>o</observe>\n<evidence>\n{lines}\n</evidence>\n<think>{think}</think>\n<answer>{answer}</answer>"


class Scripted:
    """Answers from a function; counts what it was asked."""

    name = "model-a"
    is_concurrent = False

    def __init__(self, reply: Callable[[Prompt], str] = lambda _: ANSWER, fail_after: int | None = None) -> None:
        self.asked: list[str] = []
        self._reply = reply
        self._fail_after = fail_after

    def start(self):
        pass

    def answer(self, prompts):
        for prompt in prompts:
            if self._fail_after is not None and len(self.asked) >= self._fail_after:
                raise RsgrpoError("the endpoint is down")
            self.asked.append(prompt.id)
            text = self._reply(prompt)
            yield Answer(prompt, "", "error", text[1:]) if text.startswith("!") else Answer(prompt, text, "stop")

    def stream(self, prompt):
        yield "<obs"
        yield from self.answer([prompt])

    def close(self):
        pass


def batch(prompts, answerer, out, share_equal=False):
    return answer_batch(prompts, answerer, out, share_equal=share_equal, console=Console(io.StringIO()))


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]
