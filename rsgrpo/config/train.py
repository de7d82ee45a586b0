"""Every key of the configuration, with its default, meaning and bounds, as plain dataclasses; `cli` fills them.

Keys of the learner are in `rsgrpo.config.learner`, those of sampling in `rollout.config`. Each class checks its own
bounds; `rsgrpo.config.checks` refuses combinations that cannot work.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from rollout.config import Dtype, InputsConfig, RolloutConfig
from rollout.keys import check, key, nearest, require
from rsgrpo.config.guards import GuardsConfig as GuardsConfig
from rsgrpo.config.guards import check_names
from rsgrpo.config.learner import AlgorithmConfig as AlgorithmConfig
from rsgrpo.config.learner import FilterConfig as FilterConfig
from rsgrpo.config.learner import LearnerConfig as LearnerConfig
from rsgrpo.config.learner import LoraConfig as LoraConfig
from rsgrpo.config.learner import ModelConfig as ModelConfig

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
COLUMNS = {name: name for name in ("prompt", "answer", "image", "question", "id", "video")}
PlacementKind = Literal["colocated", "disaggregated"]
CPUS = {"rollout": 0.25, "learner": 0.25, "reward": 0.1}


@dataclass(frozen=True)
class DataConfig:
    """Rows to train on and to validate on."""

    train: str = key("", 'Training rows: a .jsonl, .json or .parquet file, a folder or a hub id ("org/name:split").')
    val: str = key("", "Held-out rows, in the same forms.")
    image_dir: str = key("", 'Folder that relative image paths start from; "" means the data file\'s own folder.')
    columns: dict[str, str] = key(COLUMNS, "Column names; those of question and id may be missing in the data.")
    gold: str = key("rewards.gold:detect", "module:function that turns the gold columns into a row's truth.")
    bad_rows: Literal["error", "drop"] = key("error", "Unusable rows: error lists them and stops, drop counts them.")
    overlong: Literal["error", "drop"] = key("error", "The same for prompts over inputs.max_prompt_tokens.")
    shuffle: bool = key(True, "Use a new order every epoch, fixed by seed.")
    streaming: bool = key(False, "Read training rows while the run trains, not all of them before it.")
    shuffle_buffer: int = key(1000, "Rows among which each streamed row is drawn.", ge=1)

    def __post_init__(self) -> None:
        check(self, "data")
        object.__setattr__(self, "columns", _filled("data.columns", self.columns, COLUMNS))


@dataclass(frozen=True)
class PromptConfig:
    """How a row's text becomes the user message."""

    template: str = key("", 'Text with {question} and {images}; "" uses the row\'s own prompt.')
    file: str = key("", "A file with the template; used instead of template.")
    system: str = key("", 'The system message; "" leaves it to the model\'s chat template.')


