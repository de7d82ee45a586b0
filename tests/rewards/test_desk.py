from __future__ import annotations

import pytest

from rewards import desk
from rewards.api import Response, RewardError, Span, Turn


def trajectory(*steps, truth=None, answer="<answer>7</answer>"):
    """Return a response: one turn per (text, facts, fault), then the answer."""
    text, turns = "", []
    for words, facts, fault in steps:
        turns.append(Turn(Span(len(text), len(text) + len(words)), "seen", facts=facts, fault=fault))
        text += words + "\n"
    turns.append(Turn(Span(len(text), len(text) + len(answer))))
    return Response(text + answer, truth or {}, turns=tuple(turns))


def decided(reward, response):
    """Return where a reward is decided."""
    return reward.determined(response)


def opens(page, number=1, fault=""):
    return (f"<open>{number}</open>", {"call": "open", "number": number, "page": page}, fault)


def zooms(page, box, number=1):
    return ("<zoom>1 0 0 9 9</zoom>", {"call": "zoom", "number": number, "page": page, "box": box}, "")


BAD = ("<open>x</open>", {"call": "open"}, "bad_call")
SEARCH = ("<search>x</search>", {"call": "search", "pages": ["a", "b"], "numbers": [1, 2]}, "")


def test_the_answer_is_compared_as_tokens():
    assert desk.answer_f1(trajectory(truth={"answers": ["7"]})) == 1.0
    assert desk.answer_f1(trajectory(truth={"answers": ["7 percent"]})) == pytest.approx(2 / 3)
    assert desk.answer_f1(trajectory(truth={"answers": ["8", "7"]})) == 1.0
    assert desk.answer_f1(trajectory(truth={"answers": ["7"]}, answer="7")) == 0.0
    assert desk.answer_f1(trajectory()) is None
    done = trajectory(opens("a"), truth={"answers": ["7"]}, answer="<answer>7</answer> so")
    assert decided(desk.answer_f1, done) == done.text.index(" so")


def test_gold_pages_count_when_they_are_opened_or_zoomed_in_on():
    gold = {"gold_pages": ["a", "b"]}
    half = trajectory(SEARCH, opens("a"), opens("c"), truth=gold)
    assert desk.gold_opened(half) == 0.5
    assert decided(desk.gold_opened, half) is None
    both = trajectory(opens("a"), zooms("b", [0, 0, 1, 1]), opens("a"), truth=gold)
    assert desk.gold_opened(both) == 1.0
    assert decided(desk.gold_opened, both) == both.turns[1].span.end
    assert desk.gold_opened(trajectory(SEARCH, truth=gold)) == 0.0
    assert desk.gold_opened(trajectory(opens("a", fault="limit"), truth={"gold_pages": ["a"]})) == 0.0
    assert desk.gold_opened(trajectory(opens("a"))) is None


def test_evidence_must_come_from_opened_pages():
    answer = "<evidence>\n[1]: 16%\n[2]: no relevant information\n[4]: 17%\n</evidence><answer>16%</answer>"
    assert desk.cites_opened(trajectory(SEARCH, opens("a", 1), answer=answer)) == 0.5
    assert desk.cites_opened(trajectory(opens("a", 1), opens("d", 4), answer=answer)) == 1.0
    assert desk.cites_opened(trajectory(SEARCH, answer=answer)) == 0.0
    assert desk.cites_opened(trajectory(opens("a", 1))) == 0.0


@pytest.mark.parametrize(
    ("one", "other", "value"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], 1.0),
        ([0, 0, 0.5, 1], [0.5, 0, 1, 1], 0.0),
        ([0, 0, 0.5, 0.5], [0.25, 0.25, 0.75, 0.75], 1 / 7),
        ([0.2, 0.2, 0.2, 0.2], [0, 0, 1, 1], 0.0),
    ],
)
def test_boxes_overlap_by_intersection_over_union(one, other, value):
    assert desk.overlap(one, other) == desk.overlap(other, one) == pytest.approx(value)


def test_the_best_zoom_on_a_gold_page_counts():
    gold = {"gold_pages": ["a"], "gold_box": [0, 0, 0.5, 0.5]}
    assert desk.region_overlap(trajectory(zooms("a", [0, 0, 1, 1]), zooms("a", [0, 0, 0.5, 1]), truth=gold)) == 0.5
    assert desk.region_overlap(trajectory(zooms("b", [0, 0, 0.5, 0.5]), truth=gold)) == 0.0
    assert desk.region_overlap(trajectory(opens("a"), truth=gold)) == 0.0
    assert desk.region_overlap(trajectory(zooms("a", [0, 0, 1, 1]), truth={"gold_pages": ["a"]})) is None


def test_calls_cost_and_malformed_ones_more():
    busy = trajectory(SEARCH, BAD, opens("a"), BAD)
    assert desk.call_cost(busy) == pytest.approx(-0.2)
    assert desk.call_cost(busy, cost=0.1, free=3) == pytest.approx(-0.1)
    assert desk.call_cost(trajectory(), free=2) == 0.0
    assert desk.calls(busy) == 4.0
    assert desk.zooms(trajectory(zooms("a", [0, 0, 1, 1]), opens("a"))) == 1.0
    assert (desk.well_called(busy), decided(desk.well_called, busy)) == (-1.0, busy.turns[1].span.end)
    assert (desk.well_called(trajectory(SEARCH)), decided(desk.well_called, trajectory(SEARCH))) == (0.0, None)
    with pytest.raises(RewardError, match="cost >= 0 and free >= 0, got cost=-1, free=0"):
        desk.call_cost(busy, cost=-1)


def test_every_reward_may_teach_the_whole_response_of_a_policy_that_never_calls():
    lazy = trajectory(truth={"answers": ["7"], "gold_pages": ["a"], "gold_box": [0, 0, 1, 1]})
    for each in (desk.answer_f1, desk.gold_opened, desk.cites_opened, desk.region_overlap, desk.call_cost):
        assert each.scope(lazy) == Span(0, len(lazy.text))
