"""Planned memory against the learner's own step, run as one rank of many on tensors without storage, with 7B layers."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from typing import Any

import pytest

from rsgrpo import cli
from rsgrpo.config.train import LoraConfig
from rsgrpo.plan.config import PlanConfig
from rsgrpo.plan.memory import GIB, learner_moments, learner_state
from rsgrpo.plan.model_sizes import KNOWN_MODELS, count_sizes
from tests.rsgrpo.learning.fake_fsdp import watch_step


def seven_b(num_layers: int) -> dict[str, Any]:
    """The values of Qwen2.5-VL-7B's config.json, with fewer layers."""
    known = json.loads(resources.files("conf").joinpath(*KNOWN_MODELS).read_text(encoding="utf-8"))
    [values] = [model["config"] for model in known if "7B" in model["name"]]
    text = {key: value for key, value in values["text_config"].items() if key != "layer_types"}
    return {**values, "text_config": {**text, "num_hidden_layers": num_layers, "max_window_layers": num_layers}}


@pytest.mark.parametrize(
    ("num_ranks", "num_layers", "row", "lora_rank", "overrides", "moment"),
    [
        (8, 3, (20_480, (3072,) * 4), 0, [], "layer"),
        (16, 3, (20_480, (3072,) * 4), 0, ["learner.gradient_checkpointing=none"], "layer"),
        (16, 3, (512, (64,) * 4), 0, [], "end"),
        (8, 2, (4_096, (4096,)), 0, ["learner.logits_chunk_tokens=4096"], "head"),
        (1, 3, (20_480, (3072,) * 4), 64, [], "layer"),
        (8, 3, (81_920, (3072,) * 8), 0, ["learner.context_parallel=4"], "layer"),
    ],
)
def test_a_step_needs_what_is_planned_within_a_tenth(num_ranks, num_layers, row, lora_rank, overrides, moment):
    prompt, responses = row
    config = cli.compose(
        PlanConfig,
        "config",
        [
            "recipe=evisrag_7b",
            "rollout.num_workers=1",
            "rollout.vllm.tensor_parallel_size=1",
            f"learner.num_ranks={num_ranks}",
            f"learner.max_tokens_per_micro_batch={prompt + sum(responses)}",
            f"inputs.max_prompt_tokens={prompt}",
            f"rollout.max_response_tokens={responses[0]}",
            f"rollout.group_size={len(responses)}",
            f"model.lora.rank={lora_rank}",
            *overrides,
        ],
    )
    values = seven_b(num_layers)
    sizes = count_sizes(values)
    lora = LoraConfig(rank=lora_rank) if lora_rank else None
    watched = watch_step({k: v for k, v in values.items() if k != "model_type"}, config.learner, [row], lora=lora)
    state = sum(learner_state(config, sizes).values())
    moments = {
        name: state + sum(gib for part, gib in parts.items() if part != "vision")  # the rows are text
        for name, parts in learner_moments(config, sizes).items()
    }
    assert max(moments, key=lambda name: moments[name]) == moment
    assert moments[moment] == pytest.approx(watched.peak / GIB, rel=0.1)


def test_every_rank_makes_the_same_collectives_whatever_its_rows_hold():
    values = {key: value for key, value in seven_b(2).items() if key != "model_type"}
    config = cli.compose(PlanConfig, "config", ["recipe=evisrag_7b", "learner.num_ranks=16"])
    first = watch_step(values, config.learner, [(4096, (512,) * 4), (11_000, (700,) * 8)], rank=0)
    last = watch_step(values, config.learner, [(11_000, (1,)), (1, (1,))], rank=15)
    assert first.collectives == last.collectives
    # Two all-gathers of each layer, one of the rest; a reduction of each; of four micro-batches.
    assert len(first.collectives) == 4 * (2 * 2 + 1 + 2 + 1)


def test_the_ranks_of_a_team_make_the_same_collectives_and_hold_a_share_of_the_row():
    values = {key: value for key, value in seven_b(2).items() if key != "model_type"}
    config = cli.compose(PlanConfig, "config", ["recipe=evisrag_7b", "learner.num_ranks=8"])
    team = dataclasses.replace(config.learner, context_parallel=4)
    rows = [(40_000, (512,) * 8), (30_001, (700,))]
    first, last = (watch_step(values, team, rows, rank=rank) for rank in (0, 7))
    assert first.collectives == last.collectives
    # Beside those of FSDP each layer gathers keys and values, again when it is recomputed, and sums their gradients.
    assert len(first.collectives) == 4 * (2 * 2 + 1 + 2 + 1) + 2 * (2 * 3)
    alone = watch_step(values, config.learner, rows)
    assert first.peak < 0.6 * alone.peak  # what does not depend on the row is a third of it
