"""Which experts the tokens of a mixture took while the embedded engine sampled them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from rollout.types import Rollout


class ExpertRecorder:
    """Hears the routers of a model, and gives every forward's choices to the rows that it computed.

    Args:
        routers: by the index of their layer, with the interface of transformers' `Qwen3VLMoeTextTopKRouter`; none
            records nothing.
        num_layers: of the decoder; layers without experts are 0 in every array.
    """

    def __init__(self, routers: Mapping[int, nn.Module], num_layers: int) -> None:
        self._routers: list[Any] = list(routers.values())
        self._layers, self._num_layers = list(routers), num_layers
        self._heard: list[torch.Tensor] = []
        self._prompts: list[np.ndarray] = []
        self._unassigned: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._forwards: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for router in self._routers:
            router.register_forward_hook(self._hear)

    def _hear(self, _: nn.Module, __: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        self._heard.append(output[2].to(torch.int16))

    def begin(self) -> None:
        """Forget the batch before."""
        self._heard, self._forwards, self._prompts, self._unassigned = [], [], [], []

    def prefilled(self, is_token_PT: torch.Tensor) -> None:
        """Take the forward that was just made as that of prompts. is_token_PT: (P, T), False on padding."""
        if self._routers:
            experts_PTLk = self._array(self._choices(is_token_PT))
            self._prompts += [each[own] for each, own in zip(experts_PTLk, is_token_PT.cpu().numpy(), strict=True)]

    def decoded(self, is_token_BT: torch.Tensor) -> None:
        """Take the forward that was just made as that of rows, which `belongs_to` names. is_token_BT: as above."""
        if self._routers:
            self._unassigned.append((self._choices(is_token_BT), is_token_BT))

    def belongs_to(self, rows_B: torch.Tensor) -> None:
        """Name the rows of the decoding forwards since the last call, side by side; there may be none."""
        if self._unassigned:
            parts = torch.split(rows_B, [len(is_token_BT) for _, is_token_BT in self._unassigned])
            self._forwards += [(*forward, rows) for forward, rows in zip(self._unassigned, parts, strict=True)]
            self._unassigned = []

    def prompts(self, num_prompts: int) -> Sequence[np.ndarray | None]:
        """Return (T, layers, k) of each prompt of the batch; None where nothing is recorded."""
        return self._prompts if self._routers else [None] * num_prompts

    def attached(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Return the rows' rollouts with the experts that they took."""
        if not self._routers:
            return list(rollouts)
        nothing = np.zeros((0, self._num_layers, self._routers[0].top_k), dtype=self._dtype)
        pieces: list[list[np.ndarray]] = [[nothing] for _ in rollouts]
        for choices, is_token_BT, rows_B in self._forwards:
            experts_BTLk, is_token = self._array(choices), is_token_BT.cpu().numpy()
            for index, row in enumerate(rows_B.tolist()):
                pieces[row].append(experts_BTLk[index][is_token[index]])
        found = []
        for rollout, row in zip(rollouts, pieces, strict=True):
            # A row that has ended may be decoded on with those that have not.
            read = sum(len(observation.token_ids_S) for observation in rollout.observations)
            found.append(replace(rollout, experts_RLk=np.concatenate(row)[: len(rollout.token_ids_T) - 1 + read]))
        return found

    @property
    def _dtype(self) -> type:
        return np.uint8 if self._routers[0].num_experts <= 256 else np.uint16  # as vLLM has them

    def _choices(self, is_token_BT: torch.Tensor) -> torch.Tensor:
        """Return what was heard since the last call, (B, T, layers with experts, k)."""
        choices = torch.stack(self._heard, 1)
        self._heard = []
        return choices.reshape(*is_token_BT.shape, *choices.shape[1:])

    def _array(self, choices: torch.Tensor) -> np.ndarray:
        experts = np.zeros((*choices.shape[:2], self._num_layers, choices.shape[-1]), dtype=self._dtype)
        experts[:, :, self._layers] = choices.cpu().numpy()
        return experts
