"""One rollout's way through an environment: its turns, the answers to them, and their limits. Shared by all engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rollout.config import TurnsConfig
from rollout.errors import one_line
from rollout.inputs.images import PromptError
from rollout.inputs.processor import InputProcessor, PromptInputs
from rollout.turns.caller import EXCEPTION, Caller
from rollout.turns.environment import Environment, MakeEnvironment, Reply, stop_strings
from rollout.turns.probe import PROBE, Probe
from rollout.types import FinishReason, ImageSource, Observation, Prompt, Rollout

_CHARACTERS_PER_TOKEN = 128  # more than any text has on average

LIMIT, UNREADABLE = "limit", "unreadable"
"""Faults that an episode notices, beside those of `Caller`; an environment names others, such as "bad_call"."""


class Episode:
    """Collects the turns of one rollout.

    After every finished turn call `answer`; when it returns None, call `rollout`.

    Args:
        listen: told every observation.

    Attributes:
        num_tokens: sampled so far, over all turns.
        stop: strings that end a turn, beside end-of-text.
        max_turn_tokens: of one turn; 0 does not limit it.
    """

    def __init__(
        self,
        environment: Environment,
        processor: InputProcessor,
        limits: TurnsConfig,
        listen: Callable[[Observation], None] | None = None,
    ) -> None:
        self.stop = stop_strings(environment)
        self._processor, self._limits, self._listen = processor, limits, listen
        self._ask = Caller(environment, limits.timeout_s).ask
        self.max_turn_tokens = int(getattr(environment, "max_turn_tokens", 0))
        self._longest_stop = max((len(stop.encode()) for stop in self.stop), default=0)
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._spans: list[tuple[int, int]] = []
        self._observations: list[Observation] = []
        self._num_turns = 0
        self._tokens_left, self._images_left = limits.max_observation_tokens, limits.max_images
        self._finish: FinishReason = "length"

    @property
    def num_tokens(self) -> int:
        """Tokens that were sampled so far."""
        return len(self._token_ids)

    @property
    def last_images(self) -> tuple[ImageSource, ...]:
        """Images of the last observation."""
        return self._observations[-1].images if self._observations else ()

    def has_stopped(self, token_ids_T: Sequence[int]) -> bool:
        """Return whether a turn's last token completes one of the strings that end it, or is the last one allowed."""
        if self.max_turn_tokens and len(token_ids_T) >= self.max_turn_tokens:
            return True
        if not self.stop:
            return False
        last, _ = self._processor.decode(token_ids_T[-self._longest_stop - 1 :])  # a token is at least one byte
        return any(stop in last for stop in self.stop)

    def answer(
        self, token_ids_T: Sequence[int], logprobs_T: Sequence[float], *, is_cut: bool = False
    ) -> PromptInputs | None:
        """Add a turn and ask the environment; return what the policy reads next, None where the rollout is over.

        is_cut: the turn ended because no tokens are left; the environment is not asked.
        """
        has_ended = token_ids_T[-1] == self._processor.eos_token_id
        turn = self._add(token_ids_T, logprobs_T)
        if is_cut and not has_ended and not any(stop in turn for stop in self.stop):
            return None
        reply = self._ask(turn)
        if reply is None or reply.ends:
            self._finish = "stop"
            if reply is not None and (reply.facts or reply.fault):
                self._observe(reply, ())
            return None
        self._finish = "length" if is_cut else "turns"
        if is_cut or self._num_turns == self._limits.max_turns:
            self._observe(Reply(facts=reply.facts, fault=reply.fault), ())
            return None
        return self._encode(reply, has_ended)

    def end(self) -> None:
        """End the episode after its last turn: what the environment answered to it is not read."""
        self._finish = "stop"
        if self._observations:
            last = self._observations[-1]
            self._observations[-1] = replace(last, token_ids_S=(), text="", images=())

    def rollout(self, weights_version: int) -> Rollout:
        """Return what was sampled."""
        return Rollout(
            tuple(self._token_ids),
            tuple(self._logprobs),
            self._text,
            tuple(self._spans),
            self._finish,
            weights_version,
            tuple(self._observations),
        )

    def _add(self, token_ids_T: Sequence[int], logprobs_T: Sequence[float]) -> str:
        """Add a turn's tokens; return its text."""
        if self._num_turns:  # the line break belongs to the last turn's end-of-text
            start, end = self._spans[-1]
            if start == end:
                self._spans[-1] = (start, end + 1)
            self._text += "\n"
        text, spans_T = self._processor.decode(token_ids_T)
        shift = len(self._text)
        self._spans += [(start + shift, end + shift) for start, end in spans_T]
        self._text += text
        self._token_ids += token_ids_T
        self._logprobs += logprobs_T
        self._num_turns += 1
        return text

    def _encode(self, reply: Reply, has_ended: bool) -> PromptInputs | None:
        """Return a reply as the policy reads it, within the limits of the episode."""
        try:
            if reply.fault == EXCEPTION:  # its text may quote anything
                reply = replace(reply, text=self._processor.template.as_plain_text(reply.text))
            if len(reply.text) > self._tokens_left * _CHARACTERS_PER_TOKEN:  # tokenizing it would take minutes
                raise _TooMuch(f"the result has {len(reply.text)} characters, but {self._tokens_left} tokens are left.")
            if len(reply.images) > self._images_left:
                raise _TooMuch(f"the result has {len(reply.images)} images, but {self._images_left} are left.")
            inputs = self._inputs(reply, has_ended)
            if len(inputs.token_ids_T) > self._tokens_left:
                raise _TooMuch(f"the result has {len(inputs.token_ids_T)} tokens, but {self._tokens_left} are left.")
        except (PromptError, _TooMuch) as error:
            fault = LIMIT if isinstance(error, _TooMuch) else UNREADABLE
            text = self._processor.template.as_plain_text(f"It cannot be shown: {one_line(error)}")
            reply = Reply(text, facts=reply.facts, fault=fault)
            inputs = self._inputs(reply, has_ended)
            if len(inputs.token_ids_T) > self._tokens_left:  # not even this: the episode is over
                self._observe(Reply(facts=reply.facts, fault=fault), ())
                return None
        self._tokens_left -= len(inputs.token_ids_T)
        self._images_left -= len(reply.images)
        self._observe(reply, inputs.token_ids_T)
        return inputs

    def _inputs(self, reply: Reply, has_ended: bool) -> PromptInputs:
        return self._processor.encode_observation(reply.text, tuple(reply.images), has_ended=has_ended)

    def _observe(self, reply: Reply, token_ids_S: Sequence[int]) -> None:
        observation = Observation(
            at=len(self._token_ids),
            at_char=len(self._text),
            token_ids_S=tuple(token_ids_S),
            text=reply.text,
            images=tuple(reply.images),
            facts=dict(reply.facts),
            fault=reply.fault,
        )
        self._observations.append(observation)
        if self._listen is not None:
            self._listen(observation)


class _TooMuch(Exception):
    """A reply is over the limits of its episode."""


def begin_episodes(
    make: MakeEnvironment | None,
    prompt: Prompt,
    number: int,
    processor: InputProcessor,
    limits: TurnsConfig,
    listen: Callable[[Observation], None] | None = None,
) -> tuple[Episode, ...]:
    """Return one episode per rollout of a prompt; none without an environment.

    listen: told every observation of every episode.

    Raises:
        PromptError: the environment refuses the prompt.
    """
    if make is None:
        return ()
    make = Probe if PROBE in prompt.truth else make
    try:
        return tuple(Episode(make(prompt), processor, limits, listen) for _ in range(number))
    except (Exception, SystemExit) as error:
        raise PromptError(f"the environment cannot begin: {type(error).__name__}: {one_line(error)}") from error
