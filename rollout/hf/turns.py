"""Conversations in the embedded engine: sample a turn of every row, let environments answer, read the answers, go on.

The cache of keys and values is kept from turn to turn. Turns and answers differ in length, so the cache has holes: a
column that belongs to some rows is masked in the others. A recurrent state has no holes: it is put back to where its
row's turn ended, and only answers of the same length are read together.

An environment is asked as soon as its row's turn has ended. Rows whose answers are late part from the others and go on
by themselves: the batches depend on which answers were late, not on when they came.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace

import torch
from transformers.cache_utils import Cache

from rollout.hf.decoding import Prefilled, StateLayer, join, rows_of
from rollout.inputs.processor import PromptInputs
from rollout.turns.episode import Episode


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

Turn = tuple[list[int], list[float]]
"""(token ids, logprobs)"""


@dataclass(slots=True, eq=False)
class _Company:
    """Rows that are sampled together.

    at: where they are; a column of `is_token_PT` is False in the rows that it does not belong to.
    rows_B: their numbers in the batch. episodes: one per row.
    turns, answers: of each row, of the turn that was sampled last. since: when that was; seconds.
    """

    at: Prefilled
    rows_B: torch.Tensor
    episodes: list[Episode]
    turns: list[Turn] = field(default_factory=list)
    answers: list[Future[PromptInputs | None]] = field(default_factory=list)
    since: float = 0.0

    def part(self, indices: Sequence[int]) -> _Company:
        """Return a copy of some rows, in this order."""
        at = rows_of(self.at, torch.tensor(indices, dtype=torch.long, device=self.rows_B.device))
        return self.placed(indices, at)

    def keep(self, indices: Sequence[int]) -> _Company:
        """Return some rows, in this order; the others are lost."""
        if len(indices) == len(self.episodes):
            return self
        kept_B = torch.tensor(indices, dtype=torch.long, device=self.rows_B.device)
        self.at.cache.batch_select_indices(kept_B)
        rest = [tensor[kept_B] for tensor in (self.at.is_token_PT, self.at.logits_PV, self.at.next_positions_P)]
        return self.placed(indices, Prefilled(self.at.cache, *rest))

    def placed(self, indices: Sequence[int], at: Prefilled) -> _Company:
        """Return some rows, in this order, at another place."""
        rows_B = self.rows_B[torch.tensor(indices, dtype=torch.long, device=self.rows_B.device)]
        episodes, turns = [self.episodes[index] for index in indices], [self.turns[index] for index in indices]
        return _Company(at, rows_B, episodes, turns, [self.answers[index] for index in indices], self.since)


class Conversations:
    """The rows of a batch on their way through their episodes.

    Args:
        prompts: their caches are consumed. episodes: one per row, the siblings of a prompt side by side.
        forward: (tokens_B1, positions_3B1, attention_mask, cache) -> logits (B, V) of one more position.
        max_tokens: that a row may sample, over all its turns.
        patience_s: how long rows with an answer wait for those without.
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
        patience_s: float,
    ) -> None:
        num_siblings = len(episodes) // len(prompts.logits_PV)
        prompts.cache.batch_repeat_interleave(num_siblings)
        tensors = (prompts.is_token_PT, prompts.logits_PV, prompts.next_positions_P)
        forked = Prefilled(prompts.cache, *(tensor.repeat_interleave(num_siblings, dim=0) for tensor in tensors))
        self._all = _Company(forked, torch.arange(len(episodes), device=prompts.logits_PV.device), list(episodes))
        self._forward, self._choose, self._read = forward, choose, read
        self._max_tokens, self._eos_token_id, self._patience_s = max_tokens, eos_token_id, patience_s

    def run(self) -> None:
        """Take every episode to its end."""
        pool = ThreadPoolExecutor(len(self._all.episodes), thread_name_prefix="episodes")
        try:
            waiting = [self._sample_turn(self._all, pool)]
            while waiting:
                company = self._next(waiting)
                waiting.remove(company)
                late = [index for index, answer in enumerate(company.answers) if not answer.done()]
                if late:
                    waiting.append(replace(company.part(late), since=time.monotonic()))
                going = self._go_on(company, set(late))
                if going is not None:
                    waiting.append(self._sample_turn(going, pool))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # whoever gives up does not wait for a late answer

    def _next(self, waiting: Sequence[_Company]) -> _Company:
        """Wait for rows that can go on: all of a company have an answer, or some, and it waited long enough."""
        while True:
            now = time.monotonic()
            for company in waiting:
                done = [answer.done() for answer in company.answers]
                if all(done) or (any(done) and now - company.since >= self._patience_s):
                    return company
            deadlines = [c.since + self._patience_s for c in waiting if any(a.done() for a in c.answers)]
            pending = [answer for company in waiting for answer in company.answers if not answer.done()]
            wait(pending, min(deadlines) - now if deadlines else None, return_when=FIRST_COMPLETED)

    def _sample_turn(self, company: _Company, pool: ThreadPoolExecutor) -> _Company:
        """Sample until every row has finished its turn; each environment is asked as soon as its row has."""
        at, episodes, device = company.at, company.episodes, company.rows_B.device
        logits, can_attend = at.logits_PV, at.is_token_PT
        states, states_at_end = _states(at.cache), list[tuple[torch.Tensor, list[StateLayer]]]()
        turns: list[Turn] = [([], []) for _ in episodes]
        answers: dict[int, Future[PromptInputs | None]] = {}
        used_B = torch.tensor([episode.num_tokens for episode in episodes], device=device)
        for step in range(self._max_tokens):
            draws_B = (used_B + step).clamp(max=self._max_tokens - 1)
            tokens_B, logprobs_B = self._choose(logits, company.rows_B, draws_B)
            ended = []
            for index, (token, logprob) in enumerate(zip(tokens_B.tolist(), logprobs_B.tolist(), strict=True)):
                if index not in answers:
                    turns[index][0].append(token)
                    turns[index][1].append(logprob)
                    if self._ends(episodes[index], turns[index][0]):
                        answers[index] = pool.submit(self._answer, episodes[index], turns[index])
                        ended.append(index)
            if states and ended:
                ended_B = torch.tensor(ended, device=device)
                states_at_end.append((ended_B, [layer.part(ended_B) for layer in states]))
            if len(answers) == len(episodes):
                break
            # The last token of a turn is read together with what follows it.
            going_B1 = torch.tensor([[index not in answers] for index in range(len(episodes))], device=device)
            can_attend = torch.cat([can_attend, going_B1], 1)
            positions_3B1 = (at.next_positions_P + step).expand(3, -1)[:, :, None]
            logits = self._forward(tokens_B[:, None], positions_3B1, can_attend[:, None, None], at.cache)
        for ended_B, parts in states_at_end:
            for layer, part in zip(states, parts, strict=True):
                layer.put(ended_B, part)
        in_order = [answers[index] for index in range(len(episodes))]
        at = Prefilled(at.cache, can_attend, logits, at.next_positions_P)
        return _Company(at, company.rows_B, episodes, turns, in_order, time.monotonic())

    def _ends(self, episode: Episode, token_ids_T: Sequence[int]) -> bool:
        return (
            token_ids_T[-1] == self._eos_token_id
            or episode.num_tokens + len(token_ids_T) >= self._max_tokens
            or episode.has_stopped(token_ids_T)
        )

    def _answer(self, episode: Episode, turn: Turn) -> PromptInputs | None:
        is_cut = episode.num_tokens + len(turn[0]) >= self._max_tokens
        return episode.answer(*turn, is_cut=is_cut)

    def _go_on(self, company: _Company, late: set[int]) -> _Company | None:
        """Let the rows that are neither late nor over read their answers; None where there are none."""
        found = [None if index in late else answer.result() for index, answer in enumerate(company.answers)]
        answers = [answer for answer in found if answer is not None]
        if not answers:
            return None
        company = company.keep([index for index, answer in enumerate(found) if answer is not None])
        if not _states(company.at.cache):
            return replace(company, at=self._after(company, answers))
        same_length: dict[int, list[int]] = {}
        for index, answer in enumerate(answers):
            same_length.setdefault(len(answer.token_ids_T), []).append(index)
        parts = [self._after(company.part(some), [answers[i] for i in some]) for some in same_length.values()]
        return company.placed([index for some in same_length.values() for index in some], join(parts))

    def _after(self, company: _Company, answers: Sequence[PromptInputs]) -> Prefilled:
        """Let rows read their answers, each behind the last token of its turn."""
        at, device = company.at, company.rows_B.device
        texts = [[turn[0][-1], *answer.token_ids_T] for turn, answer in zip(company.turns, answers, strict=True)]
        lengths = torch.tensor([len(text) for text in texts])
        longest = int(lengths.max())
        token_ids_BL = torch.tensor([[self._eos_token_id] * (longest - len(text)) + text for text in texts])
        is_token_BL = torch.arange(longest) >= longest - lengths[:, None]
        sampled_B = torch.tensor([len(turn[0]) for turn in company.turns], device=device)
        block = Block(token_ids_BL, is_token_BL, at.next_positions_P + sampled_B - 1, answers)
        is_token_BL = is_token_BL.to(device)
        logits, positions = self._read(block, block_mask(at.is_token_PT, is_token_BL), at.cache)
        return Prefilled(at.cache, torch.cat([at.is_token_PT, is_token_BL], 1), logits, positions)


def _states(cache: Cache) -> list[StateLayer]:
    """Return the layers that carry a recurrent state."""
    return [layer for layer in cache.layers if isinstance(layer, StateLayer)]


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
