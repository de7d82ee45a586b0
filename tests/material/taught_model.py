"""A small model that has memorised a few answers, so that real engines return known text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from rollout.config import InputsConfig
from rollout.inputs.processor import InputProcessor
from rollout.types import Prompt


def save_taught(
    model_path: str, folder: Path, lessons: Sequence[tuple[Prompt, str]], inputs: InputsConfig, num_steps: int
) -> str:
    """Teach a model what to answer to each prompt, one lesson a step, and write it; return its folder."""
    processor = InputProcessor(model_path, inputs)
    model = AutoModelForImageTextToText.from_pretrained(model_path, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    examples = [example(processor, prompt, answer) for prompt, answer in lessons]
    torch.manual_seed(0)
    for step in range(num_steps):
        model(**examples[step % len(examples)]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(model_path).save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return str(folder)


def example(processor: InputProcessor, prompt: Prompt, answer: str) -> dict[str, Any]:
    """Return what a model is called with to follow an answer to a prompt: labels are its tokens and end-of-text."""
    encoded = processor.encode(prompt)
    response_T = [*processor.encode_response(answer)]
    token_ids_1T = torch.tensor([[*encoded.token_ids_T, *response_T]])
    labels_1T = token_ids_1T.clone()
    labels_1T[0, : len(encoded.token_ids_T)] = -100
    return {
        "input_ids": token_ids_1T,
        "labels": labels_1T,
        "mm_token_type_ids": (token_ids_1T == processor.image_token_id).int(),
        "pixel_values": encoded.pixel_values,
        "image_grid_thw": encoded.image_grid_thw,
    }
