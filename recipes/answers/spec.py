"""What a program says about who answers and how: the settings from which an answerer is opened."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from rollout.config import InputsConfig, RolloutConfig, VllmConfig
from rollout.types import SamplingParams
from rsgrpo.config.limits import above, at_least, one_of, require


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


@dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible server that answers instead of an engine of our own.

    url: base address, such as http://localhost:8000/v1; "" uses `rollout.engine`.
    model: name the server knows the model by; "" takes the only one it serves.
    api_key_env: environment variable that holds the key; the key itself is never written anywhere.
    concurrency: requests at once.
    timeout_s: the longest that one answer may take.
    max_tries: requests for one answer before the endpoint counts as down.
    backoff_s: wait after the first failure; it doubles with each further one.
    requests_per_minute: requests are spread to be no more than these, retries included; 0 sets no limit.
    """

    url: str = ""
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout_s: float = 600.0
    max_tries: int = 6
    backoff_s: float = 1.0
    requests_per_minute: float = 0.0

    def __post_init__(self) -> None:
        require(
            self.url == "" or self.url.startswith(("http://", "https://")),
            f"endpoint.url must start with http:// or https://, such as http://localhost:8000/v1; got {self.url!r}",
        )
        at_least(1, endpoint__concurrency=self.concurrency, endpoint__max_tries=self.max_tries)
        above(0, endpoint__timeout_s=self.timeout_s)
        at_least(0, endpoint__backoff_s=self.backoff_s, endpoint__requests_per_minute=self.requests_per_minute)


@dataclass(frozen=True)
class AnswerSpec:
    """Who answers, and how: all that `recipes.answers.engine.open_answerer` needs.

    model, rollout: the engine in this process. inputs: limits of a prompt and its pages.
    endpoint: answers instead of an engine where it has a URL. seed: of sampling.
    """

    model: AnswerModelConfig = field(default_factory=AnswerModelConfig)
    rollout: AnswerRolloutConfig = field(default_factory=AnswerRolloutConfig)
    inputs: InputsConfig = field(default_factory=InputsConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    seed: int = 0

    def sampling(self) -> SamplingParams:
        """Return how one answer is sampled."""
        return SamplingParams(
            group_size=1,
            temperature=self.rollout.temperature,
            top_p=self.rollout.top_p,
            top_k=self.rollout.top_k,
            max_tokens=self.rollout.max_response_tokens,
            seed=self.seed,
        )


def pixel_limits(model: str) -> tuple[int, int]:
    """Return the smallest and largest page area for a model: what its folder was trained with, or the defaults.

    An export of ours has the limits of training. Hub folders have far wider ones, at which a single page would take
    16,000 tokens; they, and endpoints, get the defaults.
    """
    limits, file = InputsConfig(), Path(model) / "preprocessor_config.json"
    if file.is_file():
        size = json.loads(file.read_text(encoding="utf-8")).get("size", {})
        if size.get("longest_edge", limits.max_pixels + 1) <= limits.max_pixels:
            return size["shortest_edge"], size["longest_edge"]
    return limits.min_pixels, limits.max_pixels
