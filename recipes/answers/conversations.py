"""Conversations with an answerer that knows no environment, such as an endpoint: one request per turn.

Each request repeats what was written and answered so far, in one user message, so that every server understands it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

from recipes.answers.types import Answer, Answerer
from rollout.config import TurnsConfig
from rollout.turns.caller import Caller
from rollout.turns.environment import MakeEnvironment, Reply, load_environment, stop_strings
from rollout.types import ImageSource, Observation, Prompt
from rsgrpo.errors import InputError

YOURS, READ = "\n\nYou wrote:\n", "\n\nThe answer to that:\n"
LIMIT, TURNS = "limit", "turns"
"""The fault of an answer with too many images, and the finish reason of a conversation with too many turns."""


class Conversations:
    """Answers prompts by several requests, between which an environment answers.

    Attributes:
        name, is_concurrent: as of the answerer.
    """

    def __init__(self, answerer: Answerer, config: TurnsConfig) -> None:
        """Load the environment; ConfigError if that is not possible, or none is configured."""
        make = load_environment(config)
        if make is None:
            raise InputError("rollout.turns.environment is empty: name what answers between the turns")
        self.name, self.is_concurrent = answerer.name, answerer.is_concurrent
        self._answerer, self._config, self._make = answerer, config, make

    def start(self) -> None:
        """Load the model; see `Answerer`."""
        self._answerer.start()

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        """Yield one answer per prompt; the next turns of all conversations are asked together."""
        talks = {prompt.id: _Talk(prompt, self._make, self._config) for prompt in prompts}
        while talks:
            for said in self._answerer.answer([talk.request() for talk in talks.values()]):
                if (whole := talks[said.prompt.id].hear(said)) is not None:
                    del talks[said.prompt.id]
                    yield whole

    def stream(self, prompt: Prompt) -> Generator[str | Answer]:
        """Yield each turn when it is complete, then the answer."""
        yield from (step for step in self.steps(prompt) if not isinstance(step, Observation))

    def steps(self, prompt: Prompt) -> Generator[str | Observation | Answer]:
        """Do as `stream`, and yield what the environment answers."""
        talk = _Talk(prompt, self._make, self._config)
        while True:
            (said,) = self._answerer.answer([talk.request()])
            before = len(talk.observations)
            whole = talk.hear(said)
            if not said.error:
                yield talk.last_turn
            yield from talk.observations[before:]
            if whole is not None:
                yield whole
                return

    def close(self) -> None:
        """Release the answerer."""
        self._answerer.close()


@dataclass
class _Talk:
    """One conversation. turns, observations: so far."""

    prompt: Prompt
    make: MakeEnvironment
    config: TurnsConfig
    turns: list[str] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)

    def __post_init__(self) -> None:
        environment = self.make(self.prompt)
        self._stop, self._caller = stop_strings(environment), Caller(environment, self.config.timeout_s)
        self._num_tokens: list[tuple[int | None, int | None]] = []

    @property
    def text(self) -> str:
        """Return all turns, as an engine joins them."""
        return "\n".join(self.turns)

    @property
    def last_turn(self) -> str:
        """Return what was written last."""
        return self.turns[-1]

    def request(self) -> Prompt:
        """Return the prompt of the next turn: the first one with everything since."""
        pairs = zip(self.turns, self.observations, strict=True)
        since = "".join(f"{YOURS}{turn}{READ}{observation.text}" for turn, observation in pairs)
        images: list[ImageSource] = [image for observation in self.observations for image in observation.images]
        return replace(self.prompt, text=self.prompt.text + since, images=(*self.prompt.images, *images))

    def hear(self, said: Answer) -> Answer | None:
        """Take a turn and ask the environment; return the whole answer where the conversation is over."""
        self._num_tokens.append((said.num_prompt_tokens, said.num_response_tokens))
        if said.error:
            return self._whole("error", said.error)
        self.turns.append(_cut(said.text, self._stop))
        if said.finish_reason == "length" and self.last_turn == said.text:
            return self._whole("length")
        reply = self._caller.ask(self.last_turn)
        if reply is None or reply.ends:
            return self._whole("stop")
        left = self.config.max_images - sum(len(observation.images) for observation in self.observations)
        if len(reply.images) > left:
            text = f"It cannot be shown: the result has {len(reply.images)} images, but {left} are left."
            reply = Reply(text, facts=reply.facts, fault=LIMIT)
        at_char = len(self.text)
        self.observations.append(
            Observation(0, at_char, (), reply.text, tuple(reply.images), dict(reply.facts), reply.fault)
        )
        return self._whole(TURNS) if len(self.turns) == self.config.max_turns else None

    def _whole(self, reason: str, error: str = "") -> Answer:
        read, written = (_sum(counts) for counts in zip(*self._num_tokens, strict=True))
        return Answer(
            self.prompt, self.text, reason, error,
            num_prompt_tokens=read, num_response_tokens=written, observations=tuple(self.observations),
        )  # fmt: skip


def _cut(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first string that ends a turn."""
    ends = [text.index(string) + len(string) for string in stop if string in text]
    return text[: min(ends)] if ends else text


def _sum(counts: Sequence[int | None]) -> int | None:
    return None if None in counts else sum(count for count in counts if count is not None)
