"""Settings from which an answerer is opened: who answers, and how."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from rollout.config import Dtype, EngineKind, InputsConfig, RolloutConfig, TurnsConfig, VllmConfig
from rollout.keys import check, key, require
from rollout.types import SamplingParams
from rsgrpo.records.secrets import masked_address

MADE_BY = {
    "demo/": "make demo",
    "runs/demo/": "make demo",
    "desk/": "make desk-demo",
    "runs/desk_demo/": "make desk-demo",
    "evisrag-mini/": "make evisrag-mini",
    "runs/": "python -m rsgrpo.train recipe=RECIPE name=NAME",
}
"""Start of a path -> command that makes what is there, special ones first; none of these is looked up on the hub."""


@dataclass(frozen=True)
class AnswerModelConfig:
    """The model that answers."""

    path: str = key("", "Hugging Face folder or hub id; not needed with an endpoint.")
    revision: str = key("", 'Commit, branch or tag on the hub; "" takes the newest.')
    trust_remote_code: bool = key(False, "Run code that comes with the model.")


@dataclass(frozen=True)
class AnswerRolloutConfig:
    """How answers are sampled, and by which engine; the keys mean what they mean in training."""

    engine: EngineKind = key("hf", "The engine: hf (embedded), vllm or fake (scripted); not used with an endpoint.")
    temperature: float = key(0.0, "Sampling temperature; 0 is greedy.", ge=0)
    top_p: float = key(1.0, "Nucleus sampling: keep the likeliest tokens up to this probability.", gt=0, le=1)
    top_k: int = key(0, "Keep only the k likeliest tokens; 0 keeps all.", ge=0)
    max_response_tokens: int = key(2048, "Longest answer in tokens, end-of-text included.", ge=1)
    max_batch_sequences: int = key(16, "Sequences that the embedded engine decodes at once.", ge=1)
    dtype: Dtype = key("float32", "Precision of the engine's weights and KV cache, embedded engine and vLLM alike.")
    num_threads: int = key(0, "CPU threads of the engine; 0 leaves the number to torch.", ge=0)
    device: Literal["auto", "cpu", "cuda"] = key("auto", "Device of the engine; auto uses CUDA where there is any.")
    script: str = key("", 'Answers of the fake engine: a jsonl of {"id", "responses"}.')
    gold_response: str = key(
        "rewards.evisrag:gold_response", "module:function that the fake engine without a script answers with."
    )
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)

    def __post_init__(self) -> None:
        check(self, "rollout")

    def as_rollout_config(self) -> RolloutConfig:
        """Return what engines take."""
        shared = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "device"}
        return RolloutConfig(group_size=1, **shared)


@dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible server that answers instead of an engine of our own."""

    url: str = key("", 'Base address, such as http://localhost:8000/v1; "" uses rollout.engine.')
    model: str = key("", 'Name by which the server knows the model; "" takes the only one it serves.')
    api_key_env: str = key(
        "OPENAI_API_KEY", "Environment variable that holds the key; the key is never written anywhere."
    )
    concurrency: int = key(8, "Concurrent requests.", ge=1)
    timeout_s: float = key(600.0, "Time limit for one answer.", gt=0)
    max_tries: int = key(6, "Requests per answer before the endpoint counts as down.", ge=1)
    backoff_s: float = key(1.0, "Wait after the first failure; it doubles with each further one.", ge=0)
    requests_per_minute: float = key(0.0, "Limit on the rate of requests, retries included; 0 sets no limit.", ge=0)

    def __post_init__(self) -> None:
        check(self, "endpoint")
        require(
            self.url == "" or self.url.startswith(("http://", "https://")),
            f"endpoint.url must start with http:// or https://, such as http://localhost:8000/v1; got {self.url!r}",
        )

    @property
    def shown(self) -> str:
        """The address for a message: without its password."""
        return masked_address(self.url)


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
