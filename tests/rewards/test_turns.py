"""Scopes of turns and calls, worked out by hand."""

from __future__ import annotations

import dataclasses
import doctest
import os
import pickle

import pytest

import rewards.turns
from rewards.__main__ import main, read_responses
from rewards.api import Credit, Response, RewardError, Span, Turn, reward
from rewards.turns import call, last_turn, per_turn, turn, turn_end, turns_of
from rollout.types import Observation, Prompt, Rollout, RolloutGroup
from rsgrpo.algorithm.scoring import to_response
from rsgrpo.records.rollouts import write_rollouts
from rsgrpo.types import ScoredGroup


@reward
def faults(response: Response) -> list[Credit]:
    return per_turn(response, [0.5 * bool(turn.fault) for turn in turns_of(response)])


TEXT = "<open>1</open>\n<open>2</open> or <open>3</open>\n7"
RESPONSE = Response(TEXT, turns=(Turn(Span(0, 14)), Turn(Span(15, 47), fault="bad_call"), Turn(Span(48, 49))))


def test_the_examples_hold() -> None:
    assert doctest.testmod(rewards.turns).failed == 0


def test_a_turn_takes_its_end_of_text_and_no_character_of_the_next() -> None:
    pieces = [TEXT[span.start : span.end] for number in (1, 2, 3) if (span := turn(number)(RESPONSE))]
    assert pieces == ["<open>1</open>\n", "<open>2</open> or <open>3</open>\n", "7"]
    assert last_turn(RESPONSE) == turn(3)(RESPONSE) == Span(48, 49)
    assert turn(-3)(RESPONSE) == turn(1)(RESPONSE)
    assert turn(4)(RESPONSE) is turn(-4)(RESPONSE) is None
    assert [turn_end(number)(RESPONSE) for number in (1, 2, 3, 4)] == [15, 48, 49, None]


def test_a_call_is_looked_for_in_its_own_turn_alone() -> None:
    spans = [call(number, "<open>", "</open>")(RESPONSE) for number in (1, 2, 3)]
    assert spans == [Span(0, 14), Span(15, 29), None]
    assert call(1, "<open>", "2</open>")(RESPONSE) is None  # that closes in the next turn


def test_the_command_line_sees_the_turns_of_stored_rollouts(tmp_path, capsys) -> None:
    tokens = range(3)
    seen = Observation(1, 14, (7, 7), "<image>", ("page.png",), {"page": 1}, "")
    end = Observation(3, 47, fault="bad_call")
    rollout = Rollout(tokens, [0.0] * 3, TEXT[:47], [(0, 14), (14, 15), (15, 47)], "stop", 0, (seen, end))
    scored = ScoredGroup(RolloutGroup(Prompt("a", "?"), (rollout,)), (), [()], [()], [()])
    write_rollouts(tmp_path, 1, [scored])
    assert main(["tests.rewards.test_turns:faults", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "--- step_000001 a#0: 0.2500" in shown
    [response] = [response for _, response in read_responses(tmp_path)]
    [first, second] = to_response(scored.group, 0).turns  # as a run's rewards see it
    assert response.turns == (dataclasses.replace(first, images=(os.path.abspath("page.png"),)), second)
    assert second == Turn(Span(15, 47), "", (), {}, "bad_call")


def test_one_credit_per_turn_that_has_a_score() -> None:
    credits = per_turn(RESPONSE, [0.25, None, 1], key="cost")
    assert credits == [Credit("cost1", 0.25, Span(0, 15), 15), Credit("cost3", 1.0, Span(48, 49), 49)]
    with pytest.raises(RewardError, match="got 1 scores for 3 turns"):
        per_turn(RESPONSE, [1.0])


def test_a_response_made_from_its_text_is_one_turn() -> None:
    plain = Response("so <open>1</open>")
    assert len(turns_of(plain)) == 1
    assert last_turn(plain) == Span(0, 17)
    assert call(-1, "<open>", "</open>")(plain) == Span(3, 17)


def test_scopes_travel_to_other_processes_and_refuse_what_no_turn_has() -> None:
    assert pickle.loads(pickle.dumps(call(2, "a", "b"))) == call(2, "a", "b")
    with pytest.raises(RewardError, match="numbered from 1"):
        turn(0)
    with pytest.raises(RewardError, match="must not be empty"):
        call(1, "", "b")
