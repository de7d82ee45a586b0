"""Metrics of a batch, by hand."""

from __future__ import annotations

from rollout.types import Observation, Prompt, Rollout, RolloutGroup
from rsgrpo.algorithm.metrics import turn_metrics
from rsgrpo.types import ScoredGroup


def test_turns_observations_and_faults_are_counted_per_response() -> None:
    def rollout(num_tokens: int, finish: str, *observations: Observation) -> Rollout:
        tokens = range(num_tokens)
        return Rollout(tokens, [0.0] * num_tokens, "", [(0, 0)] * num_tokens, finish, 0, observations)  # type: ignore[arg-type]

    page = Observation(2, 2, (7,) * 10, "<image>", ("page.png",))
    late = Observation(4, 4, (7,) * 5, "No answer within 1 s.", fault="timeout")
    end = Observation(6, 6, facts={"answered": True})
    cut = Observation(4, 4, fault="bad_call")
    rollouts = (
        rollout(6, "stop", page, late, end),  # three turns: the note at the end opens none
        rollout(3, "stop"),
        rollout(4, "turns", page, cut),
        rollout(9, "length", late),
    )
    group = RolloutGroup(Prompt("a", "?"), rollouts)
    metrics = turn_metrics([ScoredGroup(group, (), [()] * 4, [()] * 4, [()] * 4)])
    assert metrics == {
        "rollout/turns_mean": (3 + 1 + 2 + 2) / 4,
        "rollout/turns_max": 3.0,
        "rollout/turns_called_frac": 0.75,
        "rollout/turns_stopped_frac": 0.5,
        "rollout/turns_limit_frac": 0.25,
        "rollout/turns_faulty_frac": 0.5,
        "rollout/observation_tokens_mean": (15 + 10 + 5) / 4,
        "rollout/observation_images_mean": 0.5,
        "rollout/turns/bad_call": 1.0,
        "rollout/turns/timeout": 2.0,
    }
