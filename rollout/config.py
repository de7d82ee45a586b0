"""Settings of images, prompts and sampling. Plain dataclasses; no engine is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rollout.errors import ConfigError as ConfigError
from rollout.keys import check, key, require

EngineKind = Literal["hf", "fake", "vllm"]
Dtype = Literal["float32", "bfloat16"]

VLLM_SHARES = 32
"""Shares of work that one vLLM engine has at once."""

# Arguments of vLLM's engine that have a key of their own.
DECIDED = {
    "model": "model.path",
    "revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "enable_lora": "model.lora.rank",
    "max_lora_rank": "model.lora.rank",
    "dtype": "rollout.dtype",
    "enable_return_routed_experts": "rollout.routing_replay",
    "tensor_parallel_size": "rollout.vllm.tensor_parallel_size",
    "gpu_memory_utilization": "rollout.vllm.gpu_memory_utilization",
    "kv_cache_memory_bytes": "rollout.vllm.kv_cache_gib",
    "enable_sleep_mode": "rollout.vllm.sleep_level",
    "limit_mm_per_prompt": "inputs.max_images and inputs.max_videos",
    "mm_processor_kwargs": "inputs.min_pixels and inputs.max_pixels",
}


@dataclass(frozen=True)
class InputsConfig:
    """How a prompt becomes tokens and pixels: one setting for engine, learner, SFT and inference."""

    min_pixels: int = key(262_144, "Smallest area of an image after the resize, in pixels.", ge=1)
    max_pixels: int = key(1_568_000, "Largest area of an image after the resize, in pixels.", ge=1)
    max_images: int = key(5, "Maximum number of images per prompt; 0 allows text only.", ge=0)
    max_videos: int = key(0, "Maximum number of videos per prompt.", ge=0)
    max_frames: int = key(16, "Most frames that are taken of a video; they have the limits of images.", ge=2)
    video_fps: float = key(2.0, "Frames per second that are taken of a video, up to max_frames.", gt=0)
    max_prompt_tokens: int = key(15_000, "Longest prompt in tokens, vision tokens included.", ge=1)

    def __post_init__(self) -> None:
        check(self, "inputs")
        require(
            self.min_pixels <= self.max_pixels,
            f"inputs.min_pixels must be <= inputs.max_pixels ({self.max_pixels}), got {self.min_pixels}",
        )

    @property
    def most_images(self) -> int:
        """Images whose pixels a prompt may have at most, two frames of a video counted as one."""
        return self.max_images + self.max_videos * -(-self.max_frames // 2)


@dataclass(frozen=True)
class VllmConfig:
    """How the vLLM engine runs; read only with rollout.engine=vllm."""

    tensor_parallel_size: int = key(1, "Devices per engine; must divide the model's attention heads.", ge=1)
    gpu_memory_utilization: float = key(0.6, "Share of a GPU's memory for a (colocated) engine.", gt=0, le=1)
    kv_cache_gib: float = key(
        0.0,
        "Size of the KV cache on each device. 0 takes what gpu_memory_utilization leaves; on CPU what all responses "
        "need at once, at most 1 GiB unless a single response needs more.",
        ge=0,
    )
    engine_args: dict[str, Any] = key(
        {},
        "Further arguments of vLLM's engine, by vLLM's own names, such as max_num_seqs, max_model_len, block_size, "
        "max_num_batched_tokens, enforce_eager, enable_prefix_caching or mm_processor_cache_gb.",
    )
    sleep_level: Literal[0, 1, 2] = key(
        0,
        "What the engine gives up while the learner works on the same GPUs: 0 nothing, 1 the KV cache (weights move to "
        "CPU memory), 2 both, but for the vision tower (the next weight sync must follow). No effect on CPU.",
    )
    sync_bucket_mib: int = key(1536, "Weights in flight at once; with shared GPUs at least the largest tensor.", ge=1)
    sync_timeout_s: float = key(300.0, "Time limit for each phase of a weight sync.", gt=0)
    verify_every: int = key(10, "Compare weight checksums after every n-th sync; 0 never compares.", ge=0)
    in_flight: bool = key(
        False,
        "With algorithm.max_staleness > 0: weights change while responses are sampled, which go on with the new ones; "
        "a response knows which of its tokens came from which, and the next step's prompts fill the tail of a step.",
    )
    stall_timeout_s: float = key(300.0, "A busy engine without a new token for this long has failed.", gt=0)

    def __post_init__(self) -> None:
        check(self, "rollout.vllm")
        for name in self.engine_args:
            require(
                name not in DECIDED,
                f"rollout.vllm.engine_args.{name} has its own key. Set {DECIDED.get(name)} instead.",
            )

    @property
    def max_num_seqs(self) -> int:
        """Responses that are decoded at once."""
        return int(self.engine_args.get("max_num_seqs", 256))

    @property
    def prefix_caching(self) -> bool:
        """Whether the prompt of a group is computed once."""
        return bool(self.engine_args.get("enable_prefix_caching", True))


@dataclass(frozen=True)
class TurnsConfig:
    """The environment that answers the policy between its turns, and the limits of an episode."""

    environment: str = key(
        "", 'What answers every finished turn, as "module:Class"; "" makes each response a single turn.'
    )
    arguments: dict[str, Any] = key({}, "Keyword arguments of the environment's class.")
    max_turns: int = key(8, "Most turns of the policy in one response.", ge=1)
    max_observation_tokens: int = key(4096, "Most tokens that all observations of one response may have.", ge=1)
    max_images: int = key(8, "Most images that all observations of one response may have.", ge=0)
    timeout_s: float = key(60.0, "Time limit for each answer of the environment.", gt=0)
    patience_s: float = key(
        10.0,
        "How long the embedded engine lets rollouts that have an answer wait for the others of their batch, before "
        "they go on by themselves.",
        ge=0,
    )

    def __post_init__(self) -> None:
        check(self, "rollout.turns")


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of training rollouts."""

    engine: EngineKind = key("hf", "The sampling engine: hf (embedded, transformers), vllm or fake (scripted).")
    num_workers: int = key(1, "Number of engines; each is a Ray actor.", ge=1)
    group_size: int = key(8, "Rollouts per prompt (G).", ge=1)
    temperature: float = key(1.0, "Sampling temperature; training needs a value above 0.", ge=0)
    top_p: float = key(1.0, "Nucleus sampling: keep the likeliest tokens up to this probability.", gt=0, le=1)
    top_k: int = key(0, "Keep only the k likeliest tokens; 0 keeps all.", ge=0)
    max_response_tokens: int = key(1536, "Longest response in tokens, end-of-text included.", ge=1)
    max_batch_sequences: int = key(128, "Sequences that the embedded engine decodes at once.", ge=1)
    max_batch_gib: float = key(
        8.0,
        "Memory for the KV cache of such a batch: one of long prompts holds fewer sequences, but at least one.",
        gt=0,
    )
    dtype: Dtype = key("float32", "Precision of the engine's weights and KV cache, embedded engine and vLLM alike.")
    num_threads: int = key(0, "CPU threads of each engine; 0 leaves the number to torch.", ge=0)
    script: str = key("", 'Answers of the fake engine, a jsonl of {"id", "responses"}; "" gives gold responses.')
    gold_response: str = key(
        "",
        'How the fake engine writes the gold response of a row that brings none: "module:function" of its truth; "" '
        "writes the answer alone.",
    )
    routing_replay: bool = key(
        False,
        "Mixtures of experts: record which experts each sampled token took, and let the learner compute with the same.",
    )
    timeout_s: float = key(3600.0, "Time limit for one batch of one worker.", gt=0)
    max_restarts: int = key(
        3,
        "Consecutive failures tolerated before the run aborts; an engine that dies or stalls is restarted with the "
        "current weights.",
        ge=0,
    )
    allow_biased_sampling: bool = key(False, "Permit top_p < 1 or top_k > 0 in training, which biases the loss.")
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)

    def __post_init__(self) -> None:
        check(self, "rollout")
        require(
            not self.routing_replay or self.engine != "fake",
            "rollout.routing_replay=true needs an engine that runs a model. Set rollout.engine to hf or vllm.",
        )

    @property
    def max_observation_tokens(self) -> int:
        """Tokens that an environment may add to one response."""
        return self.turns.max_observation_tokens if self.turns.environment else 0

    @property
    def max_observation_images(self) -> int:
        """Images that an environment may add to one response."""
        return self.turns.max_images if self.turns.environment else 0

    @property
    def share_sequences(self) -> int:
        """Sequences of one share of prompts; vLLM schedules by itself and takes many shares at once."""
        if self.engine == "vllm":
            return max(1, self.vllm.max_num_seqs // VLLM_SHARES)
        return self.max_batch_sequences
