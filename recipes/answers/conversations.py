"""Conversations with an answerer that knows no environment, such as an endpoint: one request per turn.

Each request repeats what was written and answered so far, in one user message, so that every server understands it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from recipes.answers.engine import open_answerer
from recipes.answers.questions import IMAGE_MARK
from recipes.answers.spec import AnswerSpec
from recipes.answers.types import Answer, Answerer
from rollout.config import TurnsConfig
from rollout.turns.caller import Caller
from rollout.turns.environment import MakeEnvironment, Reply, load_environment, stop_strings
from rollout.types import ImageSource, Observation, Prompt
from rsgrpo.errors import InputError

YOURS, READ = "\n\nYou wrote:\n", "\n\nThe answer to that:\n"
LIMIT, TURNS = "limit", "turns"
"""The fault of an answer with too many images, and the finish reason of a conversation with too many turns."""


def open_conversing(spec: AnswerSpec) -> Answerer:
    """Return what `open_answerer` does, with the environment that the settings name.

    Raises:
        RsgrpoError: as `open_answerer`; the environment cannot be loaded.
    """
    turns = spec.rollout.turns
    by_turns = spec.endpoint.url and turns.environment  # else the engine asks the environment by itself
    return Conversations(open_answerer(spec), turns) if by_turns else open_answerer(spec)


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
        """Yield the text in pieces as it is written, where the answerer can do that, then the answer."""
        with closing(self.steps(prompt)) as steps:
            yield from (step for step in steps if not isinstance(step, Observation))

    def steps(self, prompt: Prompt) -> Generator[str | Observation | Answer]:
        """Do as `stream`, and yield what the environment answers.

        A turn is over at its call: the answerer is not heard to the end, so that its tokens are not counted.
        """
        talk = _Talk(prompt, self._make, self._config)
        while True:
            said = yield from self._turn(talk)
            before = len(talk.observations)
            whole = talk.hear(said)
            yield from talk.observations[before:]
            if whole is not None:
                yield whole
                return
            yield "\n"

    def _turn(self, talk: _Talk) -> Generator[str, None, Answer]:
        """Yield the next turn in pieces; return it."""
        request, heard = talk.request(), ""
        with closing(self._answerer.stream(request)) as pieces:
            for piece in pieces:
                text = piece.text if isinstance(piece, Answer) else heard + piece
                kept = _cut(text, talk.stop)
                if fresh := kept[len(heard) :]:
                    yield fresh
                if isinstance(piece, Answer):
                    return piece
                heard = kept
                if kept.endswith(talk.stop):
                    return Answer(request, kept, "stop")
        raise AssertionError("an answerer's last piece is the answer")

    def close(self) -> None:
        """Release the answerer."""
        self._answerer.close()


@dataclass
class _Talk:
    """One conversation. turns, observations: so far. stop: strings that end a turn."""

    prompt: Prompt
    make: MakeEnvironment
    config: TurnsConfig
    turns: list[str] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)

    def __post_init__(self) -> None:
        environment = self.make(self.prompt)
        self.stop, self._caller = stop_strings(environment), Caller(environment, self.config.timeout_s)
        self._num_tokens: list[tuple[int | None, int | None]] = []
        self._num_image_tokens: int | None = None

    @property
    def text(self) -> str:
        """Return all turns, as an engine joins them."""
        return "\n".join(self.turns)

    def request(self) -> Prompt:
        """Return the prompt of the next turn: the first one with everything since."""
        pairs = zip(self.turns, self.observations, strict=True)
        since = "".join(
            f"{YOURS}{turn.replace(IMAGE_MARK, '(image)')}{READ}{observation.text}" for turn, observation in pairs
        )
        images: list[ImageSource] = [image for observation in self.observations for image in observation.images]
        return replace(self.prompt, text=self.prompt.text + since, images=(*self.prompt.images, *images))

    def hear(self, said: Answer) -> Answer | None:
        """Take a turn and ask the environment; return the whole answer where the conversation is over."""
        self._num_tokens.append((said.num_prompt_tokens, said.num_response_tokens))
        self._num_image_tokens = said.num_image_tokens  # each request repeats all images
        if said.error:
            self.turns += [said.text] if said.text else []
            return self._whole("error", said.error)
        turn = _cut(said.text, self.stop)
        self.turns.append(turn)
        if said.finish_reason == "length" and turn == said.text:
            return self._whole("length")
        reply = self._caller.ask(turn)
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
            num_image_tokens=self._num_image_tokens,
        )  # fmt: skip


def _cut(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first string that ends a turn."""
    ends = [text.index(string) + len(string) for string in stop if string in text]
    return text[: min(ends)] if ends else text


def _sum(counts: Sequence[int | None]) -> int | None:
    return None if None in counts else sum(count for count in counts if count is not None)
