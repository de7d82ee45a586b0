"""Keys of the learner: the model it trains, what it learns and how. Read without Ray and hydra, as the learner is."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from rsgrpo.config.limits import above, at_least, one_of, require


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the language model.

    rank: 0 trains all weights.
    targets: names of the linear layers that get an adapter.
    """

    rank: int = 0
    alpha: int = 32
    dropout: float = 0.0
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )

    def __post_init__(self) -> None:
        at_least(0, model__lora__rank=self.rank)
        above(0, model__lora__alpha=self.alpha)
        require(0 <= self.dropout < 1, f"model.lora.dropout must be in [0, 1), got {self.dropout:g}")
        require(not self.rank or bool(self.targets), "model.lora.targets is empty: name the layers that get an adapter")


@dataclass(frozen=True)
class ModelConfig:
    """The policy.

    path: Hugging Face folder or hub id. revision: hub commit, "" for the newest.
    freeze_vision: keep the vision tower and its merger as they are; features are then computed once per image.
    trust_remote_code: run code that the model's folder brings along.
    """

    path: str = ""
    revision: str = ""
    freeze_vision: bool = True
    trust_remote_code: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class FilterConfig:
    """Which groups are worth a training step (dynamic sampling).

    enabled: drop groups outside (low, high) and refill the batch.
    weights: reward name -> factor in the sum that is compared; a reward not named counts once.
    drop_without_signal: also drop groups in which no reward has any spread.
    max_tries: sampling rounds per step before the run stops with a histogram.
    """

    enabled: bool = False
    low: float = 0.01
    high: float = 6.9
    weights: dict[str, float] = field(default_factory=dict)
    drop_without_signal: bool = False
    max_tries: int = 20

    def __post_init__(self) -> None:
        require(
            self.low < self.high,
            f"algorithm.filter keeps sums in (low, high): low={self.low:g} must be < high={self.high:g}",
        )
        at_least(1, algorithm__filter__max_tries=self.max_tries)


@dataclass(frozen=True)
class AlgorithmConfig:
    """RS-GRPO and its relatives (docs/reference/algorithm.md).

    advantage: "per_reward", "per_scope", "grpo", "dr_grpo" or "rloo".
    missing_marker: "void" (teach nothing), "widen" (teach the whole response) or "error".
    prompts_per_step: P. updates_per_step: optimiser steps that share one batch of rollouts.
    ratio: "token", "gspo" or "cispo". clip_low, clip_high: the ratio is clipped to [1 - low, 1 + high].
    dual_clip: bound on the loss of negative advantages, in units of |A|; 0 is off.
    kl_coef: weight of the KL term to the reference model; 0 loads no reference. kl_estimator: "k1", "k2" or "k3".
    entropy_coef: weight of an entropy bonus.
    importance_cap: cap of the detached weight exp(old - rollout logprob) per token; 0 is off.
    max_staleness: 0 samples every step with the newest weights; 1 samples step t + 1 while step t is learnt, with the
        weights before it (needs importance_cap).
    on_policy_shortcut: take old logprobs from the training pass itself where that is exact.
    """

    advantage: str = "per_reward"
    missing_marker: str = "void"
    prompts_per_step: int = 32
    updates_per_step: int = 1
    ratio: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    importance_cap: float = 0.0
    max_staleness: int = 0
    on_policy_shortcut: bool = True
    filter: FilterConfig = field(default_factory=FilterConfig)

    def __post_init__(self) -> None:
        one_of("algorithm.advantage", self.advantage, ("per_reward", "per_scope", "grpo", "dr_grpo", "rloo"))
        one_of("algorithm.missing_marker", self.missing_marker, ("void", "widen", "error"))
        one_of("algorithm.ratio", self.ratio, ("token", "gspo", "cispo"))
        one_of("algorithm.kl_estimator", self.kl_estimator, ("k1", "k2", "k3"))
        at_least(
            1, algorithm__prompts_per_step=self.prompts_per_step, algorithm__updates_per_step=self.updates_per_step
        )
        at_least(0, algorithm__kl_coef=self.kl_coef, algorithm__entropy_coef=self.entropy_coef)
        require(
            self.max_staleness in (0, 1),
            f"algorithm.max_staleness must be 0 (on-policy) or 1 (one step off), got {self.max_staleness}",
        )
        require(
            self.max_staleness == 0 or self.importance_cap > 0,
            "algorithm.max_staleness=1 learns from rollouts of older weights, which algorithm.importance_cap=0 does "
            "not correct: set algorithm.importance_cap=2",
        )
        above(0, algorithm__clip_low=self.clip_low, algorithm__clip_high=self.clip_high)
        require(self.clip_low < 1, f"algorithm.clip_low must be < 1 (the ratio stays > 0), got {self.clip_low:g}")
        require(
            self.dual_clip == 0 or self.dual_clip > 1,
            f"algorithm.dual_clip must be 0 (off) or > 1, got {self.dual_clip:g}",
        )
        require(
            self.importance_cap == 0 or self.importance_cap >= 1,
            f"algorithm.importance_cap must be 0 (off) or >= 1, got {self.importance_cap:g}",
        )


