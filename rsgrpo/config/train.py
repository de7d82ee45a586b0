"""Every key of the configuration, with its default and its meaning. Plain dataclasses: hydra lives in `rsgrpo.cli`.

Groups of `conf/` fill them; those of the learner are in `rsgrpo.config.learner`, those of sampling in `rollout.config`.
Each class checks its own ranges; `rsgrpo.config.checks` refuses combinations that cannot work, before anything starts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from rollout.config import InputsConfig, RolloutConfig
from rsgrpo.config.guards import GuardsConfig as GuardsConfig
from rsgrpo.config.guards import check_names
from rsgrpo.config.learner import AlgorithmConfig as AlgorithmConfig
from rsgrpo.config.learner import FilterConfig as FilterConfig
from rsgrpo.config.learner import LearnerConfig as LearnerConfig
from rsgrpo.config.learner import LoraConfig as LoraConfig
from rsgrpo.config.learner import ModelConfig as ModelConfig
from rsgrpo.config.limits import above, at_least, one_of, require

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class DataConfig:
    """Rows to train on and to validate on.

    train, val: a .jsonl, .json or .parquet file, a folder, or a hub data set ("org/name" or "org/name:split").
    image_dir: folder that relative image paths start from; "" means the data file's own folder.
    prompt_key, answer_key, image_key, question_key, id_key: column names; question and id columns may be missing.
    gold: "module:function" that makes the gold columns into a row's `truth`; `rewards.gold` has those that are shipped.
    bad_rows: "error" lists them and stops, "drop" drops and counts them.
    overlong: what happens to prompts over `inputs.max_prompt_tokens`: "error" or "drop".
    shuffle: a new order every epoch, fixed by `seed`.
    streaming: read training rows while the run trains, instead of all of them before it (docs/howto/data.md).
    shuffle_buffer: rows that a streamed row is drawn from.
    num_workers: threads that check rows; 0 is one per CPU, at most 32.
    """

    train: str = ""
    val: str = ""
    image_dir: str = ""
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    image_key: str = "image"
    question_key: str = "question"
    id_key: str = "id"
    gold: str = "rewards.gold:detect"
    bad_rows: str = "error"
    overlong: str = "error"
    shuffle: bool = True
    streaming: bool = False
    shuffle_buffer: int = 1000
    num_workers: int = 0

    def __post_init__(self) -> None:
        one_of("data.bad_rows", self.bad_rows, ("error", "drop"))
        one_of("data.overlong", self.overlong, ("error", "drop"))
        at_least(0, data__num_workers=self.num_workers)
        at_least(1, data__shuffle_buffer=self.shuffle_buffer)


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
class ExportConfig:
    """What happens to the exported model (`checkpoint.export`).

    push_to_hub: model repository "org/name" that the export is uploaded to at the end; "" uploads nothing.
    private: only its owners may see the repository. One that is public is refused then.
    """

    push_to_hub: str = ""
    private: bool = True

    def __post_init__(self) -> None:
        require(
            not self.push_to_hub or REPOSITORY.fullmatch(self.push_to_hub) is not None,
            f"export.push_to_hub must be a repository org/name, got {self.push_to_hub!r}",
        )


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
    """Engines are compared with the learner on fixed prompts; a difference stops the run (docs/reference/rollout.md).

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
    export: ExportConfig = field(default_factory=ExportConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)

    def __post_init__(self) -> None:
        _check_run(self)
        one_of("on_reward_error", self.on_reward_error, ("stop", "skip"))
        for key, functions in (("rewards", self.rewards), ("monitors", self.monitors)):
            for name, function in functions.items():
                require(
                    re.fullmatch(r"[\w.]+:\w+", function) is not None,
                    f"{key}.{name} must be module:function, for example rewards.evisrag:accuracy; got {function!r}",
                )
        check_names(self.guards, self.rewards, self.monitors)
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
    export: ExportConfig = field(default_factory=ExportConfig)
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
    require(
        not run.data.streaming or run.total_steps > 0,
        "data.streaming=true does not know how many rows there are: set total_steps",
    )
    require(
        run.checkpoint.export or not run.export.push_to_hub,
        f"export.push_to_hub={run.export.push_to_hub} uploads the export, and checkpoint.export=false makes none",
    )
    at_least(1 if run.total_steps == 0 else 0, epochs=run.epochs)
