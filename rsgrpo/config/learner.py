"""Keys of the learner: the model it trains, what it learns and how. Neither Ray nor hydra is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from rollout.config import Dtype
from rollout.errors import ConfigError
from rollout.keys import check, key, nearest, require

Advantage = Literal["per_reward", "per_scope", "grpo", "dr_grpo", "rloo", "gdpo"]
CreditRule = Literal["own", "causal", "whole"]
Baseline = Literal["group", "leave_one_out", "strata", "shrunken"]
Scale = Literal["std", "none"]
Average = Literal["scope", "response"]
MissingMarker = Literal["void", "widen", "error"]
Ratio = Literal["token", "gspo", "cispo"]
KlEstimator = Literal["k1", "k2", "k3"]
DeviceKind = Literal["auto", "cpu", "cuda"]
LrSchedule = Literal["constant", "linear", "cosine"]
BaseBits = Literal[4, 16]
AttentionKind = Literal["auto", "sdpa", "flash"]


IMPORTANCE_CAP = 2.0
"""Cap of the importance weights where rollouts are of older weights and no other cap is set."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the language model."""

    rank: int = key(0, "Rank of the adapters; 0 trains all weights.", ge=0)
    alpha: int = key(32, "Scale of the adapters: their output is multiplied by alpha / rank.", gt=0)
    dropout: float = key(0.0, "Dropout before the adapters.", ge=0, lt=1)
    targets: list[str] = key(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "Names of the linear layers that get an adapter.",
    )
    base_bits: int = key(
        16, "Bits of a frozen weight under an adapter; 4 is NF4 (QLoRA) and needs bitsandbytes, CUDA and one rank."
    )

    def __post_init__(self) -> None:
        check(self, "model.lora")
        require(self.base_bits in get_args(BaseBits), f"model.lora.base_bits must be 16 or 4, got {self.base_bits}")
        require(
            self.base_bits == 16 or self.rank > 0,
            "model.lora.base_bits=4 packs the frozen weights under adapters, and model.lora.rank=0 trains all weights. "
            "Set model.lora.rank > 0 or model.lora.base_bits=16.",
        )
        require(not self.rank or bool(self.targets), "model.lora.targets is empty. Name the layers to adapt.")


@dataclass(frozen=True)
class ModelConfig:
    """The policy."""

    path: str = key("", "Hugging Face folder or hub id of the model.")
    revision: str = key("", 'Commit, branch or tag on the hub; "" takes the newest.')
    freeze_vision: bool = key(True, "Keep the vision tower as it is; features are computed once per image.")
    trust_remote_code: bool = key(False, "Run code that comes with the model.")
    teacher: str = key("", "Folder or hub id of a frozen model with the policy's tokens, for algorithm.distill_coef.")
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class FilterConfig:
    """Which groups are worth a training step (dynamic sampling)."""

    enabled: bool = key(False, "Drop groups whose mean weighted score is outside (low, high), and refill the batch.")
    low: float = key(0.01, "Lower limit of a group's mean weighted score, exclusive.")
    high: float = key(6.9, "Upper limit of a group's mean weighted score, exclusive.")
    weights: dict[str, float] = key({}, "Reward name -> factor in that score; a reward not named counts once.")
    drop_without_signal: bool = key(False, "Also drop groups in which no reward varies.")
    oversample: float = key(
        0.5,
        "Prompts in flight beyond those that a step still lacks, as a share of algorithm.prompts_per_step; what is not "
        "needed is sampled again with the next step's weights.",
        ge=0,
    )
    max_tries: int = key(
        20, "Prompts per step, in multiples of prompts_per_step, before the run stops and shows the scores.", ge=1
    )

    def __post_init__(self) -> None:
        check(self, "algorithm.filter")
        require(
            self.low < self.high,
            f"algorithm.filter keeps sums in (low, high): low={self.low:g} must be < high={self.high:g}",
        )


