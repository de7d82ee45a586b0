"""The protocol behind which everything stands that answers prompts, and what comes back for one of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from rollout.types import Prompt


@dataclass(frozen=True, slots=True)
class Output:
    """What came back for one prompt.

    finish_reason: "stop", "length", whatever else an endpoint says, or "error".
    error: why there is no (whole) text; "" when there is.
    mean_logprob: mean natural log-probability of the response's tokens; None where the answerer does not tell.
    num_prompt_tokens, num_response_tokens: likewise.
    """

    prompt: Prompt
    text: str
    finish_reason: str
    error: str = ""
    mean_logprob: float | None = None
    num_prompt_tokens: int | None = None
    num_response_tokens: int | None = None


class Answerer(Protocol):
    """Answers prompts, one response each."""

    name: str

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[Output]:
        """Yield one output per prompt, in any order; a prompt's own fault becomes `error` and stops no other.

        Raises:
            RsgrpoError: nothing more can be answered; what was finished has been yielded.
        """
        ...

    def stream(self, prompt: Prompt) -> Generator[str | Output]:
        """Yield pieces of text as they are written, where that is possible, and at last the output."""
        ...

    def close(self) -> None:
        """Free it."""
        ...
