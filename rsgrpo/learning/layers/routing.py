"""The routers of a mixture of experts: how evenly they spread tokens, a loss that evens them, and replayed choices.

It does not know how experts compute. Policies without routers have nothing to report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rsgrpo.types import MicroBatch, RsgrpoError


class Routing:
    """Hears a policy's routers while it is asked to; what a backward pass recomputes goes unheard.

    routers: by the index of their layer; each returns (logits (T, E) float32, shares (T, k), experts (T, k)).
    """

    def __init__(self, routers: Mapping[int, nn.Module]) -> None:
        self._routers: Mapping[int, Any] = routers
        self._is_heard = self._is_replayed = False
        self._logits: list[torch.Tensor] = []
        self._experts: list[torch.Tensor] = []
        for router in routers.values():
            router.register_forward_hook(self._hear)

    def _hear(self, _: nn.Module, __: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        if self._is_heard:
            self._logits.append(output[0])
            self._experts.append(output[2])

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Keep what the routers do inside the block, in the place of what they did before."""
        self._logits, self._experts, self._is_heard = [], [], True
        try:
            yield
        finally:
            self._is_heard = False

    def replay(self, experts_TLk: torch.Tensor | None) -> None:
        """Let the next forward, and its recomputation in a backward pass, take these experts: `MicroBatch.experts_TLk`.

        None lets the routers choose.

        Raises:
            RsgrpoError: they are not those of a model of this shape.
        """
        self._is_replayed = experts_TLk is not None
        if experts_TLk is not None:
            self._require_fit(experts_TLk)
        for layer, router in self._routers.items():
            router.replayed_Tk = None if experts_TLk is None else experts_TLk[:, layer]

    def _require_fit(self, experts_TLk: torch.Tensor) -> None:
        (_, num_layers, top_k), largest = experts_TLk.shape, int(experts_TLk.max())
        last, router = max(self._routers.items(), default=(-1, None))
        if router is None or last >= num_layers or top_k != router.top_k or largest >= router.num_experts:
            own = "has none" if router is None else f"takes {router.top_k} of {router.num_experts} in {last + 1} layers"
            raise RsgrpoError(
                f"the rollouts come with {top_k} experts per token in {num_layers} layers, numbered up to {largest}, "
                f"but the policy {own}. Sample with the policy's own model, or set rollout.routing_replay=false"
            )

    def metrics(self, batch: MicroBatch, num_tokens: int) -> dict[str, torch.Tensor]:
        """Return what is worth watching.

        The load is that of the busiest expert of any layer: 1 is an even spread, E / k all tokens on one expert. With
        replayed experts also this micro-batch's share of how many of them the routers would not have taken, where a
        response token is predicted.

        num_tokens: response tokens in the whole step.
        """
        pairs = list(zip(self._logits, self._experts, strict=True))
        if not pairs:
            return {}
        loads = [expert_load(experts, logits.shape[1]).max() for logits, experts in pairs]
        metrics = {"actor/expert_load_max": torch.stack(loads).max()}
        if self._is_replayed:
            at_N = batch.head_index_N
            foreign = [foreign_choices(logits[at_N], experts[at_N]).sum() for logits, experts in pairs]
            metrics["actor/routing_mismatch"] = torch.stack(foreign).mean() / num_tokens
        return metrics

    def balance_loss(self, batch: MicroBatch, num_samples: int) -> torch.Tensor | float:
        """Return the micro-batch's share of the mean over the step's responses and layers of `response_balance`.

        num_samples: responses in the whole step.
        """
        pairs = zip(self._logits, self._experts, strict=True)
        losses = [response_balance(logits, experts, batch) for logits, experts in pairs]
        return torch.stack(losses).mean() / num_samples if losses else 0.0


def expert_load(experts_Tk: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return (E,) how many times the mean of all experts each one was taken.

    >>> expert_load(torch.tensor([[0], [0], [1], [0]]), 2)
    tensor([1.5000, 0.5000])
    """
    counts = torch.bincount(experts_Tk.flatten(), minlength=num_experts)
    return counts * num_experts / experts_Tk.numel()


def foreign_choices(logits_TE: torch.Tensor, experts_Tk: torch.Tensor) -> torch.Tensor:
    """Return (T,) the share of a token's experts that are not among the k with the largest logits.

    >>> foreign_choices(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[2, 0]]))
    tensor([0.5000])
    """
    least_T1 = logits_TE.topk(experts_Tk.shape[1]).values[:, -1:]
    return (logits_TE.gather(1, experts_Tk) < least_T1).float().mean(1)


def response_balance(logits_TE: torch.Tensor, experts_Tk: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Return the sum over responses of E sum_e f_e p_e; 1 per response where experts are taken evenly.

    f_e is the share of a response's choices that fell on expert e, p_e the mean probability that its tokens gave it
    (DeepSeek-V3, arXiv:2412.19437, equations 17 to 20, the balance within a sequence). A response is a sequence here,
    so the loss does not depend on what shares its micro-batch, as the balance within a batch would.
    """
    at_N, sample_N = batch.head_index_N, batch.sample_index_N
    num_experts, num_samples = logits_TE.shape[1], int(sample_N[-1]) + 1
    lengths_S1 = torch.bincount(sample_N, minlength=num_samples)[:, None]
    probs_NE = torch.softmax(logits_TE[at_N], -1)
    taken_NE = torch.zeros_like(probs_NE).scatter_(1, experts_Tk[at_N], 1.0 / experts_Tk.shape[1])
    sums_SE = [
        probs_NE.new_zeros(num_samples, num_experts).index_add(0, sample_N, each) for each in (taken_NE, probs_NE)
    ]
    return num_experts * (sums_SE[0] * sums_SE[1] / lengths_S1**2).sum()