@dataclass(frozen=True)
class AlgorithmConfig:
    """RS-GRPO and its relatives."""

    advantage: str = key(
        "per_reward",
        f"How scores become advantages: {', '.join(get_args(Advantage))}, or module:function of your own.",
    )
    credit: CreditRule = key(
        "own",
        "Which tokens a reward teaches: its own scope (RS-GRPO as published), everything up to where it is determined "
        "(causal), or the whole response; per_reward and per_scope only.",
    )
    baseline: Baseline = key(
        "group",
        "What a score is compared with: the group's mean, the mean of the others, or the mean of rollouts with equal "
        "earlier scores (strata, shrunken); per_reward only.",
    )
    scale: Scale = key(
        "std", "What that difference is divided by: the group's standard deviation, or nothing; per_reward only."
    )
    average: Average = key(
        "scope", "What a term's sum over tokens is divided by: the tokens of its scope, or all response tokens."
    )
    missing_marker: MissingMarker = key(
        "void",
        "What a reward teaches where its scope's tag is missing: void (nothing), widen (the whole response) or error "
        "(stop).",
    )
    prompts_per_step: int = key(32, "Prompts sampled per step (P).", ge=1)
    updates_per_step: int = key(1, "Optimizer steps that share one batch of rollouts.", ge=1)
    ratio: Ratio = key("token", "The importance ratio: per token, per response (gspo) or as a detached weight (cispo).")
    clip_low: float = key(0.2, "The ratio is clipped from below at 1 - clip_low.", gt=0, lt=1)
    clip_high: float = key(0.28, "The ratio is clipped from above at 1 + clip_high.", gt=0)
    dual_clip: float = key(3.0, "Bound on the loss of negative advantages, in units of |A|; 0 is off.", gt=1, off=0)
    kl_coef: float = key(0.0, "Weight of the KL term to the reference model; 0 loads no reference.", ge=0)
    kl_estimator: KlEstimator = key("k3", "How the KL term is estimated; k1 has no gradient in expectation.")
    distill_coef: float = key(
        0.0, "Weight of the reverse KL to model.teacher on the policy's own responses; 0 loads no teacher.", ge=0
    )
    reward_coef: float = key(1.0, "Weight of the rewards' terms; 0 learns from the teacher alone.", ge=0)
    entropy_coef: float = key(0.0, "Weight of an entropy bonus.", ge=0)
    importance_cap: float = key(
        0.0,
        "Cap of each token's weight exp(old - rollout logprob); 0 is off, and becomes 2 where max_staleness > 0.",
        ge=1,
        off=0,
    )
    max_staleness: int = key(
        0,
        "0 samples each step with the newest weights; k samples the step k ahead while this one is learned, with "
        "weights that are k updates old when that step is learned from.",
        ge=0,
    )
    on_policy_shortcut: bool = key(True, "Take old logprobs from the training pass itself where that is exact.")
    filter: FilterConfig = field(default_factory=FilterConfig)

    def __post_init__(self) -> None:
        check(self, "algorithm")
        kinds = get_args(Advantage)
        is_own = re.fullmatch(r"[\w.]+:\w+", self.advantage) is not None
        require(
            is_own or self.advantage in kinds,
            f"algorithm.advantage must be one of {', '.join(kinds)}, or module:function of your own; got "
            f"{self.advantage!r}{nearest(self.advantage, kinds)}",
        )
        require(
            is_own or self.credit == "own" or self.advantage in ("per_reward", "per_scope"),
            f"algorithm.credit={self.credit} needs terms with scopes, and algorithm.advantage={self.advantage} teaches "
            "the whole response. Set algorithm.advantage=per_reward.",
        )
        require(
            (self.baseline, self.scale) == ("group", "std") or self.advantage == "per_reward",
            f"algorithm.baseline={self.baseline} and algorithm.scale={self.scale} are read by per_reward alone, got "
            f"algorithm.advantage={self.advantage}. Set algorithm.advantage=per_reward.",
        )
        require(
            not (self.kl_coef and self.distill_coef),
            f"algorithm.kl_coef={self.kl_coef:g} and algorithm.distill_coef={self.distill_coef:g} need one frozen "
            "model each, and a run has one. Set one of them to 0.",
        )
        require(
            self.reward_coef > 0 or (self.distill_coef > 0 and not self.filter.enabled),
            "algorithm.reward_coef=0 learns from a teacher alone, from every group. Set algorithm.distill_coef > 0 and "
            "algorithm.filter.enabled=false.",
        )
        if self.max_staleness and not self.importance_cap:  # older weights must be corrected for
            object.__setattr__(self, "importance_cap", IMPORTANCE_CAP)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a frozen model: its own start, or a teacher."""
        return self.kl_coef > 0 or self.distill_coef > 0


@dataclass(frozen=True)
class LearnerConfig:
    """The optimizer, and how the model is spread over ranks (FSDP2)."""

    num_ranks: int = key(1, "Learner processes, one per device.", ge=1)
    replicas: int = key(
        1,
        "Copies of the sharded state, each over num_ranks / replicas neighbouring ranks (HSDP): with one per node, "
        "weights are gathered within nodes and only gradients cross between them.",
        ge=1,
    )
    context_parallel: int = key(
        1,
        "Neighbouring ranks that share one row: each computes a part of every prompt and some of its responses, for "
        "prompts that do not fit one device; 1 is off.",
        ge=1,
    )
    device: DeviceKind = key("auto", "Device of the learner; auto uses CUDA where there is any.")
    precision: Dtype = key("bfloat16", "Precision of the computation; master weights and reductions stay float32.")
    num_threads: int = key(
        0,
        "CPU threads of each rank; 0 shares a node's cores among its GPUs' ranks, and leaves it to torch on CPU.",
        ge=0,
    )
    lr: float = key(1e-6, "Learning rate.", gt=0)
    lr_schedule: LrSchedule = key("constant", "Course of the learning rate after the warm-up.")
    warmup_steps: int = key(0, "Steps over which the learning rate rises to lr.", ge=0)
    betas: tuple[float, float] = key((0.9, 0.999), "AdamW's decay rates of the two moments, each in [0, 1).")
    eps: float = key(1e-8, "AdamW's term in the denominator.", gt=0)
    weight_decay: float = key(0.01, "AdamW's decoupled weight decay.", ge=0)
    max_grad_norm: float = key(1.0, "Gradients are scaled down to this norm.", gt=0)
    vision_lr_scale: float = key(1.0, "Factor on the learning rate of a trained vision tower.", gt=0)
    max_tokens_per_micro_batch: int = key(32_768, "Each prompt once, plus all responses of its group.", ge=1)
    logits_chunk_tokens: int = key(512, "Response tokens whose logits are in memory at once.", ge=1)
    gradient_checkpointing: str = key(
        "full",
        "What the backward pass recomputes: none, full (every layer), every_n:K (every K-th layer) or attention (every "
        "layer, except what its attention kernel returned).",
    )
    offload: bool = key(False, "Keep parameters and optimizer state in CPU memory (GPUs only).")
    compile: bool = key(False, "Compile each decoder layer with torch.compile.")
    attention: AttentionKind = key("auto", "Attention kernel; auto is flash-attn where it is installed, else sdpa.")
    self_check: bool = key(True, "Compare the shared-prefix pass with a plain one on the first group of a run.")
    encode_ahead: int = key(8, "Prompts decoded in advance per rank; images take 19 KB per image token.", ge=1)
    vision_cache_mb: int = key(4096, "CPU memory for features of a frozen tower; 0 keeps none across steps.", ge=0)
    feature_cache: str = key("", 'Folder that keeps a frozen tower\'s features across runs; "" keeps none.')
    feature_cache_gb: float = key(100.0, "Size limit of feature_cache; the longest unused are deleted.", gt=0)
    balance_coef: float = key(
        0.0,
        "Weight of the loss that spreads a response's tokens evenly over the experts of a mixture; 0 is off.",
        ge=0,
    )
    max_bad_steps: int = key(3, "Consecutive steps with a non-finite gradient tolerated before the run stops.", ge=1)

    def __post_init__(self) -> None:
        check(self, "learner")
        object.__setattr__(self, "betas", tuple(self.betas))
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"learner.betas must be two numbers in [0, 1), got {list(self.betas)}",
        )
        parse_checkpointing(self.gradient_checkpointing)
        require(
            self.num_ranks % self.replicas == 0,
            f"learner.num_ranks={self.num_ranks} cannot be split into learner.replicas={self.replicas} equal parts. "
            "Set it to a divisor, such as the number of nodes.",
        )
        require(
            self.num_ranks % self.context_parallel == 0,
            f"learner.num_ranks={self.num_ranks} cannot be split into teams of learner.context_parallel="
            f"{self.context_parallel} ranks. Set it to a divisor, or to 1.",
        )
        require(
            not (self.compile and self.gradient_checkpointing == "attention"),
            "learner.compile=true does not work with learner.gradient_checkpointing=attention. Set it to full, "
            "every_n:K or none.",
        )

    @property
    def recomputed_share(self) -> float:
        """Share of the decoder layers that the backward pass recomputes."""
        every = parse_checkpointing(self.gradient_checkpointing)
        return 1 / every if every else 0.0


def parse_checkpointing(how: str) -> int:
    """Return n if every n-th layer is recomputed, 0 if none is."""
    known = {"none": 0, "full": 1, "attention": 1}
    if how in known:
        return known[how]
    match = re.fullmatch(r"every_n:([1-9]\d*)", str(how))
    if match is None:
        raise ConfigError(
            f"learner.gradient_checkpointing must be none, full, attention or every_n:K (every_n:2), got {how!r}"
        )
    return int(match[1])