@dataclass(frozen=True)
class LearnerConfig:
    """The optimiser and how the model is spread over ranks (FSDP2).

    num_ranks: learner processes, one per device.
    device: "auto", "cpu" or "cuda". precision: "float32" or "bfloat16" (master weights and reduction stay float32).
    num_threads: CPU threads of each rank; 0 leaves it to torch.
    lr_schedule: "constant", "linear" or "cosine", after `warmup_steps`.
    vision_lr_scale: factor on a trained tower's lr.
    max_tokens_per_micro_batch: prompt once plus all responses of its groups.
    logits_chunk_tokens: response tokens whose logits exist at once.
    gradient_checkpointing: what backward computes again: "none", "full" (every layer), "every_n:K" (every K-th layer)
        or "attention" (every layer, except what its attention kernel returned).
    offload: keep parameters and optimiser state in CPU memory (accelerator only).
    compile: torch.compile of each decoder layer.
    attention: "auto", "sdpa" or "flash" (flash-attn varlen).
    self_check: compare the shared-prefix forward with a plain one on the first group of a run.
    encode_ahead: prompts whose images each rank decodes beforehand, in threads, while engines sample and while it
        computes; a decoded image holds 19 KB per image token.
    vision_cache_mb: CPU memory for image features of a frozen tower, which are kept across steps; 0 keeps none.
    feature_cache: folder that keeps a frozen tower's features over runs; "" keeps none. feature_cache_gb: its limit;
        features that were not used for longest go.
    max_bad_steps: non-finite steps in a row before the run stops.
    """

    num_ranks: int = 1
    device: str = "auto"
    precision: str = "bfloat16"
    num_threads: int = 0
    lr: float = 1e-6
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    vision_lr_scale: float = 1.0
    max_tokens_per_micro_batch: int = 32_768
    logits_chunk_tokens: int = 512
    gradient_checkpointing: str = "full"
    offload: bool = False
    compile: bool = False
    attention: str = "auto"
    self_check: bool = True
    encode_ahead: int = 8
    vision_cache_mb: int = 4096
    feature_cache: str = ""
    feature_cache_gb: float = 100.0
    max_bad_steps: int = 3

    def __post_init__(self) -> None:
        one_of("learner.device", self.device, ("auto", "cpu", "cuda"))
        one_of("learner.precision", self.precision, ("float32", "bfloat16"))
        one_of("learner.lr_schedule", self.lr_schedule, ("constant", "linear", "cosine"))
        one_of("learner.attention", self.attention, ("auto", "sdpa", "flash"))
        parse_checkpointing(self.gradient_checkpointing)
        require(
            not (self.compile and self.gradient_checkpointing == "attention"),
            "learner.compile=true takes no learner.gradient_checkpointing=attention: use full, every_n:K or none",
        )
        object.__setattr__(self, "betas", tuple(self.betas))
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"learner.betas must be two numbers in [0, 1), got {list(self.betas)}",
        )
        above(
            0,
            learner__lr=self.lr,
            learner__eps=self.eps,
            learner__max_grad_norm=self.max_grad_norm,
            learner__vision_lr_scale=self.vision_lr_scale,
            learner__feature_cache_gb=self.feature_cache_gb,
        )
        at_least(0, learner__num_threads=self.num_threads, learner__warmup_steps=self.warmup_steps)
        at_least(0, learner__weight_decay=self.weight_decay, learner__vision_cache_mb=self.vision_cache_mb)
        at_least(
            1,
            learner__num_ranks=self.num_ranks,
            learner__max_tokens_per_micro_batch=self.max_tokens_per_micro_batch,
            learner__logits_chunk_tokens=self.logits_chunk_tokens,
            learner__max_bad_steps=self.max_bad_steps,
            learner__encode_ahead=self.encode_ahead,
        )

    @property
    def recomputed_share(self) -> float:
        """Share of the decoder layers that backward computes again."""
        every = parse_checkpointing(self.gradient_checkpointing)
        return 1 / every if every else 0.0


def parse_checkpointing(how: str) -> int:
    """Return n where every n-th layer is recomputed (1: every one), 0 where none is."""
    known = {"none": 0, "full": 1, "attention": 1}
    if how in known:
        return known[how]
    match = re.fullmatch(r"every_n:([1-9]\d*)", str(how))
    require(
        match is not None,
        f"learner.gradient_checkpointing must be none, full, attention or every_n:K (every_n:2), got {how!r}",
    )
    return int(match[1])  # type: ignore[index]
