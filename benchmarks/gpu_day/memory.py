"""Peak memory of whole updates of the learner, optimiser included, against what `rsgrpo.plan` computes."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_day.day import Day
from benchmarks.gpu_day.material import TINY, TOKEN_PIXELS, pages, shaped_model, tokenizer_of
from benchmarks.learner import PeakTensors, clock
from benchmarks.learner_sides import SHAPES
from recipes.demo.model import save_model_folder
from rollout.config import InputsConfig, RolloutConfig
from rollout.inputs.processor import InputProcessor
from rollout.types import Prompt
from rsgrpo.config.train import LearnerConfig, LoraConfig, ModelConfig
from rsgrpo.learning.learner import Learner
from rsgrpo.plan.config import PlanConfig
from rsgrpo.plan.memory import learner_memory
from rsgrpo.plan.model_sizes import count_sizes
from rsgrpo.types import Sample, TrainGroup

GIB = 2**30


def run(day: Day) -> None:
    """Measure 3B with all weights trained, and 7B with adapters."""
    table = day.record.table(
        "Peak of the second update, one group in one row, GiB (without the CUDA context)",
        ["model", "trained", "measured", "planned", "planned / measured", "update s"],
    )
    for size, lora in (("3b", LoraConfig()), ("7b", LoraConfig(rank=64))):
        trained = f"adapters of rank {lora.rank}" if lora.rank else "all but the tower"
        try:
            measured, planned, seconds = measure(day, size, lora)
        except torch.OutOfMemoryError:
            day.record.row(table, size, trained, "out of memory", None, None, None)
        else:
            day.record.row(table, size, trained, measured, planned, f"{planned / measured:.2f}", seconds)
        gc.collect()
        if day.on_gpu:
            torch.cuda.empty_cache()


def measure(day: Day, size: str, lora: LoraConfig) -> tuple[float, float, float]:
    """Return the measured and the planned peak in GiB, and the seconds of an update."""
    images, image_tokens, words = day.pick((5, 2000, 950), (2, 16, 20))
    group, response = day.pick((8, 700), (3, 10))
    shape = day.pick(SHAPES[size], TINY)
    tokenizer = tokenizer_of(shape)
    folder = day.work / f"processor_{size}"
    tiny: Any = shaped_model(replace(TINY, vocab=shape.vocab), tokenizer, torch.device("cpu"), torch.float32)
    save_model_folder(tiny, tokenizer, folder, max_pixels=image_tokens * TOKEN_PIXELS)  # for its processor only
    published: Any = shaped_model(shape, tokenizer, day.device, torch.bfloat16)
    model = published.float()  # exact in bfloat16, as published weights are
    sizes = count_sizes(model.config.to_dict())
    paths = pages(day.work / f"pages_{size}", images, image_tokens)
    groups = [one_group(paths, words, group, response, shape.vocab)]
    inputs = InputsConfig(TOKEN_PIXELS, image_tokens * TOKEN_PIXELS, images, 100_000)
    encoder = InputProcessor(str(folder), inputs)
    prompt_tokens = len(encoder.encode(groups[0].prompt).token_ids_T)
    config = PlanConfig(
        model=ModelConfig(path=str(folder), lora=lora),
        inputs=replace(inputs, max_prompt_tokens=prompt_tokens),
        rollout=RolloutConfig(group_size=group, max_response_tokens=response),
        learner=LearnerConfig(
            device="cuda" if day.on_gpu else "cpu",
            precision="bfloat16" if day.on_gpu else "float32",
            max_tokens_per_micro_batch=prompt_tokens + group * response,
            self_check=False,  # its pass on a plain row is not a part of a step
        ),
    )
    planned = learner_memory(config, sizes)
    learner = Learner(config.model, config.learner, config.inputs, total_steps=4, hf_model=model, encoder=encoder)
    learner.update(groups, [1.0])  # brings the optimiser's state
    if not day.on_gpu:
        started = clock(day.device)
        with PeakTensors(model) as peak:
            learner.update(groups, [1.0])
        held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        held += 2 * sum(parameter.numel() * 4 for parameter in model.parameters() if parameter.requires_grad)
        return (held + peak.peak) / GIB, _sum(planned), clock(day.device) - started
    torch.cuda.reset_peak_memory_stats()
    started = clock(day.device)
    learner.update(groups, [1.0])
    return torch.cuda.max_memory_allocated() / GIB, _sum(planned), clock(day.device) - started


def _sum(planned: Any) -> float:
    return float(sum(planned.static.values()) + sum(planned.learning.values()))


def one_group(paths: list[str], words: int, group: int, response: int, vocab: int) -> TrainGroup:
    """Return a group of random responses with random advantages."""
    rng = np.random.default_rng(0)
    text = "<image>" * len(paths) + " ".join(["page"] * words)
    samples = []
    for _ in range(group):
        whole = np.ones((1, response), dtype=bool)
        advantages = np.full((1, response), rng.normal(), dtype=np.float32)
        samples.append(Sample(rng.integers(400, vocab, response), whole, advantages))
    return TrainGroup(Prompt("group", text, tuple(paths)), tuple(samples))
