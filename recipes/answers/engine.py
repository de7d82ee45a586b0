"""Open what answers: an engine of `rollout` in this process, or an endpoint."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from recipes.answers.spec import MADE_BY, AnswerSpec
from recipes.answers.types import Answer, Answerer
from rollout.keys import require
from rollout.types import ImageSource, Observation, Prompt, RolloutGroup, SamplingParams
from rsgrpo.config.checks import require_model
from rsgrpo.data.foreign import IMAGE_MARK
from rsgrpo.errors import InputError, RsgrpoError

if TYPE_CHECKING:
    from rollout.engine import Engine
    from rollout.inputs.processor import InputProcessor


@runtime_checkable
class StreamingEngine(Protocol):
    """An engine that passes a response on while it is written."""

    def stream(self, prompt: Prompt, sampling: SamplingParams) -> Generator[str | Observation | RolloutGroup]:
        """Yield the text of one response in pieces, an environment's observations, then its group."""
        ...


def open_answerer(spec: AnswerSpec) -> Answerer:
    """Return what the settings choose: the endpoint if it has a URL, else an engine, which starts when first asked.

    Raises:
        RsgrpoError: the endpoint does not answer, or there is no such model.
    """
    if spec.endpoint.url:
        from recipes.answers.endpoint.client import Endpoint

        return Endpoint(spec.endpoint, spec.sampling(), spec.inputs)
    path = spec.model.path
    why = "the fake engine has no weights, but the tokenizer of a model: " if spec.rollout.engine == "fake" else ""
    require(path != "", f"model.path is empty: {why}name a model folder or hub id, or an endpoint (endpoint.url)")
    require_model("model.path", path, MADE_BY)
    return LocalAnswerer(spec)


class LocalAnswerer:
    """Answers with an engine in this process, which is started when the first prompt comes.

    Attributes:
        name: the model's path.
    """

    is_concurrent = False

    def __init__(self, spec: AnswerSpec) -> None:
        self.name = spec.model.path
        self._spec = spec
        self._sampling = spec.sampling()
        # vLLM takes all prompts at once and bounds its memory itself; the embedded engine encodes what it is given.
        self._at_once = 0 if spec.rollout.engine == "vllm" else spec.rollout.max_batch_sequences

    def start(self) -> None:
        """Load the model, once; see `Answerer`."""
        _ = self._engine

    @cached_property
    def _engine(self) -> Engine:
        import transformers

        from rollout.build import build_engine

        transformers.utils.logging.disable_progress_bar()  # it would tear our own bars
        model, rollout = self._spec.model, self._spec.rollout
        try:
            return build_engine(
                model.path,
                rollout.as_rollout_config(),
                self._spec.inputs,
                num_threads=rollout.num_threads,
                device=rollout.device,
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
            )
        except (RsgrpoError, ValueError, OSError, ImportError) as error:
            raise InputError(f"the model {model.path} cannot be started: {error}") from error

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        """Yield one output per prompt; see `Answerer`."""
        at_once = self._at_once or max(1, len(prompts))
        for start in range(0, len(prompts), at_once):
            try:
                for group in self._engine.generate(prompts[start : start + at_once], self._sampling):
                    yield self._answer(group)
            except RsgrpoError as error:  # a prompt's own fault comes as group.error
                raise RsgrpoError(f"the engine failed: {error}") from error

    def stream(self, prompt: Prompt) -> Generator[str | Answer]:
        """Yield the text in pieces where the engine streams (the embedded one and vLLM do), then the answer."""
        with closing(self.steps(prompt)) as steps:
            yield from (step for step in steps if not isinstance(step, Observation))

    def steps(self, prompt: Prompt) -> Generator[str | Observation | Answer]:
        """Do as `stream`, and yield what an environment answers between two turns as it comes."""
        engine = self._engine
        if not isinstance(engine, StreamingEngine):
            yield from self.answer([prompt])
            return
        try:
            with closing(engine.stream(prompt, self._sampling)) as pieces:
                for piece in pieces:
                    yield self._answer(piece) if isinstance(piece, RolloutGroup) else piece
        except RsgrpoError as error:
            raise RsgrpoError(f"the engine failed: {error}") from error

    def sampled(self, sampling: SamplingParams) -> LocalAnswerer:
        """Return the same engine with another way of sampling; see `Resampling`."""
        self.start()
        other = copy.copy(self)
        other._sampling = sampling
        return other

    def image_tokens(self, images: Sequence[ImageSource]) -> int:
        """Return what `CountsImages` says; the engine is started."""
        return sum(self._processor.page_tokens(Prompt("images", IMAGE_MARK * len(images), tuple(images))))

    @property
    def _processor(self) -> InputProcessor:
        processor: InputProcessor = self._engine.processor  # type: ignore[attr-defined]  # all of ours have one
        return processor

    def close(self) -> None:
        """Release the engine."""
        if "_engine" in vars(self):
            self._engine.close()

    def _answer(self, group: RolloutGroup) -> Answer:
        if group.error is not None:
            return Answer(group.prompt, "", "error", group.error)
        rollout = group.rollouts[0]
        read = [token_id for observation in rollout.observations for token_id in observation.token_ids_S]
        num_read_of_images = read.count(self._processor.image_token_id)
        return Answer(
            group.prompt,
            rollout.text,
            rollout.finish_reason,
            mean_logprob=sum(rollout.logprobs_T) / max(1, len(rollout.logprobs_T)),
            num_prompt_tokens=group.num_prompt_tokens,
            num_response_tokens=len(rollout.token_ids_T),
            tokens=tuple(rollout.text[start:end] for start, end in rollout.token_spans_T),
            logprobs=tuple(rollout.logprobs_T),
            observations=rollout.observations if self._spec.rollout.turns.environment else None,
            num_observation_tokens=len(read) if self._spec.rollout.turns.environment else None,
            num_image_tokens=sum(self._processor.page_tokens(group.prompt)) + num_read_of_images,
        )
