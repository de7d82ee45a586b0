"""One rank's optimiser: AdamW, the learning-rate schedule, gradient clipping, and the handling of bad steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from rsgrpo.config.train import LearnerConfig
from rsgrpo.learning.fsdp import whole
from rsgrpo.types import RsgrpoError

logger = logging.getLogger(__name__)


class NonFiniteSteps(RsgrpoError):
    """Too many consecutive steps had a gradient norm that is not finite."""


def lr_factor(step: int, *, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """Return the factor on the learning rate of step 0, 1, …: linear warm-up, then constant or a decay to 0.

    schedule: "constant", "linear" or "cosine".

    >>> [lr_factor(step, schedule="linear", warmup_steps=2, total_steps=6) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


class Optimizer:
    """AdamW over sharded parameters.

    Args:
        parameters: the trained ones. vision: those among them that take `learner.vision_lr_scale`.
        total_steps: batches in the run, which the schedule spans.

    Attributes:
        step: batches so far, skipped ones included; the schedule follows it. updates: optimiser steps taken.
        bad_steps: consecutive non-finite steps.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        vision: Iterable[nn.Parameter],
        config: LearnerConfig,
        total_steps: int,
    ) -> None:
        self.config, self.total_steps = config, total_steps
        self.step = self.updates = self.bad_steps = 0
        self.parameters = list(parameters)
        is_vision = {id(parameter) for parameter in vision}
        groups = [
            {"params": [p for p in self.parameters if id(p) not in is_vision], "lr_scale": 1.0},
            {"params": [p for p in self.parameters if id(p) in is_vision], "lr_scale": config.vision_lr_scale},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    @property
    def lr(self) -> float:
        """The learning rate of the current batch."""
        config = self.config
        return config.lr * lr_factor(
            self.step, schedule=config.lr_schedule, warmup_steps=config.warmup_steps, total_steps=self.total_steps
        )

    def take_gradient(self) -> torch.Tensor:
        """Return the gradients that backward left, whole, flat and float32 on the CPU, and clear them. Collective."""
        parts = []
        for parameter in self.parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parts.append(whole(gradient).detach().float().flatten().cpu())
        self.adamw.zero_grad(set_to_none=True)
        return torch.cat(parts)

    def take_step(self) -> dict[str, float]:
        """Clip the gradients that backward left, update the weights, and clear the gradients. Collective.

        A non-finite gradient norm changes nothing; `actor/skipped` and `actor/bad_steps` count it.

        Raises:
            NonFiniteSteps: the last of `learner.max_bad_steps` consecutive ones.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        norm_value = float(whole(norm))
        lr = self.lr
        if not math.isfinite(norm_value):
            self.adamw.zero_grad(set_to_none=True)
            self.bad_steps += 1
            logger.warning("gradient norm is %s: optimiser step skipped (%d consecutive)", norm_value, self.bad_steps)
            if self.bad_steps >= self.config.max_bad_steps:
                raise NonFiniteSteps(
                    f"{self.bad_steps} consecutive optimiser steps had a gradient norm of {norm_value} "
                    f"(learner.max_bad_steps={self.config.max_bad_steps}). Look at the batch, lower learner.lr "
                    f"(now {lr:g}) or set learner.precision=float32"
                )
            return {"actor/lr": lr, "actor/skipped": 1.0, "actor/bad_steps": float(self.bad_steps)}
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.bad_steps = 0
        self.updates += 1
        return {"actor/lr": lr, "actor/grad_norm": norm_value, "actor/skipped": 0.0}


def merge_updates(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """Combine the metrics of a batch's optimiser steps: skipped ones are counted, maxima kept, the rest averaged."""
    merged = {}
    for key in sorted({key for result in results for key in result}):
        values = [result[key] for result in results if key in result]
        if key in ("actor/skipped", "actor/bad_steps"):
            merged[key] = sum(values)
        else:
            merged[key] = max(values) if key.endswith("_max") else sum(values) / len(values)
    return merged
