"""Every key of the configuration, with its default and its meaning. Plain dataclasses: hydra lives in `rsgrpo.cli`.

Groups of `conf/` fill them. Each class checks its own ranges; `validate` (home: `rsgrpo.checks`) refuses combinations
that cannot work, before anything starts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from rollout.config import InputsConfig, RolloutConfig
from rsgrpo.checks import above, at_least, one_of, require
from rsgrpo.checks import validate as validate
from rsgrpo.checks import validate_sft as validate_sft


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
class DataConfig:
    """Rows to train on and to validate on.

    train, val: a .jsonl, .json or .parquet file, a folder, or a hub data set ("org/name" or "org/name:split").
    image_dir: folder that relative image paths start from; "" means the data file's own folder.
    prompt_key, answer_key, image_key, question_key, id_key: column names; question and id columns may be missing.
    bad_rows: "error" lists them and stops, "drop" drops and counts them.
    overlong: what happens to prompts over `inputs.max_prompt_tokens`: "error" or "drop".
    shuffle: a new order every epoch, fixed by `seed`.
    num_workers: threads that check and prepare rows.
    """

    train: str = ""
    val: str = ""
    image_dir: str = ""
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    image_key: str = "image"
    question_key: str = "question"
    id_key: str = "id"
    bad_rows: str = "error"
    overlong: str = "error"
    shuffle: bool = True
    num_workers: int = 4

    def __post_init__(self) -> None:
        one_of("data.bad_rows", self.bad_rows, ("error", "drop"))
        one_of("data.overlong", self.overlong, ("error", "drop"))
        at_least(1, data__num_workers=self.num_workers)


@dataclass(frozen=True)
class PromptConfig:
    """How a row's text becomes the user message.

    template: text with {question} and {images}; "" uses the row's own prompt as it stands.
    file: a template file; takes the place of `template`.
    system: the system message; "" leaves it to the model's chat template.
    """

    template: str = ""
    file: str = ""
    system: str = ""


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
    """RS-GRPO and its relatives (docs/algorithm.md).

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
    gradient_checkpointing: recompute layer activations in backward.
    offload: keep parameters and optimiser state in CPU memory (accelerator only).
    compile: torch.compile of each decoder layer.
    attention: "auto", "sdpa" or "flash" (flash-attn varlen).
    self_check: compare the shared-prefix forward with a plain one on the first group of a run.
    vision_cache_mb: CPU memory for image features of a frozen tower, which are kept across steps; 0 keeps none.
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
    logits_chunk_tokens: int = 2048
    gradient_checkpointing: bool = True
    offload: bool = False
    compile: bool = False
    attention: str = "auto"
    self_check: bool = True
    vision_cache_mb: int = 4096
    max_bad_steps: int = 3

    def __post_init__(self) -> None:
        one_of("learner.device", self.device, ("auto", "cpu", "cuda"))
        one_of("learner.precision", self.precision, ("float32", "bfloat16"))
        one_of("learner.lr_schedule", self.lr_schedule, ("constant", "linear", "cosine"))
        one_of("learner.attention", self.attention, ("auto", "sdpa", "flash"))
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
        )
        at_least(0, learner__num_threads=self.num_threads, learner__warmup_steps=self.warmup_steps)
        at_least(0, learner__weight_decay=self.weight_decay, learner__vision_cache_mb=self.vision_cache_mb)
        at_least(
            1,
            learner__num_ranks=self.num_ranks,
            learner__max_tokens_per_micro_batch=self.max_tokens_per_micro_batch,
            learner__logits_chunk_tokens=self.logits_chunk_tokens,
            learner__max_bad_steps=self.max_bad_steps,
        )


@dataclass(frozen=True)
class ValidationConfig:
    """Scoring on held-out rows with the run's own rewards and monitors.

    every: steps between validations; 0 is never. at_start: also before the first step.
    max_prompts: the first so many rows; 0 is all.
    greedy: one greedy response per prompt (metrics `val/greedy/*`).
    samples: sampled responses per prompt at `temperature`, `top_p` (metrics `val/sampled/*`); 0 is none.
    """

    every: int = 10
    at_start: bool = True
    max_prompts: int = 0
    greedy: bool = False
    samples: int = 1
    temperature: float = 0.1
    top_p: float = 0.95

    def __post_init__(self) -> None:
        at_least(0, validation__every=self.every, validation__max_prompts=self.max_prompts)
        at_least(0, validation__samples=self.samples)
        require(
            self.temperature > 0 or not self.samples,
            "validation.temperature=0 is greedy: set validation.greedy=true validation.samples=0",
        )
        require(0 < self.top_p <= 1, f"validation.top_p must be in (0, 1], got {self.top_p:g}")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints and resuming.

    every: steps between checkpoints; the last step always writes one. keep_last: newest ones to keep.
    keep_best: best ones to keep as well, by `metric` (higher is better).
    resume: "auto" continues from the run folder's newest checkpoint, "never" refuses to touch an existing run.
    export: write a Hugging Face folder at the end.
    """

    every: int = 10
    keep_last: int = 2
    keep_best: int = 1
    metric: str = "val/sampled/accuracy"
    resume: str = "auto"
    export: bool = True

    def __post_init__(self) -> None:
        at_least(1, checkpoint__every=self.every, checkpoint__keep_last=self.keep_last)
        at_least(0, checkpoint__keep_best=self.keep_best)
        one_of("checkpoint.resume", self.resume, ("auto", "never"))


@dataclass(frozen=True)
class TrackingConfig:
    """Where numbers go beside `metrics.jsonl`, which is always written.

    wandb: "online", "offline" or "disabled". project, entity: of Weights & Biases.
    tensorboard: also write event files.
    rollout_table_rows: sampled rollouts in the Weights & Biases table of a step; 0 is none.
    store_rollouts: write every step's rollouts as parquet (the report reads them).
    """

    wandb: str = "disabled"
    project: str = "rsgrpo"
    entity: str = ""
    tensorboard: bool = False
    rollout_table_rows: int = 8
    store_rollouts: bool = True

    def __post_init__(self) -> None:
        one_of("tracking.wandb", self.wandb, ("online", "offline", "disabled"))
        at_least(0, tracking__rollout_table_rows=self.rollout_table_rows)


@dataclass(frozen=True)
class GateConfig:
    """Engines are compared with the learner on fixed prompts; a difference stops the run (docs/rollout.md).

    every: steps between checks, which begin before the first step; 0 is never. Scripted engines are not checked.
    prompts: training rows that are compared, those with the most images. tokens: greedy tokens of each.
    tolerance: largest difference of a token's log-probability; 0 is 1e-4 where engine and learner both compute in
        float32, else 0.3.
    """

    every: int = 50
    prompts: int = 2
    tokens: int = 32
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        at_least(0, gate__every=self.every, gate__tolerance=self.tolerance)
        at_least(1, gate__prompts=self.prompts, gate__tokens=self.tokens)


@dataclass(frozen=True)
class ClusterConfig:
    """Ray.

    address: "" starts a local cluster, "auto" joins the one this machine belongs to, else host:port.
    num_cpus: CPUs of a local cluster; 0 counts the machine's.
    placement: "colocated" (engines and learner share devices) or "disaggregated".
    rollout_cpus, learner_cpus, reward_cpus: CPUs that each worker of a role reserves; fractions are fine.
    reward_workers: processes that run reward functions.
    startup_timeout_s: to place and start all workers.
    object_store_mb: Ray's shared memory on this machine (local clusters). sync_chunk_mb: weights in flight at once.
    """

    address: str = ""
    num_cpus: int = 0
    placement: str = "colocated"
    rollout_cpus: float = 0.25
    learner_cpus: float = 0.25
    reward_cpus: float = 0.1
    reward_workers: int = 1
    startup_timeout_s: float = 600.0
    object_store_mb: int = 512
    sync_chunk_mb: int = 64

    def __post_init__(self) -> None:
        one_of("cluster.placement", self.placement, ("colocated", "disaggregated"))
        at_least(0, cluster__num_cpus=self.num_cpus, cluster__rollout_cpus=self.rollout_cpus)
        at_least(0, cluster__learner_cpus=self.learner_cpus, cluster__reward_cpus=self.reward_cpus)
        at_least(1, cluster__reward_workers=self.reward_workers)
        above(0, cluster__startup_timeout_s=self.startup_timeout_s)


@dataclass(frozen=True)
class TrainConfig:
    """One run of `python -m rsgrpo.train`.

    name: of the run; its folder is `<output_dir>/<name>`. seed: the one source of every random draw.
    total_steps: optimiser batches; 0 takes `epochs` passes over the training rows.
    rewards: name -> "module:function". reward_weights: name -> loss weight > 0, 1 if not named.
    reward_args: name -> keyword arguments. reward_timeouts_s: name -> seconds per response, 0 if not named.
    on_reward_error: "stop", or "skip" (count it; the reward then does not apply to that response).
    monitors: name -> "module:function", scored and reported like rewards, never trained on.
    """

    name: str = "rsgrpo"
    output_dir: str = "runs"
    seed: int = 0
    total_steps: int = 0
    epochs: int = 1
    rewards: dict[str, str] = field(default_factory=dict)
    reward_weights: dict[str, float] = field(default_factory=dict)
    reward_args: dict[str, Any] = field(default_factory=dict)
    reward_timeouts_s: dict[str, float] = field(default_factory=dict)
    on_reward_error: str = "stop"
    monitors: dict[str, str] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    inputs: InputsConfig = field(default_factory=InputsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    gate: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        _check_run(self)
        one_of("on_reward_error", self.on_reward_error, ("stop", "skip"))
        for key, functions in (("rewards", self.rewards), ("monitors", self.monitors)):
            for name, function in functions.items():
                require(
                    re.fullmatch(r"[\w.]+:\w+", function) is not None,
                    f"{key}.{name} must be module:function, for example rewards.evisrag:accuracy; got {function!r}",
                )
        for name, weight in self.reward_weights.items():
            require(
                weight > 0,
                f"reward_weights.{name} must be > 0, got {weight:g}; to leave the reward out, use ~rewards.{name}",
            )
        for name, timeout_s in self.reward_timeouts_s.items():
            at_least(0, **{f"reward_timeouts_s__{name}": timeout_s})

    @property
    def needs_reference_workers(self) -> bool:
        """Whether a KL term needs a frozen copy of the model; LoRA runs switch their adapter off instead."""
        return self.algorithm.kl_coef > 0 and self.model.lora.rank == 0


@dataclass(frozen=True)
class SftConfig:
    """One run of `python -m recipes.sft`: the same model, data and learner, on gold responses.

    batch_size: rows per optimiser step. max_response_tokens: longer gold responses are bad rows.
    cluster: read when `learner.num_ranks` is over 1; one rank runs in the program itself.
    """

    name: str = "sft"
    output_dir: str = "runs"
    seed: int = 0
    total_steps: int = 0
    epochs: int = 1
    batch_size: int = 64
    max_response_tokens: int = 1536
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    inputs: InputsConfig = field(default_factory=InputsConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        _check_run(self)
        at_least(1, batch_size=self.batch_size, max_response_tokens=self.max_response_tokens)


def _check_run(run: TrainConfig | SftConfig) -> None:
    require(
        re.fullmatch(r"[\w.=,+-]+", run.name) is not None,
        f"name must be letters, digits and any of _.=,+- because it names the run folder; got {run.name!r}",
    )
    at_least(0, total_steps=run.total_steps, seed=run.seed)
    at_least(1 if run.total_steps == 0 else 0, epochs=run.epochs)
