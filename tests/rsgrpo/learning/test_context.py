"""Ranks that share a row learn what one rank learns: prompts in slices, responses dealt out, gradients summed once."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import distributed_c10d

from rollout.families import family_of
from rsgrpo.config.train import AlgorithmConfig, LearnerConfig, LoraConfig, ModelConfig
from rsgrpo.errors import InputError, RsgrpoError
from rsgrpo.learning.attention import PrefixRow, prefix_sdpa, prefix_varlen
from rsgrpo.learning.context import Team, TeamRow, _Gather, cut_prompt, refuse_recurrent
from rsgrpo.learning.policy import load_model
from rsgrpo.types import PrefixLayout
from tests.laws.test_01_micro_batches_and_ranks import weights_of
from tests.material.learner import learnt, make_conversations, make_groups, make_learner
from tests.material.tiny_families import TINY, save_family

WEIGHTS = [1.0, 2.0]
CPU = torch.device("cpu")
TWO_ULPS = 2.4e-7  # of a norm's weight, which is near 1
CASES: dict[str, dict[str, Any]] = {
    "several micro-batches": {"counts": [2, 0, 5, 1], "max_tokens_per_micro_batch": 120},
    "a rank without responses": {"counts": [3, 0], "num_samples": 1, "max_tokens_per_micro_batch": 70},
    "trained tower": {"counts": [2, 0, 1], "freeze_vision": False, "max_tokens_per_micro_batch": 80},
    "conversations": {"counts": [1, 0], "conversations": True, "gradient_checkpointing": "attention"},
    "two updates": {
        "counts": [1, 2, 3],
        "algorithm": AlgorithmConfig(ratio="gspo", updates_per_step=2, entropy_coef=0.01),
        "gradient_checkpointing": "none",
    },
}
SLOW_CASES = {
    **CASES,
    "conversations, trained tower": {"counts": [0, 1], "conversations": True, "freeze_vision": False},
    "adapters": {"counts": [1, 2, 0], "lora": LoraConfig(rank=2), "prefetch": True, "vision_cache_mb": 0},
}


def run_case(case: dict[str, Any], path: str, images: list[str], rank: int, world_size: int) -> dict[str, Any]:
    """Return what one update and the pass after it make."""
    options = dict(case)
    counts, prefetch = options.pop("counts"), options.pop("prefetch", False)
    converse, num_samples = options.pop("conversations", False), options.pop("num_samples", 3)
    options["context_parallel"] = options.get("context_parallel", 1) if world_size > 1 else 1
    made = make_learner(path, rank=rank, world_size=world_size, num_ranks=world_size, **options)
    if converse:
        groups = make_conversations(made.encoder, images, counts)
    else:
        groups = make_groups(images, counts, num_samples=num_samples)
    prompts = [group.prompt for group in groups]
    before = weights_of(made)
    if prefetch:
        made.prefetch(prompts)
    metrics = made.update(groups, WEIGHTS)
    return {
        "before": before,
        "metrics": metrics,
        "after": weights_of(made),
        "logprobs": made.logprobs(groups),
        "counted": made.count_vision(prompts),
    }


def rank_main(rank: int, world_size: int, cases: dict[str, Any], images: list[str], folder: Path) -> None:
    try:
        distributed_c10d._world = distributed_c10d._World()  # forked: the parent's group has no threads here
        torch.set_num_threads(1)
        meeting = f"file://{folder / 'meeting'}"
        limit = timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size, timeout=limit)
        done = {name: run_case(case, path, images, rank, world_size) for name, (path, case) in cases.items()}
        torch.save(done, folder / f"{rank}.pt")
    except BaseException:
        (folder / f"error_{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)


def on_ranks(world_size: int, cases: dict[str, Any], images: list[str], folder: Path) -> list[dict[str, Any]]:
    """Return of each rank what its cases made. cases: name -> (model, options)."""
    context = multiprocessing.get_context("fork")
    arguments = (world_size, cases, images, folder)
    ranks = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(200)
    errors = [path.read_text() for path in sorted(folder.glob("error_*.txt"))]
    assert [process.exitcode for process in ranks] == [0] * world_size, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def require_equal(ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    for each in ranks:
        found, expected = learnt(each["metrics"]), learnt(one["metrics"])
        found.pop("actor/expert_load_max", None)  # of the tokens that one forward sees, here a share of the row
        expected.pop("actor/expert_load_max", None)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert each["counted"] == one["counted"]
        for group, wanted in zip(each["logprobs"], one["logprobs"], strict=True):
            for logprobs_T, expected_T in zip(group, wanted, strict=True):
                np.testing.assert_allclose(logprobs_T, expected_T, atol=1e-5)
    for name, start in one["before"].items():
        step, gap = one["after"][name] - start, one["after"][name] - ranks[0]["after"][name]
        assert gap.norm() <= 1e-5 * step.norm() + TWO_ULPS, name


@pytest.fixture(scope="module")
def two_ranks(attentive_model_path, page_images, tmp_path_factory) -> list[dict[str, Any]]:
    cases = {name: (attentive_model_path, case | {"context_parallel": 2}) for name, case in CASES.items()}
    return on_ranks(2, cases, page_images, tmp_path_factory.mktemp("team"))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_share_a_row(name, two_ranks, attentive_model_path, page_images):
    require_equal([rank[name] for rank in two_ranks], run_case(CASES[name], attentive_model_path, page_images, 0, 1))


def test_a_rank_runs_the_tower_on_those_pages_only_that_it_has_tokens_of(two_ranks):
    metrics = two_ranks[0]["several micro-batches"]["metrics"]
    assert 5 <= metrics["perf/images_encoded"] < 2 * 5  # five different pages, two ranks


@pytest.mark.slow  # four processes, a dozen trainings each: a minute
@pytest.mark.parametrize("size", [2, 4])
def test_four_ranks_in_teams(size, attentive_model_path, tiny_model_path, page_images, tmp_path):
    options = {"context_parallel": size}
    cases = {name: (attentive_model_path, case | options) for name, case in SLOW_CASES.items()}
    for family in sorted(set(TINY) - {"qwen3_5", "qwen3_5_moe"}):
        path = save_family(family, tiny_model_path, tmp_path / family)
        cases[family] = path, {"counts": [2, 1], "freeze_vision": size == 2} | options
    ranks = on_ranks(4, cases, page_images, tmp_path)
    for name, (path, case) in cases.items():
        require_equal([rank[name] for rank in ranks], run_case(case, path, page_images, 0, 1))


def test_a_model_with_recurrent_states_is_refused(tiny_model_path, tmp_path):
    path = save_family("qwen3_5", tiny_model_path, tmp_path / "recurrent")
    model = load_model(ModelConfig(path=path))
    with pytest.raises(InputError, match=r"context_parallel=2 .* 3 layers of this model carry a recurrent state"):
        refuse_recurrent(Team(0, 2), len(family_of(model.config.model_type).recurrent_layers(model)))


def test_ranks_that_teams_do_not_divide_are_refused():
    with pytest.raises(RsgrpoError, match=r"num_ranks=6 cannot be split into teams of learner\.context_parallel=4"):
        LearnerConfig(num_ranks=6, context_parallel=4)


def test_a_prompt_is_cut_into_slices_from_both_ends_with_the_images_that_they_show():
    is_image_T = torch.zeros(20, dtype=torch.bool)
    is_image_T[2:10] = is_image_T[12:15] = True
    cuts = [cut_prompt(is_image_T, [4, 4, 3], Team(rank, 2)) for rank in range(2)]
    assert [cut.index_L.tolist() for cut in cuts] == [[0, 1, 2, 3, 14, 15, 16, 17, 18, 19], [*range(4, 14), 19]]
    assert [cut.images for cut in cuts] == [[0, 2], [0, 1, 2]]
    assert cuts[0].taken_F.tolist() == [True, True, False, False, False, False, True]
    assert cuts[1].taken_F.tolist() == [False, False, *[True] * 6, True, True, False]
    alone = cut_prompt(torch.zeros(1, dtype=torch.bool), [], Team(1, 4))
    assert (alone.index_L.tolist(), alone.images, len(alone.taken_F)) == ([0], [], 0)


def flash_by_hand(
    query: Any, key: Any, value: Any, query_bounds: Any, key_bounds: Any, *_: int, causal: bool, **options: Any
) -> torch.Tensor:
    """What flash-attn's varlen kernel computes, segment by segment; the causal mask is aligned to the last key."""
    assert causal
    outputs = []
    for index in range(len(query_bounds) - 1):
        own, seen = slice(*query_bounds[index : index + 2]), slice(*key_bounds[index : index + 2])
        q, k, v = (part.transpose(0, 1) for part in (query[own], key[seen], value[seen]))
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("kernel", [prefix_sdpa, prefix_varlen])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_kernel_attends_over_a_team_as_over_one_row(kernel, size, monkeypatch):
    """The ranks of a team one after the other: first all give their slices, then each attends to all of them."""
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_by_hand))
    prompts, responses = (23, 1, 6), ((5, 2, 7), (3,), (4, 1))
    generator = torch.Generator().manual_seed(0)
    total = sum(prompts) + sum(sum(lengths) for lengths in responses)
    query, key, value = (torch.randn(1, heads, total, 8, generator=generator) for heads in (4, 2, 2))
    expected = prefix_sdpa(query, key, value, PrefixRow(PrefixLayout(prompts, responses), CPU, torch.float32))
    given: list[torch.Tensor] = []

    def gather(own: torch.Tensor, team: Team) -> torch.Tensor:
        if len(given) == size:
            return torch.stack(given)
        given.append(own)
        return torch.stack([own] * size)

    monkeypatch.setattr(_Gather, "apply", gather)
    for asked in (False, True):
        for rank in range(size):
            team = Team(rank, size)
            at, index, own = 0, [], []
            for prompt, lengths in zip(prompts, responses, strict=True):
                index.append(at + cut_prompt(torch.zeros(prompt, dtype=torch.bool), [], team).index_L)
                at += prompt
                dealt = team.deal(lengths)
                own.append(tuple(length for length, to in zip(lengths, dealt, strict=True) if to == rank))
                for length, to in zip(lengths, dealt, strict=True):
                    index += [torch.arange(at, at + length)] if to == rank else []
                    at += length
            layout = PrefixLayout((0,) * len(prompts), tuple(own), prompts)
            mine = [tensor[:, :, torch.cat(index)] for tensor in (query, key, value)]
            found = kernel(*mine, TeamRow(layout, team, CPU, torch.float32))
            if asked:
                torch.testing.assert_close(found, expected[:, torch.cat(index)], atol=1e-6, rtol=1e-5)
