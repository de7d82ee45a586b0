"""Another model between a response and its protocol: it reads out the short answer, or marks the answer.

The instructions are our own words for what the benchmarks ask: MMLongBench-Doc of its extractor (arXiv 2407.01523),
ViDoSeek of its judge (arXiv 2502.18017).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from recipes.answers.batch import answer_batch, read_lines
from recipes.answers.parsing import parse_lenient
from recipes.answers.predictions import FAILED, Predictions
from recipes.answers.questions import IMAGE_MARK, Question
from recipes.answers.spec import EndpointConfig
from rollout.config import InputsConfig
from rollout.keys import key, require
from rollout.types import Prompt, SamplingParams
from rsgrpo.errors import RsgrpoError
from rsgrpo.records.console import Console

MAX_TOKENS = 256
INSTRUCTIONS = """Below are a question and a longer response to it. Write down the answer that the response gives.

- Do not answer the question yourself and do not correct the response.
- Keep to the shortest form: a whole number, a decimal number with its unit, a text, or a list such as ["a", "b"].
- Write "Not answerable" if the response says that the pages do not settle the question.
- Write "Fail to answer" if the response cannot be read, gives no answer, or says it cannot see the pages.

Write one line and nothing else:
Extracted answer: ...

Question: {question}

Response: {response}
"""
JUDGE_INSTRUCTIONS = """Below are a question, its reference answers and the answer to be marked, from 1 to 5:

5: right and complete, as any one of the reference answers is.
4: right; it lacks a detail that was not asked for, or says more than needed.
3: about the question, with a mistake or half of what was asked for.
2: about the question, but wrong.
1: not about the question, empty, or it declines to answer.

The reference answers are right. How the answer is worded, how long it is and which unit it is given in do not matter.

Write one line and nothing else:
Extracted answer: the mark as one digit

Question: {question}

Reference answers: {golds}

Answer: {response}
"""


def version_of(instructions: str) -> str:
    """Return a short fingerprint of instructions."""
    return hashlib.sha256(instructions.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class ExtractorConfig:
    """The model that reads short answers out of responses before `protocol` scores them."""

    url: str = key("", 'OpenAI-compatible server, such as http://localhost:8000/v1; "" scores answers as written.')
    model: str = key("", 'Name by which the server knows the model; "" takes the only one it serves.')
    api_key_env: str = key("OPENAI_API_KEY", "Environment variable that holds the key.")

    def __post_init__(self) -> None:
        require(
            self.url == "" or self.url.startswith(("http://", "https://")),
            f"extractor.url must start with http:// or https://, got {self.url!r}",
        )


@dataclass(frozen=True, slots=True)
class Extracted:
    """Answers by the id of their question, and who read them."""

    by_id: dict[str, str]
    model: str


def extract_answers(
    questions: Sequence[Question],
    predictions: Predictions,
    config: ExtractorConfig,
    out: Path,
    console: Console,
    *,
    is_judge: bool = False,
) -> Extracted:
    """Ask the extractor for the answer of every response; finished ones are kept in `out` and not asked again.

    is_judge: ask for a mark of the answer instead.

    Raises:
        RsgrpoError: the endpoint is down, or answers are missing after all tries.
    """
    from recipes.answers.endpoint.client import Endpoint

    prompts = [
        Prompt(question.id, _request(question, found.text, is_judge=is_judge))
        for question in questions
        if (found := predictions.by_id.get(question.id)) is not None and found.finish_reason != FAILED
    ]
    spec = EndpointConfig(config.url, config.model, config.api_key_env)
    with closing(Endpoint(spec, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS), InputsConfig())) as endpoint:
        answer_batch(prompts, endpoint, out, share_equal=True, console=console)
        model = endpoint.name
    lines = read_lines(out)
    failed = [prompt.id for prompt in prompts if lines[prompt.id]["finish_reason"] == FAILED]
    if failed:
        raise RsgrpoError(
            f"the extractor did not answer for {len(failed)} of {len(prompts)} responses, such as {failed[0]}; run the "
            "same command to ask again"
        )
    return Extracted({prompt.id: answer_in(lines[prompt.id]["raw"]) for prompt in prompts}, model)


def _request(question: Question, response: str, *, is_judge: bool) -> str:
    text = INSTRUCTIONS.format(question=question.question, response=response)
    if is_judge:
        answer, golds = parse_lenient(response).answer, " | ".join(question.answers)
        text = JUDGE_INSTRUCTIONS.format(question=question.question, golds=golds, response=answer)
    return text.replace(IMAGE_MARK, "")


def answer_in(reply: str) -> str:
    r"""Return what follows "Extracted answer:" in its line; the whole reply where it has no such line.

    >>> answer_in("Extracted answer: [16%]\nAnswer format: Str"), answer_in(" 7 ")
    ('16%', '7')
    """
    found = re.search(r"extracted answer\s*:\s*(.*)", reply, re.IGNORECASE)
    text = (found[1] if found else reply).strip()
    is_bracketed = text.startswith("[") and text.endswith("]") and not re.search(r"[,'\"]", text)
    return text[1:-1].strip() if is_bracketed else text
