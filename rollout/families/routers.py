"""Routers of mixtures of experts: logits in float32, in engines and learner alike, and choices that are replayed.

Rounded to bfloat16, the logits of two experts are often equal or change places, and a token then takes another expert
than it took a moment ago. No expert has a capacity, so a token's experts depend on nothing but its own state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def route_in_float32(routers: Iterable[nn.Module]) -> None:
    """Let routers, in place, compute in float32; float32 models change by no bit.

    Each then has an attribute `replayed_Tk`: None, or experts, (T, k), that the next forwards take in the place of the
    router's own choice; -1 leaves a choice to it. A token's shares are always the router's own.

    routers: with the interface of transformers' `Qwen3VLMoeTextTopKRouter`.
    """
    for router in routers:
        _route_in_float32(router)


def _route_in_float32(router: Any) -> None:
    router.replayed_Tk = None

    def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_TH = hidden_states.reshape(-1, router.hidden_dim)
        logits_TE = F.linear(hidden_TH.float(), router.weight.float())
        probs_TE = torch.softmax(logits_TE, -1)
        shares_Tk, experts_Tk = torch.topk(probs_TE, router.top_k, dim=-1)
        if router.replayed_Tk is not None:
            replayed_Tk = router.replayed_Tk.long()
            experts_Tk = torch.where(replayed_Tk >= 0, replayed_Tk, experts_Tk)
            shares_Tk = probs_TE.gather(-1, experts_Tk)
        shares_Tk = shares_Tk / shares_Tk.sum(-1, keepdim=True)
        return logits_TE, shares_Tk.to(hidden_states.dtype), experts_Tk

    router.forward = forward
