"""What a plan says of a run in its first lines."""

from __future__ import annotations

import pytest

from rsgrpo import cli
from rsgrpo.plan.__main__ import render
from rsgrpo.plan.config import PlanConfig
from rsgrpo.plan.model_sizes import sizes_of


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "1 learner rank and 1 hf engine, colocated"),
        (["learner.num_ranks=2", "rollout.num_workers=2"], "2 learner ranks and 2 hf engines, colocated"),
    ],
)
def test_workers_are_counted_as_one_says_it(overrides, says):
    config = cli.compose(PlanConfig, "config", ["recipe=demo", *overrides])
    assert says in render(config, *sizes_of(config.model.path)).splitlines()[0]
