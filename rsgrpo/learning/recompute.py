"""Which activations backward computes again instead of keeping them. Knows layers, nothing of sharding or losses."""

from __future__ import annotations

import functools
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from rsgrpo.config.learner import parse_checkpointing
from rsgrpo.learning.policy import Policy


def recompute(policy: Policy, how: str) -> None:
    """Set up gradient checkpointing of the policy's layers, as `learner.gradient_checkpointing` says.

    "none" keeps everything, "full" recomputes every layer from its input, "every_n:K" every K-th layer; "attention"
    recomputes every layer but for what its attention kernel returned.
    """
    every = parse_checkpointing(how)
    if not every:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "attention":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
    policy.hf.gradient_checkpointing_enable(options)
    layers: list[Any] = list(policy.family.decoder_layers(policy.hf))
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index % every == 0


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what the kernels of torch (`aten::_scaled_dot_product_...`) and of flash-attn return."""
    name = str(operator)
    is_attention = "scaled_dot_product" in name or "flash_attn" in name
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE
