"""Teach a small vision tower to read through a linear head, before the language model is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, Qwen2VLImageProcessor


@dataclass(frozen=True, slots=True)
class Lessons:
    """Pages of one size and what their merged vision tokens show.

    pixels: (num_pages, patches, patch_dim) float32. grid: (3,) int64, shared by all pages.
    labels: (num_pages, merged tokens) int64.
    """

    pixels: torch.Tensor
    grid: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(
        cls, image_processor: Qwen2VLImageProcessor, pages: Sequence[Image.Image], labels: Sequence[Sequence[int]]
    ) -> Lessons:
        """Return the lessons that these pages and labels make.

        Raises:
            ValueError: the pages differ in size.
        """
        batch = image_processor(images=[page.convert("RGB") for page in pages], return_tensors="pt")
        pixels, grids = batch["pixel_values"], batch["image_grid_thw"]
        if not bool((grids == grids[0]).all()):
            raise ValueError("pages must have one size to be read in one batch")
        return cls(pixels.reshape(len(pages), -1, pixels.shape[-1]), grids[0], torch.tensor(labels))


def teach_to_read(
    model: PreTrainedModel,
    lessons: Lessons,
    *,
    num_labels: int,
    num_steps: int,
    batch_pages: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    on_step: Callable[[float], None] = lambda loss: None,
) -> nn.Linear:
    """Train the tower in place so that each merged vision token tells its label; return the linear head.

    lr: of AdamW; it falls linearly to 0 over the steps.
    on_step: called with the loss of every step.
    """
    tower = model.model.visual
    torch.manual_seed(seed)
    head = nn.Linear(tower.config.out_hidden_size, num_labels)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / num_steps)
    tower.train()
    for _ in range(num_steps):
        chosen = torch.randint(len(lessons.pixels), (batch_pages,))
        scores = _label_scores(model, head, lessons.pixels[chosen], lessons.grid)
        loss = nn.functional.cross_entropy(scores, lessons.labels[chosen].flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(loss.item())
    tower.eval()
    return head


@torch.no_grad()
def reading_accuracy(model: PreTrainedModel, head: nn.Linear, lessons: Lessons) -> float:
    """Return the share of tokens whose label tower and head read correctly."""
    scores = _label_scores(model, head, lessons.pixels, lessons.grid)
    return float((scores.argmax(-1) == lessons.labels.flatten()).float().mean())


def _label_scores(model: PreTrainedModel, head: nn.Linear, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Return (pages x merged tokens, num_labels) scores."""
    features = model.model.visual(pixels.flatten(0, 1), grid_thw=grid.expand(len(pixels), 3)).pooler_output
    return head(features)
