"""What a request may say about sampling, and what a reply says of it: choices, stop texts, usage, log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from recipes.answers.types import Answer
from rollout.keys import at_least
from rollout.types import SamplingParams
from rsgrpo.errors import RsgrpoError

MAX_STOPS = 8
MAX_STOP_CHARS = 256
MAX_TEMPERATURE = 2.0
_WHOLE = ("n", "top_k", "seed", "max_tokens", "max_completion_tokens", "top_logprobs")
_ONLY_OFF = ("presence_penalty", "frequency_penalty", "top_logprobs")  # accepted where they change nothing


class RequestError(RsgrpoError):
    """A request that cannot be served, with the HTTP status to answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class SamplingRules:
    """What the owner lets requests choose.

    default: how answers are sampled where a request does not say; its max_tokens is the limit for all requests.
    is_free: requests may choose temperature, top_p, top_k, seed, max_tokens, n and stop, and send earlier turns.
    max_choices: the largest n. has_logprobs: the model says how likely its tokens were.
    """

    default: SamplingParams
    is_free: bool = False
    max_choices: int = 4
    has_logprobs: bool = True

    def __post_init__(self) -> None:
        at_least(1, **{"--max-choices": self.max_choices})


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks for. sampling: None as the server does. is_seeded: equal requests get equal answers.

    stop: texts at which an answer ends, themselves left out.
    """

    sampling: SamplingParams | None = None
    num_choices: int = 1
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    is_seeded: bool = False


class SamplingFields(Protocol):
    """The fields of a request's body that are read here; None where it has none."""

    n: float | None
    temperature: float | None
    top_p: float | None
    top_k: float | None
    seed: float | None
    max_tokens: float | None
    max_completion_tokens: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    top_logprobs: float | None
    stop: str | list[str] | None
    logprobs: bool | None
    stream: bool


def wanted_sampling(fields: SamplingFields, rules: SamplingRules) -> Wanted:
    """Check what a request says of sampling.

    Raises:
        RequestError: it says something that this server does not do.
    """
    for name in _WHOLE:
        if (value := getattr(fields, name)) is not None and value != int(value):
            raise RequestError(400, f"{name} must be a whole number, got {value:g}")
    for name in _ONLY_OFF:
        if getattr(fields, name):
            raise RequestError(400, f"{name}={getattr(fields, name):g} is not supported: omit the field")
    if not rules.is_free:
        _require_default(fields, rules.default)
        return Wanted()
    default = rules.default
    asked = {"max_tokens": fields.max_tokens, "max_completion_tokens": fields.max_completion_tokens}
    limits = [int(_within(name, limit, 1, float("inf"))) for name, limit in asked.items() if limit is not None]
    num_choices = int(_within("n", fields.n or 1, 1, rules.max_choices))
    if num_choices > 1 and fields.stream:
        raise RequestError(400, f"n={num_choices} cannot be streamed: set n to 1, or stream to false")
    if fields.logprobs and not rules.has_logprobs:
        raise RequestError(400, "logprobs are not known: this server passes requests on to another one")
    sampling = replace(
        default,
        temperature=_within("temperature", _given(fields.temperature, default.temperature), 0, MAX_TEMPERATURE),
        top_p=_within("top_p", _given(fields.top_p, default.top_p), 1e-6, 1),
        top_k=int(_within("top_k", _given(fields.top_k, default.top_k), 0, 2**31)),
        max_tokens=min([default.max_tokens, *limits]),
        seed=int(_within("seed", _given(fields.seed, default.seed), 0, 2**63 - 1)),
    )
    is_seeded = fields.seed is not None
    return Wanted(sampling, num_choices, _stops(fields.stop), bool(fields.logprobs), is_seeded)


def _require_default(fields: SamplingFields, sampling: SamplingParams) -> None:
    """Refuse a request whose sampling differs from the server's."""
    served: dict[str, float] = {"temperature": sampling.temperature, "top_k": sampling.top_k, "n": 1}
    if sampling.temperature:  # greedy answers depend on neither
        served |= {"top_p": sampling.top_p, "seed": sampling.seed}
    for name, value in served.items():
        if (wanted := getattr(fields, name)) not in (None, value):
            raise RequestError(
                400, f"{name}={wanted:g} is not supported: this server always uses {value:g}. Omit the field."
            )
    for name in ("max_tokens", "max_completion_tokens"):
        if (wanted := getattr(fields, name)) is not None and not wanted >= sampling.max_tokens:
            raise RequestError(
                400,
                f"{name}={wanted:g} is not supported: this server always allows {sampling.max_tokens} tokens. "
                "Omit the field.",
            )
    for name in ("stop", "logprobs"):
        if getattr(fields, name):
            raise RequestError(400, f"{name} is not supported: this server was started without --allow-sampling")


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _within(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        limit = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise RequestError(400, f"{name} must be {limit}, got {value:g}")
    return value


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(texts) > MAX_STOPS or any(not 1 <= len(text) <= MAX_STOP_CHARS for text in texts):
        raise RequestError(400, f"stop must be at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters")
    return texts


def cut(answer: Answer, stop: Sequence[str]) -> Answer:
    """Return an answer that ends before the first of the stop texts; its tokens are those of the text that is left.

    >>> cut(Answer(None, "a b c", "length"), ["c", " b"]).text
    'a'
    """
    at = first_stop(answer.text, stop)
    if at is None:
        return answer
    starts = [sum(map(len, answer.tokens[:number])) for number in range(len(answer.tokens))]
    kept = sum(start < at for start in starts)
    return replace(
        answer,
        text=answer.text[:at],
        finish_reason="stop",
        tokens=answer.tokens[:kept],
        logprobs=answer.logprobs[:kept],
        num_response_tokens=kept if answer.tokens else answer.num_response_tokens,
    )


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first stop text begins; None if there is none."""
    return min((at for one in stop if (at := text.find(one)) >= 0), default=None)


class StopWatch:
    """Lets the pieces of a text through up to a stop text, of which no part is let through either."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self._holds = max(map(len, stop), default=1) - 1
        self.is_over = False

    def pass_on(self, piece: str) -> str:
        """Return what may be sent now."""
        if self.is_over:
            return ""
        self._held += piece
        at = first_stop(self._held, self._stop)
        if at is not None:
            self.is_over, let_through = True, self._held[:at]
            self._held = ""
            return let_through
        split = max(0, len(self._held) - self._holds)
        let_through, self._held = self._held[:split], self._held[split:]
        return let_through


def usage_of(answers: Sequence[Answer]) -> dict[str, int] | None:
    """Return the tokens of a request's answers; None where the model does not say."""
    prompt, responses = answers[0].num_prompt_tokens, [answer.num_response_tokens for answer in answers]
    if prompt is None or any(count is None for count in responses):
        return None
    written = sum(count or 0 for count in responses)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def logprobs_of(answer: Answer) -> Mapping[str, Any]:
    """Return the log-probability of each token, as OpenAI's form has it; a token's text may be part of a character."""
    return {
        "content": [
            {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
            for text, logprob in zip(answer.tokens, answer.logprobs, strict=True)
        ]
    }
