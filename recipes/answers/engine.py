"""Who answers prompts: an engine of `rollout`, or an endpoint, and the settings that choose.

Knows no questions, files or parsing.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from recipes.answers.answerer import Answerer, Output
from rollout.config import InputsConfig, RolloutConfig, VllmConfig
from rollout.types import Prompt, RolloutGroup, SamplingParams
from rsgrpo.config.checks import require_found
from rsgrpo.config.limits import one_of, require
from rsgrpo.errors import InputError, RsgrpoError

if TYPE_CHECKING:
    from recipes.answers.endpoint import EndpointConfig
    from rollout.engine import Engine

log = logging.getLogger(__name__)


@runtime_checkable
class StreamingEngine(Protocol):
    """An engine that tells a response while it is written."""

    def stream(self, prompt: Prompt, sampling: SamplingParams) -> Generator[str | RolloutGroup]:
        """Yield the text of one response in pieces, then its group."""
        ...


@dataclass(frozen=True)
class AnswerModelConfig:
    """The model that answers.

    path: Hugging Face folder or hub id; not needed with an endpoint. revision: hub commit, "" for the newest.
    trust_remote_code: run code that the model's folder brings along.
    """

    path: str = ""
    revision: str = ""
    trust_remote_code: bool = False


@dataclass(frozen=True)
class AnswerRolloutConfig:
    """How answers are sampled, and by which engine; the keys mean what they mean in training.

    engine: "hf" (embedded), "vllm" or "fake" (scripted); not used with an endpoint.
    temperature: 0 is greedy. max_response_tokens: end-of-text included.
    max_batch_sequences: sequences that the embedded engine decodes at once.
    dtype, num_threads, device: of the embedded engine. script: of the scripted one.
    """

    engine: str = "hf"
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_response_tokens: int = 2048
    max_batch_sequences: int = 16
    dtype: str = "float32"
    num_threads: int = 0
    device: str = "auto"
    script: str = ""
    vllm: VllmConfig = field(default_factory=VllmConfig)

    def __post_init__(self) -> None:
        one_of("rollout.device", self.device, ("auto", "cpu", "cuda"))
        self.as_rollout_config()

    def as_rollout_config(self) -> RolloutConfig:
        """Return what engines take."""
        return RolloutConfig(
            engine=self.engine,
            group_size=1,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_response_tokens=self.max_response_tokens,
            max_batch_sequences=self.max_batch_sequences,
            dtype=self.dtype,
            num_threads=self.num_threads,
            script=self.script,
            vllm=self.vllm,
        )


def open_answerer(
    model: AnswerModelConfig,
    rollout: AnswerRolloutConfig,
    inputs: InputsConfig,
    endpoint: EndpointConfig,
    *,
    seed: int = 0,
) -> Answerer:
    """Return what the settings choose: the endpoint if it has an address, else the engine, which starts when asked.

    Raises:
        RsgrpoError: the endpoint does not answer, or there is no such model.
    """
    sampling = SamplingParams(
        group_size=1,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=rollout.max_response_tokens,
        seed=seed,
    )
    if endpoint.url:
        from recipes.answers.endpoint import Endpoint

        return Endpoint(endpoint, sampling, inputs)
    require(model.path != "", "model.path is empty: name a model folder or hub id, or an endpoint (endpoint.url)")
    require_found("model.path", model.path)
    return EngineAnswerer(model, rollout, inputs, sampling)


class EngineAnswerer:
    """Answers with an engine in this process, which is started when the first prompt comes.

    Attributes:
        name: the model's path.
    """

    def __init__(
        self, model: AnswerModelConfig, rollout: AnswerRolloutConfig, inputs: InputsConfig, sampling: SamplingParams
    ) -> None:
        self.name = model.path
        self._model, self._rollout, self._inputs, self._sampling = model, rollout, inputs, sampling
        # vLLM takes all prompts at once and bounds its memory itself; the embedded engine encodes what it is given.
        self._at_once = 0 if rollout.engine == "vllm" else rollout.max_batch_sequences
        self._engine: Engine | None = None

    def start(self) -> Engine:
        """Load the model, once.

        Raises:
            RsgrpoError: the engine cannot start, or cannot run this model.
        """
        if self._engine is not None:
            return self._engine
        import transformers

        from rollout.build import build_engine

        transformers.utils.logging.disable_progress_bar()  # it would tear our own bars
        rollout = self._rollout.as_rollout_config()
        try:
            self._engine = build_engine(
                self._model.path,
                rollout,
                self._inputs,
                num_threads=self._rollout.num_threads,
                device=self._rollout.device,
                revision=self._model.revision,
                trust_remote_code=self._model.trust_remote_code,
            )
        except (RsgrpoError, ValueError, OSError, ImportError) as error:
            raise InputError(f"the model {self._model.path} cannot be started: {error}") from error
        return self._engine

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[Output]:
        """Yield one output per prompt; see `Answerer`."""
        engine = self.start()
        at_once = self._at_once or max(1, len(prompts))
        for start in range(0, len(prompts), at_once):
            try:
                for group in engine.generate(prompts[start : start + at_once], self._sampling):
                    yield _output(group)
            except RsgrpoError as error:  # what a prompt is to blame for came as group.error
                raise RsgrpoError(f"the engine failed: {error}") from error

    def stream(self, prompt: Prompt) -> Generator[str | Output]:
        """Yield the text in pieces where the engine tells them (the embedded one does), then the output."""
        engine = self.start()
        if not isinstance(engine, StreamingEngine):
            yield from self.answer([prompt])
            return
        try:
            with closing(engine.stream(prompt, self._sampling)) as pieces:
                for piece in pieces:
                    yield piece if isinstance(piece, str) else _output(piece)
        except RsgrpoError as error:
            raise RsgrpoError(f"the engine failed: {error}") from error

    def close(self) -> None:
        """Free the engine."""
        if self._engine is not None:
            self._engine.close()


def _output(group: RolloutGroup) -> Output:
    if group.error is not None:
        return Output(group.prompt, "", "error", group.error)
    rollout = group.rollouts[0]
    return Output(
        group.prompt,
        rollout.text,
        rollout.finish_reason,
        mean_logprob=sum(rollout.logprobs_T) / max(1, len(rollout.logprobs_T)),
        num_prompt_tokens=group.num_prompt_tokens,
        num_response_tokens=len(rollout.token_ids_T),
    )
