"""The prompts of a run: what it trains on, what it validates on, and the stream that steps take from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rollout.inputs.processor import InputProcessor
from rollout.types import Prompt
from rsgrpo.config.train import TrainConfig
from rsgrpo.data.checked_images import CHECKED_FILE, CheckedImages
from rsgrpo.data.dataset import PromptDataset, PromptStream, load_prompts
from rsgrpo.data.streaming import NUM_SHOWN_AT_START, StreamedPrompts
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console


@dataclass(frozen=True, slots=True)
class RunPrompts:
    """train: the training prompts; of a streamed source the first ones. val: may be empty. stream: what steps take."""

    train: PromptDataset
    val: Sequence[Prompt]
    stream: PromptStream | StreamedPrompts


def load_run_prompts(config: TrainConfig, console: Console) -> RunPrompts:
    """Read and check the rows of a run; page images that were checked before are not decoded again.

    Raises:
        InputError: the model's processor cannot be loaded, or rows cannot be used.
    """
    processor = _processor(config)
    checked = CheckedImages(Path(config.output_dir) / CHECKED_FILE)

    def load(kind: str, source: str) -> PromptDataset:
        with console.phase(f"checking {kind} rows") as bar:
            return load_prompts(source, config.data, config.prompt, processor, checked=checked, progress=bar.update)

    validates = config.validation.every or config.validation.at_start
    stream: PromptStream | StreamedPrompts
    try:
        if config.data.streaming:
            stream = StreamedPrompts(config.data, config.prompt, processor, config.seed)
            train = stream.first(NUM_SHOWN_AT_START)
        else:
            train = load("training", config.data.train)
            stream = PromptStream(train, seed=config.seed, shuffle=config.data.shuffle)
        val = list(load("validation", config.data.val)) if config.data.val and validates else []
    finally:
        checked.save()
    console.info(f"page images: {checked.num_decoded} decoded, {checked.num_known} unchanged since an earlier start")
    return RunPrompts(train, val[: config.validation.max_prompts or None], stream)


def _processor(config: TrainConfig) -> InputProcessor:
    model = config.model
    try:
        return InputProcessor(
            model.path, config.inputs, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except OSError as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"model.path={model.path} cannot be loaded: {reason}\nA model from the hub needs a network once. Run "
            f"`hf download {model.path}` where there is one, and set model.path to the folder here."
        ) from error
