"""Teach a small vision tower to read through a linear head, before it meets a language model.

Owns this one supervised loop over page images; knows nothing of prompts, rewards or the learner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor


def page_pixels(
    image_processor: Qwen2VLImageProcessor, pages: Sequence[Image.Image]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (num_pages, patches, patch_dim) pixels and the (3,) grid that all pages share."""
    batch = image_processor(images=[page.convert("RGB") for page in pages], return_tensors="pt")
    grids = batch["image_grid_thw"]
    if not bool((grids == grids[0]).all()):
        raise ValueError("pages must have one size to be read in one batch")
    return batch["pixel_values"].reshape(len(pages), -1, batch["pixel_values"].shape[-1]), grids[0]


def teach_to_read(
    model: Qwen2_5_VLForConditionalGeneration,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    grid: torch.Tensor,
    *,
    num_labels: int,
    num_steps: int,
    batch_pages: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    on_step: Callable[[float], None] = lambda loss: None,
) -> nn.Linear:
    """Train the tower in place so that each merged vision token tells its label; return the linear head.

    pixels: (num_pages, patches, patch_dim) float32. labels: (num_pages, merged tokens) int64. grid: (3,) int64.
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
        chosen = torch.randint(len(pixels), (batch_pages,))
        features = tower(pixels[chosen].flatten(0, 1), grid_thw=grid.expand(batch_pages, 3)).pooler_output
        loss = nn.functional.cross_entropy(head(features), labels[chosen].flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(loss.item())
    tower.eval()
    return head


@torch.no_grad()
def reading_accuracy(
    model: Qwen2_5_VLForConditionalGeneration,
    head: nn.Linear,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    grid: torch.Tensor,
) -> float:
    """Return the share of tokens whose label tower and head read rightly."""
    features = model.model.visual(pixels.flatten(0, 1), grid_thw=grid.expand(len(pixels), 3)).pooler_output
    return float((head(features).argmax(-1) == labels.flatten()).float().mean())
