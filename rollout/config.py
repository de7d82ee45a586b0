"""What a user can set about images, prompts and sampling. Plain dataclasses; no engine is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field

from rollout.errors import ConfigError as ConfigError


@dataclass(frozen=True)
class InputsConfig:
    """How a prompt becomes tokens and pixels: one setting for engine, learner, SFT and inference.

    min_pixels, max_pixels: limits of an image's area after the resize.
    max_images: images a prompt may have; 0 is text only.
    max_prompt_tokens: rendered prompt, vision tokens included.
    """

    min_pixels: int = 262_144
    max_pixels: int = 1_568_000
    max_images: int = 5
    max_prompt_tokens: int = 15_000

    def __post_init__(self) -> None:
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise ConfigError(
                f"inputs.min_pixels must lie between 1 and inputs.max_pixels ({self.max_pixels}), got {self.min_pixels}"
            )
        if self.max_images < 0:
            raise ConfigError(f"inputs.max_images must be >= 0, got {self.max_images}")
        if self.max_prompt_tokens < 1:
            raise ConfigError(f"inputs.max_prompt_tokens must be >= 1, got {self.max_prompt_tokens}")


@dataclass(frozen=True)
class VllmConfig:
    """How the vLLM engine runs; read only with engine "vllm".

    tensor_parallel_size: devices of one engine; must divide the model's attention heads.
    gpu_memory_utilization: share of a GPU's memory that the engine may take; leave room for the learner when colocated.
    kv_cache_gib: size of the KV cache on each device; 0 takes what `gpu_memory_utilization` leaves (CPU: what all
        responses at once need, at most 1 GiB unless one alone needs more).
    max_model_len: prompt and response tokens; 0 is inputs.max_prompt_tokens + rollout.max_response_tokens.
    max_num_seqs: responses decoded at once.
    max_num_batched_tokens: tokens of one engine step, prefill included; 0 is vLLM's default.
    block_size: tokens of a KV block, the unit of prefix caching; 0 is 16 on GPUs and 32 on CPU.
    enforce_eager: no CUDA graphs and no compilation (always so on CPU).
    prefix_caching: compute the prompt of a group once.
    mm_cache_gib: memory for preprocessed images, in the worker and again in the engine; 0 is none.
    sleep_level: what the engine gives up while the learner works on the same GPUs: 0 nothing, 1 the KV cache (weights
        move to CPU memory), 2 both (the next weight sync must follow). No effect on CPU.
    sync: how weights travel: "nccl" (own GPUs), "ipc" (shared GPUs), "gloo" (CPU), or "auto".
    sync_bucket_mib: weights that are in flight at once; with ipc at least the largest tensor.
    sync_timeout_s: the longest that one phase of a weight sync may take.
    verify_every: compare checksums of what engine and learner hold after every n-th sync, the first included; 0 is
        never.
    start_timeout_s: to load the model and profile memory.
    stall_timeout_s: requests are running and no token came for so long: the engine counts as failed.
    """

    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.6
    kv_cache_gib: float = 0.0
    max_model_len: int = 0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 0
    block_size: int = 0
    enforce_eager: bool = False
    prefix_caching: bool = True
    mm_cache_gib: float = 4.0
    sleep_level: int = 0
    sync: str = "auto"
    sync_bucket_mib: int = 1536
    sync_timeout_s: float = 300.0
    verify_every: int = 10
    start_timeout_s: float = 900.0
    stall_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for key in ("tensor_parallel_size", "max_num_seqs", "sync_bucket_mib"):
            if getattr(self, key) < 1:
                raise ConfigError(f"rollout.vllm.{key} must be >= 1, got {getattr(self, key)}")
        not_negative = ("kv_cache_gib", "max_model_len", "max_num_batched_tokens", "block_size", "mm_cache_gib")
        for key in (*not_negative, "verify_every"):
            if getattr(self, key) < 0:
                raise ConfigError(f"rollout.vllm.{key} must be >= 0, got {getattr(self, key)}")
        for key in ("sync_timeout_s", "start_timeout_s", "stall_timeout_s"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"rollout.vllm.{key} must be > 0, got {getattr(self, key):g}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"rollout.vllm.gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization:g}"
            )
        if self.sleep_level not in (0, 1, 2):
            raise ConfigError(f"rollout.vllm.sleep_level must be 0, 1 or 2, got {self.sleep_level}")
        if self.sync not in ("auto", "gloo", "nccl", "ipc"):
            raise ConfigError(f"rollout.vllm.sync must be one of auto, gloo, nccl, ipc; got {self.sync!r}")


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of training rollouts.

    engine: "hf" (embedded, transformers), "fake" (scripted) or "vllm".
    num_workers: engines, each a Ray actor.
    group_size: G, rollouts per prompt.
    max_response_tokens: end-of-text included.
    max_batch_sequences: sequences that the embedded engine decodes at once.
    dtype: of the embedded engine's weights, "float32" or "bfloat16".
    num_threads: CPU threads of each engine; 0 leaves it to torch.
    script: for engine "fake": a jsonl of {"id", "responses"}; empty answers every prompt with its gold response.
    timeout_s: the longest that one worker may take for one batch.
    max_restarts: an engine that died or stalled is started again with the current weights; so many failures in a row
        are borne.
    allow_biased_sampling: permit top_p < 1 or top_k > 0 in training, which importance ratios do not correct.
    """

    engine: str = "hf"
    num_workers: int = 1
    group_size: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_response_tokens: int = 1536
    max_batch_sequences: int = 128
    dtype: str = "float32"
    num_threads: int = 0
    script: str = ""
    timeout_s: float = 3600.0
    max_restarts: int = 3
    allow_biased_sampling: bool = False
    vllm: VllmConfig = field(default_factory=VllmConfig)

    def __post_init__(self) -> None:
        for key, value, options in (
            ("engine", self.engine, ("hf", "fake", "vllm")),
            ("dtype", self.dtype, ("float32", "bfloat16")),
        ):
            if value not in options:
                raise ConfigError(f"rollout.{key} must be one of {', '.join(options)}; got {value!r}")
        for key in ("num_workers", "group_size", "max_response_tokens", "max_batch_sequences"):
            if getattr(self, key) < 1:
                raise ConfigError(f"rollout.{key} must be >= 1, got {getattr(self, key)}")
        if self.temperature < 0:
            raise ConfigError(f"rollout.temperature must be >= 0, got {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"rollout.top_p must be in (0, 1], got {self.top_p:g}")
        if self.top_k < 0:
            raise ConfigError(f"rollout.top_k must be >= 0 (0 is off), got {self.top_k}")
        if self.max_restarts < 0:
            raise ConfigError(f"rollout.max_restarts must be >= 0, got {self.max_restarts}")
        if self.timeout_s <= 0:
            raise ConfigError(f"rollout.timeout_s must be > 0, got {self.timeout_s:g}")