@dataclass(frozen=True)
class ValidationConfig:
    """Scoring on held-out rows with the run's own rewards and monitors."""

    every: int = key(10, "Steps between validations; 0 never validates, not at the start either.", ge=0)
    at_start: bool = key(True, "Also validate before the first step.")
    max_prompts: int = key(0, "Use only the first rows, up to this number; 0 uses all.", ge=0)
    greedy: bool = key(False, "Score one greedy response per prompt (metrics val/greedy/*).")
    samples: int = key(1, "Sampled responses per prompt (metrics val/sampled/*); 0 samples none.", ge=0)
    temperature: float = key(0.1, "Temperature of those samples.", ge=0)
    top_p: float = key(0.95, "Nucleus probability of those samples.", gt=0, le=1)

    def __post_init__(self) -> None:
        check(self, "validation")
        require(
            self.temperature > 0 or not self.samples,
            "validation.temperature=0 is greedy. Set validation.greedy=true validation.samples=0.",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints and resuming."""

    every: int = key(10, "Steps between checkpoints; the last step always writes one.", ge=1)
    keep_last: int = key(2, "Number of most recent checkpoints to keep.", ge=1)
    keep_best: int = key(1, "Number of best checkpoints to keep as well.", ge=0)
    metric: str = key("val/sampled/accuracy", "The score that decides which are best; higher is better.")
    resume: Literal["auto", "strict", "never"] = key(
        "auto",
        "auto resumes from the run folder's newest undamaged checkpoint; strict refuses if a newer one is damaged; "
        "never refuses to touch an existing run.",
    )
    background: bool = key(
        True, "Write while the next steps run, which takes memory for a copy of the learner's state; false waits."
    )
    export: bool = key(True, "Write a Hugging Face folder at the end.")

    def __post_init__(self) -> None:
        check(self, "checkpoint")


@dataclass(frozen=True)
class ExportConfig:
    """What happens to the exported model (checkpoint.export)."""

    push_to_hub: str = key("", 'Model repository "org/name" to upload the export to at the end; "" uploads nothing.')
    private: bool = key(True, "Only the repository's owners may see it; a public repository is then refused.")
    dtype: Dtype = key(
        "float32", "Precision of the exported weights; bfloat16 halves the folder and rounds the weights."
    )

    def __post_init__(self) -> None:
        require(
            not self.push_to_hub or REPOSITORY.fullmatch(self.push_to_hub) is not None,
            f"export.push_to_hub must be a repository org/name, got {self.push_to_hub!r}",
        )


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go in addition to `metrics.jsonl`, which is always written."""

    wandb: Literal["online", "offline", "disabled"] = key("disabled", "Mode of Weights & Biases.")
    project: str = key("rsgrpo", 'Project of Weights & Biases: "project", or "team/project" for a team\'s.')
    rollout_table_rows: int = key(8, "Rollouts, with pages, in a step's Weights & Biases table; 0 is none.", ge=0)
    tensorboard: bool = key(False, "Also write TensorBoard event files.")
    store_rollouts: bool = key(True, "Write every step's rollouts as parquet; the report reads them.")

    def __post_init__(self) -> None:
        check(self, "tracking")


@dataclass(frozen=True)
class GateConfig:
    """The comparison of engines with the learner on fixed prompts; a difference stops the run."""

    every: int = key(
        50,
        "Steps between comparisons, starting before the first step; 0 never compares. Scripted engines are exempt.",
        ge=0,
    )
    tolerance: float = key(
        0.0,
        "Largest difference allowed in a token's log-probability; 0 is 1e-4 where engine and learner both compute in "
        "float32, else 0.3. Above 1e-4 a response may differ by a third of it on average, one token by three times.",
        ge=0,
    )

    def __post_init__(self) -> None:
        check(self, "gate")


@dataclass(frozen=True)
class ClusterConfig:
    """Where the roles of a run live: in Ray's processes, or all in this one."""

    kind: Literal["ray", "inline"] = key(
        "ray",
        "ray: a process per worker. inline: everything in this process, without Ray, for one device or a debugger; the "
        "other keys of this part are then not used.",
    )
    address: str = key("", '"" starts a local cluster, "auto" joins the one of this machine, else host:port.')
    num_cpus: int = key(0, "CPUs of a local cluster; 0 uses the number of CPUs of the machine.", ge=0)
    placement: PlacementKind = key(
        "colocated", "Whether engines and learner share devices (colocated) or each have their own (disaggregated)."
    )
    cpus: dict[str, float] = key(CPUS, "Role (rollout, learner, reward) -> CPUs that each of its workers reserves.")
    reward_workers: int = key(1, "Processes that run reward functions.", ge=1)
    startup_timeout_s: float = key(
        1800.0, "Time limit to place and start all workers, and to restart one that was lost.", gt=0
    )
    silence_timeout_s: float = key(
        300.0,
        "A worker that has not answered for this long (it is stopped, or stuck in foreign code) is killed and handled "
        "as one that died.",
        gt=0,
    )
    max_recoveries: int = key(
        3,
        "Times in a row, without a new checkpoint between them, that a run resumes by itself after a learner rank or a "
        "reference died.",
        ge=0,
    )
    object_store_mb: int = key(512, "Ray's shared memory on this machine (local clusters).", ge=1)

    def __post_init__(self) -> None:
        check(self, "cluster")
        object.__setattr__(self, "cpus", _filled("cluster.cpus", self.cpus, CPUS))
        for role, cpus in self.cpus.items():
            require(cpus >= 0, f"cluster.cpus.{role} must be >= 0, got {cpus:g}")


@dataclass(frozen=True)
class RunConfig:
    """What training and warm start have in common."""

    name: str = key("rsgrpo", "Name of the run; its folder is <output_dir>/<name>.")
    output_dir: str = key("runs", "Folder that holds run folders.")
    seed: int = key(0, "The single source of every random draw.", ge=0)
    total_steps: int = key(0, "Steps to train; 0 trains for `epochs` passes over the training rows.", ge=0)
    epochs: int = key(1, "Passes over the training rows; read when total_steps is 0.", ge=0)
    made_by: dict[str, str] = key({}, "Start of a path -> command that makes what is there; errors name it.")
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
        check(self)
        require(
            re.fullmatch(r"(?!\.+$)[\w.=,+-]+", self.name) is not None,
            f"name must be letters, digits and any of _.=,+- because it names the run folder; got {self.name!r}",
        )
        require(self.total_steps + self.epochs > 0, f"epochs must be >= 1 where total_steps is 0, got {self.epochs}")
        require(
            not self.data.streaming or self.total_steps > 0,
            "data.streaming=true cannot count the rows in advance. Set total_steps.",
        )
        require(
            self.checkpoint.export or not self.export.push_to_hub,
            f"export.push_to_hub={self.export.push_to_hub} needs an export. Set checkpoint.export=true.",
        )


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One run of `python -m rsgrpo.train`."""

    rewards: dict[str, str] = key({}, "Name -> module:function.")
    reward_weights: dict[str, float] = key({}, "Name -> weight in the loss, > 0; 1 where not named.")
    reward_args: dict[str, Any] = key({}, "Name -> keyword arguments of the function.")
    reward_timeouts_s: dict[str, float] = key({}, "Name -> time limit per response; 0 or not named is none.")
    on_reward_error: Literal["stop", "skip"] = key(
        "stop", "When a reward raises: stop the run, or skip (count it; the reward does not apply to that response)."
    )
    monitors: dict[str, str] = key({}, "Name -> module:function, scored and reported like rewards, never trained on.")
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, function in [*self.rewards.items(), *self.monitors.items()]:
            where = "rewards" if name in self.rewards else "monitors"
            require(
                re.fullmatch(r"[\w.]+:\w+", function) is not None,
                f"{where}.{name} must be module:function, for example rewards.evisrag:accuracy; got {function!r}",
            )
        check_names(self.guards, self.rewards, self.monitors)
        for name, weight in self.reward_weights.items():
            require(
                weight > 0,
                f"reward_weights.{name} must be > 0, got {weight:g}. To drop the reward, use ~rewards.{name}.",
            )
        for name, timeout_s in self.reward_timeouts_s.items():
            require(timeout_s >= 0, f"reward_timeouts_s.{name} must be >= 0, got {timeout_s:g}")

    @property
    def needs_reference_workers(self) -> bool:
        """Whether a frozen model must be loaded beside the policy: a teacher, or its own start.

        LoRA runs switch their adapter off instead of loading their start again.
        """
        return self.algorithm.distill_coef > 0 or (self.algorithm.kl_coef > 0 and self.model.lora.rank == 0)

    @property
    def changes_weights_in_flight(self) -> bool:
        """Whether engines are given new weights while they sample, instead of between batches."""
        return self.rollout.engine == "vllm" and self.rollout.vllm.in_flight


@dataclass(frozen=True)
class SftConfig(RunConfig):
    """One run of `python -m recipes.sft`: the same model, data and learner, on gold responses.

    rollout: the engines that validate. cluster: read where `learner.num_ranks` is over 1 or an engine is vLLM; else the
    run has one process.
    """

    name: str = key("sft", "Name of the run; its folder is <output_dir>/<name>.")
    batch_size: int = key(64, "Rows per optimizer step.", ge=1)
    max_response_tokens: int = key(1536, "Longest gold response in tokens; rows with longer ones are bad rows.", ge=1)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


def _filled(where: str, given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults overridden by what is given; refuse names that are not among them."""
    for name in given:
        require(name in defaults, f"{where}.{name}: there is no such key{nearest(name, defaults)}")
    return defaults | given
