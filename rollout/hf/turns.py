"""Conversations in the embedded engine: sample a turn of every row, let environments answer, read the answers, go on.

The cache of keys and values is kept from turn to turn. Turns and answers differ in length, so the cache has holes: a
column that belongs to some rows is masked in the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from rollout.hf.decoding import Prefilled
from rollout.inputs.processor import PromptInputs
from rollout.turns.episode import Episode

ANSWERS_AT_ONCE = 64
"""Environments that are asked at the same time."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """What B rows read between two turns: each row's last sampled token, then its observation, padded on the left.

    token_ids_BL: (B, L) int64. is_token_BL: (B, L) bool, False on padding. starts_B: position of each row's last token.
    observations: one per row, with their pixels.
    """

    token_ids_BL: torch.Tensor
    is_token_BL: torch.Tensor
    starts_B: torch.Tensor
    observations: Sequence[PromptInputs]


Choose = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(logits_BV, rows_B, draws_B) -> (tokens_B, logprobs_B); draws_B counts the tokens that a row has sampled before."""

Read = Callable[[Block, torch.Tensor, Cache], tuple[torch.Tensor, torch.Tensor]]
"""(block, mask (B, 1, L, S), cache) -> (logits (B, V) behind it, position (B,) of the token behind it)."""


class Conversations:
    """The rows of a batch on their way through their episodes.

    Args:
        prompts: their caches are consumed. episodes: one per row, the siblings of a prompt side by side.
        forward: (tokens_B1, positions_3B1, attention_mask, cache) -> logits (B, V) of one more position.
        max_tokens: that a row may sample, over all its turns.
    """

    def __init__(
        self,
        prompts: Prefilled,
        episodes: Sequence[Episode],
        forward: Callable[..., torch.Tensor],
        choose: Choose,
        read: Read,
        *,
        max_tokens: int,
        eos_token_id: int,
    ) -> None:
        num_siblings = len(episodes) // len(prompts.logits_PV)
        self._cache, self._episodes = prompts.cache, list(episodes)
        self._cache.batch_repeat_interleave(num_siblings)
        self._logits = prompts.logits_PV.repeat_interleave(num_siblings, dim=0)
        self._can_attend = prompts.is_token_PT.repeat_interleave(num_siblings, dim=0)
        self._positions = prompts.next_positions_P.repeat_interleave(num_siblings)
        self._rows = torch.arange(len(episodes), device=self._logits.device)
        self._forward, self._choose, self._read = forward, choose, read
        self._max_tokens, self._eos_token_id = max_tokens, eos_token_id

    def run(self) -> None:
        """Take every episode to its end."""
        with ThreadPoolExecutor(ANSWERS_AT_ONCE, thread_name_prefix="episodes") as pool:
            while self._episodes:
                turns = self._sample_turn()
                answers = list(pool.map(self._answer, self._episodes, turns))
                self._go_on(turns, answers)

    def _answer(self, episode: Episode, turn: tuple[list[int], list[float]]) -> PromptInputs | None:
        is_cut = episode.num_tokens + len(turn[0]) >= self._max_tokens
        return episode.answer(*turn, is_cut=is_cut)

    def _sample_turn(self) -> list[tuple[list[int], list[float]]]:
        """Sample until every row has finished its turn; return (token ids, logprobs) of each."""
        turns: list[tuple[list[int], list[float]]] = [([], []) for _ in self._episodes]
        used_B = torch.tensor([episode.num_tokens for episode in self._episodes], device=self._rows.device)
        is_done = torch.zeros(len(turns), dtype=torch.bool)
        for step in range(self._max_tokens):
            draws_B = (used_B + step).clamp(max=self._max_tokens - 1)
            tokens_B, logprobs_B = self._choose(self._logits, self._rows, draws_B)
            for index, (token, logprob) in enumerate(zip(tokens_B.tolist(), logprobs_B.tolist(), strict=True)):
                if not is_done[index]:
                    turns[index][0].append(token)
                    turns[index][1].append(logprob)
                    is_done[index] = self._ends(self._episodes[index], turns[index][0])
            if is_done.all():
                break
            # The last token of a turn is read together with what follows it.
            going_B1 = ~is_done.to(self._can_attend.device)[:, None]
            self._can_attend = torch.cat([self._can_attend, going_B1], 1)
            positions_3B1 = (self._positions + step).expand(3, -1)[:, :, None]
            mask = self._can_attend[:, None, None]
            self._logits = self._forward(tokens_B[:, None], positions_3B1, mask, self._cache)
        return turns

    def _ends(self, episode: Episode, token_ids_T: Sequence[int]) -> bool:
        return (
            token_ids_T[-1] == self._eos_token_id
            or episode.num_tokens + len(token_ids_T) >= self._max_tokens
            or episode.has_stopped(token_ids_T)
        )

    def _go_on(self, turns: Sequence[tuple[list[int], list[float]]], answers: Sequence[PromptInputs | None]) -> None:
        """Drop the rows that are over, and let the others read their answers."""
        kept = [index for index, answer in enumerate(answers) if answer is not None]
        if len(kept) < len(answers):
            self._take(torch.tensor(kept, dtype=torch.long, device=self._rows.device))
        if not kept:
            return
        observations = [answer for answer in answers if answer is not None]
        texts = [[turns[index][0][-1], *answers[index].token_ids_T] for index in kept]  # type: ignore[union-attr]
        lengths = torch.tensor([len(text) for text in texts])
        longest = int(lengths.max())
        token_ids_BL = torch.tensor([[self._eos_token_id] * (longest - len(text)) + text for text in texts])
        is_token_BL = torch.arange(longest) >= longest - lengths[:, None]
        sampled_B = torch.tensor([len(turns[index][0]) for index in kept], device=self._positions.device)
        block = Block(token_ids_BL, is_token_BL, self._positions + sampled_B - 1, observations)
        mask = block_mask(self._can_attend, is_token_BL.to(self._can_attend.device))
        self._logits, self._positions = self._read(block, mask, self._cache)
        self._can_attend = torch.cat([self._can_attend, is_token_BL.to(self._can_attend.device)], 1)

    def _take(self, kept: torch.Tensor) -> None:
        self._episodes = [self._episodes[index] for index in kept.tolist()]
        self._cache.batch_select_indices(kept)
        self._rows, self._positions, self._can_attend = self._rows[kept], self._positions[kept], self._can_attend[kept]


def block_mask(can_attend_BS: torch.Tensor, is_token_BL: torch.Tensor) -> torch.Tensor:
    """Return (B, 1, L, S + L) bool: each token of a block sees what its row may see, and the block up to itself.

    Padding sees itself: a row without any key would be 0/0.
    """
    length = is_token_BL.shape[1]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=is_token_BL.device).tril()
    itself_LL = torch.eye(length, dtype=torch.bool, device=is_token_BL.device)
    own_BLL = (causal_LL & is_token_BL[:, None, :]) | itself_LL
    before_BLS = can_attend_BS[:, None, :].expand(-1, length, -1)
    return torch.cat([before_BLS, own_BLL], 2)[:, None]
