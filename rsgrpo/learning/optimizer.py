"""The optimiser of one rank: AdamW, a schedule, gradient clipping, and what happens to a step that went wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rsgrpo.config.train import LearnerConfig
from rsgrpo.learning.schedule import lr_factor
from rsgrpo.types import RsgrpoError

logger = logging.getLogger(__name__)


class Optimizer:
    """AdamW over sharded parameters.

    Args:
        parameters: trained ones. vision: those among them that take `learner.vision_lr_scale`.
        total_steps: batches in the run, which the schedule spans.

    Attributes:
        step: batches so far, skipped ones included: the schedule's clock. updates: optimiser steps taken.
        bad_steps: non-finite steps in a row.
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
        """The learning rate of the batch at hand."""
        return self.config.lr * lr_factor(
            self.step,
            schedule=self.config.lr_schedule,
            warmup_steps=self.config.warmup_steps,
            total_steps=self.total_steps,
        )

    def take_step(self) -> dict[str, float]:
        """Clip the gradients that backward left, move the weights, and forget the gradients. Collective.

        A non-finite gradient norm moves nothing and counts; so do the metrics `actor/skipped` and `actor/bad_steps`.

        Raises:
            RsgrpoError: the last of `learner.max_bad_steps` in a row.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        norm_value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        lr = self.lr
        if not torch.isfinite(torch.tensor(norm_value)):
            self.adamw.zero_grad(set_to_none=True)
            self.bad_steps += 1
            logger.warning("gradient norm is %s: optimiser step skipped (%d in a row)", norm_value, self.bad_steps)
            if self.bad_steps >= self.config.max_bad_steps:
                raise NonFiniteSteps(
                    f"{self.bad_steps} optimiser steps in a row had a gradient norm of {norm_value} "
                    f"(learner.max_bad_steps={self.config.max_bad_steps}); look at the batch, lower learner.lr "
                    f"(now {lr:g}) or use learner.precision=float32"
                )
            return {"actor/lr": lr, "actor/skipped": 1.0, "actor/bad_steps": float(self.bad_steps)}
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.bad_steps = 0
        self.updates += 1
        return {"actor/lr": lr, "actor/grad_norm": norm_value, "actor/skipped": 0.0}


class NonFiniteSteps(RsgrpoError):
    """Too many non-finite steps in a row."""
