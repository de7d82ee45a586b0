"""Packings and rows: what goes where, worked by hand, and what every packing must keep."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from rsgrpo.learning.packing import CostModel, EncodedPrompt, Packing, build_micro_batch, pack
from rsgrpo.types import RsgrpoError, Sample


def packed(prompts: list[int], responses: list[list[int]], **options: Any) -> Packing:
    return pack(dict(enumerate(zip(prompts, responses, strict=True))), **options)


def contents(made: Packing) -> list[list[list[tuple[int, tuple[int, ...]]]]]:
    return [[[(unit.group, unit.samples) for unit in units] for units in rank] for rank in made]


def test_groups_fill_micro_batches_up_to_the_budget():
    made = packed([10, 10, 10], [[5], [5], [5]], num_ranks=1, max_tokens=30)
    assert contents(made) == [[[(0, (0,)), (1, (0,))], [(2, (0,))]]]


def test_a_group_over_the_budget_is_split_and_every_part_carries_the_prompt():
    made = packed([10], [[4, 4, 4, 4, 4]], num_ranks=1, max_tokens=18)
    assert contents(made) == [[[(0, (0, 1))], [(0, (2, 3))], [(0, (4,))]]]
    assert [unit.num_tokens for units in made[0] for unit in units] == [18, 18, 14]


def test_a_response_that_cannot_fit_names_lengths_and_key():
    with pytest.raises(RsgrpoError, match=r"max_tokens_per_micro_batch=20 .* prompt 15 \+ response 6 = 21"):
        packed([15], [[3, 6]], num_ranks=1, max_tokens=20)


def test_costs_grow_with_prompt_squared_and_with_responses_against_it():
    cost = CostModel(per_token=2.0, per_pair=1.0, per_response_token=10.0).cost(10, [2, 4])
    assert cost == 2 * 16 + (100 / 2 + 2 * 10 + 4 / 2 + 4 * 10 + 16 / 2) + 10 * 6


def test_one_long_prompt_weighs_as_much_as_many_short_ones():
    made = packed(
        [100, 10, 10, 10], [[10]] * 4, num_ranks=2, max_tokens=200, cost_model=CostModel(per_token=1, per_pair=1)
    )
    assert [unit.group for units in made[0] for unit in units] == [0]


def test_ranks_with_fewer_micro_batches_split_theirs_before_they_idle():
    assert contents(packed([80], [[10]], num_ranks=2, max_tokens=95)) == [[[(0, (0,))]], [[]]]
    # Two long groups on one rank are two micro-batches; the other rank's two short ones would fit into one.
    costly_prompts = CostModel(per_token=0, per_response_token=1)
    made = packed([20, 20, 5, 5], [[5], [5], [5], [5]], num_ranks=2, max_tokens=30, cost_model=costly_prompts)
    assert contents(made) == [[[(0, (0,))], [(2, (0,))]], [[(1, (0,))], [(3, (0,))]]]


def test_groups_stay_where_their_images_are_while_the_work_stays_even():
    even = packed([10] * 4, [[5]] * 4, num_ranks=2, max_tokens=15, homes=[1, 0, 1, 0])
    assert [[unit.group for units in rank for unit in units] for rank in even] == [[1, 3], [0, 2]]
    # All on one rank would leave the other idle; a group without a home goes to the idler one.
    crowded = packed([10] * 4, [[5]] * 4, num_ranks=2, max_tokens=15, homes=[1, 1, 1, None])
    assert [[unit.group for units in rank for unit in units] for rank in crowded] == [[2, 3], [0, 1]]


def test_every_packing_keeps_all_responses_the_budget_and_the_same_count_on_every_rank():
    rng = random.Random(0)
    for _ in range(100):
        prompts = [rng.randint(1, 50) for _ in range(rng.randint(1, 9))]
        responses = [[rng.randint(1, 20) for _ in range(rng.randint(1, 6))] for _ in prompts]
        num_ranks = rng.randint(1, 4)
        homes = [rng.choice([None, *range(num_ranks)]) for _ in prompts] if rng.random() < 0.5 else []
        made = packed(prompts, responses, num_ranks=num_ranks, max_tokens=rng.randint(70, 150), homes=homes)
        assert len({len(rank) for rank in made}) == 1
        found = sorted((u.group, s) for rank in made for units in rank for u in units for s in u.samples)
        assert found == [(g, s) for g, lengths in enumerate(responses) for s in range(len(lengths))]
        for units in (units for rank in made for units in rank):
            assert sum(prompts[u.group] + sum(responses[u.group][s] for s in u.samples) for u in units) <= 150


def sample(*token_ids: int) -> Sample:
    length = len(token_ids)
    return Sample(np.array(token_ids), np.ones((1, length), dtype=bool), np.ones((1, length), dtype=np.float32))


def test_a_row_by_hand():
    prompt = EncodedPrompt(torch.tensor([1, 2, 3]), torch.tensor([[0, 1, 2], [0, 1, 5], [0, 1, 2]]))
    other = EncodedPrompt(torch.tensor([4]), torch.zeros(3, 1, dtype=torch.int64))
    batch = build_micro_batch([(prompt, [sample(10, 11), sample(12)]), (other, [sample(13, 14)])])
    assert batch.token_ids_T.tolist() == [1, 2, 3, 10, 11, 12, 4, 13, 14]
    assert batch.position_ids_3T[0].tolist() == [0, 1, 2, 6, 7, 6, 0, 1, 2]
    assert batch.position_ids_3T[1].tolist() == [0, 1, 5, 6, 7, 6, 0, 1, 2]
    assert batch.head_index_N.tolist() == [2, 3, 2, 6, 7]
    assert batch.targets_N.tolist() == [10, 11, 12, 13, 14]
    assert batch.sample_index_N.tolist() == [0, 0, 1, 2, 2]
    assert batch.layout.prompt_lengths == (3, 1)
    assert batch.layout.response_lengths == ((2, 1), (2,))
    assert batch.rollout_logprobs_N is None
    assert batch.features is None
