"""What comes back for one prompt, and the protocol of everything that answers prompts."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rollout.types import ImageSource, Observation, Prompt, SamplingParams


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one prompt.

    finish_reason: "stop", "length", whatever else an endpoint says, or "error".
    error: why there is no (complete) text; "" when there is.
    mean_logprob: mean natural log-probability of the response's tokens; None where it is not known.
    num_prompt_tokens, num_response_tokens: likewise; of a conversation by requests, all of them together.
    num_observation_tokens: what an environment's answers took, without the prompt; None where there is none, and where
        requests repeat it as part of the prompt.
    num_image_tokens: of all images, those of the prompt and of observations, each counted once; None if not known.
    observations: what an environment answered between the turns of the text; None without an environment.
    tokens, logprobs: text and natural log-probability of each token; empty where they are not known.
    """

    prompt: Prompt
    text: str
    finish_reason: str
    error: str = ""
    mean_logprob: float | None = None
    num_prompt_tokens: int | None = None
    num_response_tokens: int | None = None
    observations: Sequence[Observation] | None = None
    tokens: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()
    num_observation_tokens: int | None = None
    num_image_tokens: int | None = None


class Answerer(Protocol):
    """Answers prompts, one response each: an engine in this process, or an endpoint.

    Attributes:
        name: of the model.
        is_concurrent: several threads may ask at once; if False, prompts are best given together.
    """

    name: str
    is_concurrent: bool

    def start(self) -> None:
        """Load the model now, so that the first prompt does not wait for it.

        Raises:
            RsgrpoError: it cannot be loaded.
        """
        ...

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        """Yield one answer per prompt, in any order; a fault of one prompt becomes its `error` and stops no other.

        Raises:
            RsgrpoError: no further prompt can be answered; whatever was finished has been yielded.
        """
        ...

    def stream(self, prompt: Prompt) -> Generator[str | Answer]:
        """Yield the text in pieces as it is written, where that is possible, and finally the answer."""
        ...

    def close(self) -> None:
        """Release the model or the connections."""
        ...


@runtime_checkable
class Steps(Protocol):
    """An answerer whose model may be answered by an environment between its turns."""

    def steps(self, prompt: Prompt) -> Generator[str | Observation | Answer]:
        """Do as `Answerer.stream`, and yield what the environment answers as it comes."""
        ...


@runtime_checkable
class CountsImages(Protocol):
    """An answerer that knows how many tokens images take."""

    def image_tokens(self, images: Sequence[ImageSource]) -> int:
        """Return the tokens of images together, from their headers; PromptError if one cannot be read."""
        ...


@runtime_checkable
class Resampling(Protocol):
    """An answerer that can sample in other ways too: those of this package can."""

    def sampled(self, sampling: SamplingParams) -> Answerer:
        """Return the same answerer with another way of sampling; both share what they have loaded."""
        ...
