"""The shipped rewards: reference values, the gold response, and every odd shape of a response."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.api import Credit, Response, Reward, RewardError, Span, check_score
from rewards.evisrag import (
    INSUFFICIENT,
    NO_EVIDENCE,
    abstained,
    accuracy,
    evidence,
    evidence_slots,
    gold_response,
    marked_rate,
    no_early_index,
    overlong,
    parse_gold,
    perception,
    think_differs,
    well_formed,
)
from tests.material import DATA

GOLDEN = [json.loads(line) for line in (DATA / "rewards.jsonl").read_text().splitlines()]
GOLDEN_NAMES = {
    "accuracy": accuracy,
    "evidence": evidence,
    "format": well_formed,
    "overlong": overlong,
    "is_observe": no_early_index,
    "is_think": think_differs,
}
ALL_REWARDS = [*GOLDEN_NAMES.values(), perception, evidence_slots]
MAXIMUM = {overlong: 0.0, no_early_index: 0.0, think_differs: 0.0}
GOOD = (
    "<observe>two pages</observe>\n<evidence>\n[1]: sales 16\n[2]: no relevant information\n</evidence>\n"
    "<think>page one says it</think>\n<answer>16</answer>"
)


def score_of(function, response: Response, **arguments) -> float | None:
    value = check_score(function(response, **arguments), len(response.text))
    return sum(credit.score for credit in value) / len(value) if isinstance(value, tuple) else value


def answered(text: str, *golds: str, **arguments) -> float:
    return accuracy(Response(f"<answer>{text}</answer>", {"answers": list(golds)}), **arguments)


def slots(block: str, *golds: str, function=evidence, **arguments) -> float:
    return function(Response(f"<evidence>{block}</evidence>", {"evidence": list(golds)}), **arguments)


@pytest.mark.parametrize("name", [*GOLDEN_NAMES, "overall"])
def test_reference_values_are_reproduced(name):
    assert len(GOLDEN) == 240
    assert len({row[name] for row in GOLDEN}) > 1
    for row in GOLDEN:
        response = Response(row["response"], parse_gold(row["ground_truth"]), row["response_length"])
        assert len(response.truth["evidence"]) == row["n_images"]
        scores = {key: function(response) for key, function in GOLDEN_NAMES.items()}
        scores["overall"] = sum((3 if key in ("accuracy", "evidence") else 1) * score for key, score in scores.items())
        assert scores[name] == pytest.approx(row[name], abs=1e-12), row["id"]


plain_text = st.text(
    st.one_of(
        st.sampled_from("aA16 .,-%\N{EN DASH}\r\n"), st.characters(exclude_categories=["Cs"], exclude_characters="<[")
    ),
    max_size=40,
)
truths = st.fixed_dictionaries(
    {
        "evidence": st.lists(st.one_of(st.just(NO_EVIDENCE), plain_text), min_size=1, max_size=12),
        "answers": st.lists(st.one_of(st.just(INSUFFICIENT), plain_text), min_size=1, max_size=3),
    }
)


@settings(max_examples=300, deadline=None)
@given(truths, st.sampled_from(["paper", "strict"]))
def test_the_gold_response_scores_the_maximum_of_every_reward(truth, mode):
    text = gold_response(truth)
    response = Response(text, truth, num_tokens=len(text.split()))
    for function in ALL_REWARDS:
        arguments = {"normalise": mode} if function in (accuracy, evidence, perception, evidence_slots) else {}
        arguments |= {"min_tokens": 1, "max_tokens": 4096} if function is overlong else {}
        assert score_of(function, response, **arguments) == MAXIMUM.get(function, 1.0), function.name
        assert function.scope(response) is not None
    assert all(credit.span is not None for credit in evidence_slots(response))


@pytest.mark.parametrize("num_images", [1, 5, 6, 7, 12, 101])
def test_evidence_stays_at_most_1_for_any_number_of_images(num_images):
    golds = ["sales rose by 16 percent" if page % 2 else NO_EVIDENCE for page in range(num_images)]
    truth = {"evidence": golds, "answers": ["16"]}
    right = Response(gold_response(truth), truth)
    wrong = Response(gold_response({**truth, "evidence": ["nothing"] * num_images}), truth)
    assert evidence(right) == perception(right) == 1.0
    assert evidence(wrong) == perception(wrong) == 0.0


UNREPEATABLE = ("a</answer>", "<evidence>x", "y</think>")


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        *(({"answers": [gold], "evidence": ["16"]}, "block tag") for gold in UNREPEATABLE),
        *(({"answers": ["16"], "evidence": [gold]}, "block tag") for gold in UNREPEATABLE),
        ({"answers": ["16"], "evidence": ["see [2]: total", "b"]}, "slot label"),
        ({"answers": ["16"], "evidence": ["see [3]: total", "b", "c"]}, "slot label"),
        ({"answers": ["16"], "evidence": ["see [2]: total"]}, "slot label"),
        ({"answers": [], "evidence": ["x"]}, "needs truth with 'answers'"),
    ],
)
def test_gold_that_no_response_can_repeat_is_refused(truth, message):
    with pytest.raises(RewardError, match=message):
        gold_response(truth)


def test_a_gold_response_may_lack_evidence():
    assert "<evidence>\n</evidence>" in gold_response({"answers": ["16"]})


@pytest.mark.parametrize("truth", [{}, {"answers": None, "evidence": None}, {"answers": [], "evidence": []}])
@pytest.mark.parametrize("text", [GOOD, "", "<answer>", "no tags at all"])
def test_without_gold_columns_a_reward_does_not_apply(truth, text):
    for function in (accuracy, evidence, perception, evidence_slots):
        assert function(Response(text, truth)) is None
    for function in (well_formed, overlong, no_early_index, think_differs, abstained):
        assert isinstance(function(Response(text, truth)), float)


def test_accuracy_by_hand():
    assert answered("grew 16 percent", "16 percent") == pytest.approx(0.8)  # precision 2/3, recall 1
    assert answered("16", "twenty", "16") == 1.0  # the best gold counts
    assert answered("A", "A") == 1.0
    assert answered("B", "A") == 0.0
    assert answered("", "16") == 0.0
    assert answered("12.5", "125") == 1.0
    assert answered("12.5", "125", normalise="strict") == 0.0
    assert accuracy(Response("<answer>16</answer>", {"answers": "16"})) == 1.0  # a bare gold


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<answer>16</answer>", 1.0),
        ("<answer>\r\n16\r\n</answer>\r\n", 1.0),
        ("<answer>5</answer><answer>16</answer>", 0.0),  # the first block
        ("<think><answer>5</answer></think><answer>16</answer>", 0.0),
        ("<think>see <answer> </think><answer>16</answer>", 0.0),  # opens in the reasoning: "</think><answer>16"
        ("<think>see <answer> </think> 16</answer>", 2 / 3),  # {think, 16}
        ("<answer>16", 0.0),
        ("16</answer>", 0.0),
        ("</answer><answer>16", 0.0),
        ("<ANSWER>16</ANSWER>", 0.0),
        ("16", 0.0),
        ("", 0.0),
    ],
)
def test_accuracy_reads_the_first_closed_answer_block(text, score):
    assert accuracy(Response(text, {"answers": ["16"]})) == pytest.approx(score)


def test_evidence_by_hand():
    both = ("sales rose by 16 percent", NO_EVIDENCE)  # weights 3 and 1
    assert slots("[1]: sales rose by 16 percent [2]: no relevant information", *both) == 1.0
    assert slots("[1]: no relevant information [2]: no relevant information", *both) == 0.25
    assert slots("[1]: sales rose by 16 percent", *both) == 0.75  # a missing slot is 0
    # {sales, fell, by, 16, percent} against {sales, rose, by, 16, percent}: F1 4/5
    assert slots("[1]: sales fell by 16 percent [2]: x", *both) == pytest.approx(0.6)
    assert slots("[1]: total of 16 units, more", "16 units") == 1.0  # under five words: contained
    assert slots("[1]: 16 red units", "16 units") == 0.0
    assert slots("[1]: -5", "5") == 1.0
    assert slots("[1]: -5", "5", normalise="strict") == 0.0


@pytest.mark.parametrize(
    ("block", "score"),
    [
        ("[1]: a1 [2]: b2 [3]: c3", 1.0),
        ("\r\n[1]: a1\r\n[2]: b2\r\n[3]: c3\r\n", 1.0),
        ("[1]:a1[2]:b2[3]:c3", 1.0),
        ("[1]: a1 [3]: c3 [2]: b2", 1.0),  # other indices do not end a slot: slot 2 reaches the end
        ("[1]: x [2]: b2 [1]: a1 [3]: c3", 2 / 3),  # the first [1]: ends at the next [2]:
        ("[1]: a1 [2]: x [2]: b2 [3]: c3", 1.0),  # a repeated label is part of its slot
        ("[1]: [2]: [3]: a1 b2 c3", 1 / 3),
        ("[2]: b2 [1]: a1 [3]: c3", 1.0),
        ("[1] a1 [2] b2 [3] c3", 0.0),  # no labels
        ("[11]: a1 [12]: b2 [13]: c3", 0.0),
        ("", 0.0),
    ],
)
def test_slots_are_read_by_their_labels(block, score):
    assert slots(block, "a1", "b2", "c3") == pytest.approx(score)


def test_an_empty_slot_is_not_a_missing_one():
    assert slots("[1]: ", "") == 1.0
    assert slots("", "") == 0.0


@pytest.mark.parametrize("text", ["<evidence>[1]: 16", "[1]: 16</evidence>", "</evidence><evidence>[1]: 16", "[1]: 16"])
def test_without_a_closed_evidence_block_every_slot_scores_0(text):
    response = Response(text, {"evidence": ["16"]})
    assert evidence(response) == perception(response) == 0.0
    assert evidence_slots(response) == (Credit("slot1", 0.0, None),)


def test_perception_by_hand():
    both = ("16 units", NO_EVIDENCE)
    assert slots("[1]: 16 units [2]: No relevant information.", *both, function=perception) == 1.0
    assert slots("[1]: 16 [2]: no relevant information", *both, function=perception) == pytest.approx((2 / 3 + 1) / 2)
    # a hedged slot is not marked as irrelevant; the released evidence reward lets it pass
    assert slots("[1]: x [2]: 16 units, no relevant information", *both, function=perception) == 0.0
    assert slots("[1]: x [2]: 16 units, no relevant information", *both) == 0.25


def test_slot_credits_cover_their_own_characters():
    text = "<evidence>[1]: 16 [2]: red\n</evidence>"
    credits = evidence_slots(Response(text, {"evidence": ["16", "blue", NO_EVIDENCE]}))
    assert credits == (
        Credit("slot1", 1.0, Span(10, 18), len(text)),
        Credit("slot2", 0.0, Span(18, 27), len(text)),
        Credit("slot3", 0.0, None, len(text)),
    )
    assert (text[10:18], text[18:27]) == ("[1]: 16 ", "[2]: red\n")


def test_slot_credits_do_not_overlap_out_of_order():
    text = "<evidence>[2]: b2 [1]: a1 </evidence>"
    credits = evidence_slots(Response(text, {"evidence": ["a1", "b2"]}))
    assert [credit.score for credit in credits] == [1.0, 1.0]
    assert [text[credit.span.start : credit.span.end] for credit in credits] == ["[1]: a1 ", "[2]: b2 "]


TEXT_ALONE: dict[Reward, list[tuple[str, float | None]]] = {
    well_formed: [
        (GOOD, 1.0),
        (GOOD.replace("\n<", "\r\n<"), 1.0),
        (GOOD.replace("sales", "ventes été 日本"), 1.0),
        ("<observe></observe><evidence></evidence><think></think><answer></answer>", 1.0),
        (GOOD + "\n", 0.0),
        (" " + GOOD, 0.0),
        (GOOD + GOOD, 0.0),
        (GOOD.replace("<think>", "so <think>"), 0.0),
        (GOOD.replace("says", "<answer>16</answer> says"), 0.0),  # nested
        (GOOD.replace("says", "says </think>"), 0.0),  # repeated closing tag
        (GOOD.replace("</observe>", ""), 0.0),
        (GOOD[:-1], 0.0),  # truncated
        (GOOD.replace("<think>", "<Think>"), 0.0),
        ("<evidence></evidence><observe></observe><think></think><answer></answer>", 0.0),
        ("", 0.0),
    ],
    no_early_index: [
        (GOOD, 0.0),
        ("<observe>page [2] shows</observe><evidence>[1]: x</evidence>", -1.0),
        ("<observe>[12]</observe>", -1.0),
        ("<observe>[approx] [a1] 2] [</observe>", 0.0),
        ("<observe>a</observe><observe>[1]</observe>", 0.0),  # the first block
        ("[1]<observe>a</observe>", 0.0),
        ("<observe>[1]", 0.0),  # not a block
        ("", 0.0),
    ],
    think_differs: [
        (GOOD, 0.0),
        ("<think>16</think><answer>16</answer>", -1.0),
        ("<think>\r\n16 </think><answer>16</answer>", -1.0),
        ("<think></think><answer> </answer>", -1.0),
        ("<think>16.</think><answer>16</answer>", 0.0),
        ("<think>16</think><answer>16", 0.0),
        ("<answer>16</answer>", 0.0),
        ("", 0.0),
    ],
    marked_rate: [
        ("<evidence>[1]: 16 [2]: No relevant information.</evidence>", 0.5),
        ("<evidence>[1]: no relevant information[2]: no relevant information</evidence>", 0.0),
        ("<evidence>[1]: 16 [2]: 5 [3]: 4 [4]: </evidence>", 0.75),
        ("<evidence>nothing here</evidence>", 0.0),
        ("<evidence>[" + "9" * 5000 + "]: 16</evidence>", 0.0),
        ("<evidence>[1]: 16", None),
        ("", None),
    ],
    abstained: [
        ("<answer>Insufficient to answer.</answer>", 1.0),
        ("<answer>insufficient to answer the question</answer>", 1.0),
        ("<answer>16</answer>", 0.0),
        ("<think>insufficient to answer</think><answer>16</answer>", 0.0),
        ("<answer>insufficient to answer", 0.0),
        ("", 0.0),
    ],
}


@pytest.mark.parametrize(
    ("function", "text", "score"), [(function, *case) for function, cases in TEXT_ALONE.items() for case in cases]
)
def test_rewards_and_monitors_of_the_text_alone_by_hand(function, text, score):
    assert function(Response(text)) == score


@pytest.mark.parametrize(
    ("num_tokens", "score"),
    [(0, -1.0), (199, -1.0), (200, 0.0), (1024, 0.0), (1025, -1 / 512), (1280, -0.5), (1536, -1.0), (9999, -1.0)],
)
def test_overlong_by_hand(num_tokens, score):
    assert overlong(Response("", num_tokens=num_tokens)) == score
    assert str(overlong(Response("", num_tokens=500))) == "0.0"


def test_overlong_limits_are_configurable_and_must_fit():
    assert overlong(Response("", num_tokens=75), min_tokens=0, max_tokens=100, buffer_tokens=50) == -0.5
    with pytest.raises(RewardError, match="min_tokens <= max_tokens - buffer_tokens, got min_tokens=200"):
        overlong(Response(""), max_tokens=512)
    with pytest.raises(RewardError, match="buffer_tokens >= 1"):
        overlong(Response(""), buffer_tokens=0)


def test_scopes_of_the_shipped_rewards():
    cut = {tag: GOOD.index(f"<{tag}>") for tag in ("evidence", "think", "answer")}
    expected = {
        accuracy: (cut["think"], len(GOOD)),
        evidence: (0, cut["think"]),
        perception: (0, cut["think"]),
        no_early_index: (0, cut["evidence"]),
        think_differs: (cut["think"], cut["answer"]),
        evidence_slots: (cut["evidence"], GOOD.index("</evidence>")),
        well_formed: (0, len(GOOD)),
        overlong: (0, len(GOOD)),
    }
    for function, span in expected.items():
        assert function.scope(Response(GOOD)) == Span(*span), function.name
        truncated = function.scope(Response(GOOD[:10]))
        assert truncated == (Span(0, 10) if function in (well_formed, overlong) else None), function.name


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("16%", {"answers": ["16%"]}),
        ("<answer> 16% </answer>", {"answers": ["16%"]}),
        ("<evidence>[1]: a\r\n[2]: b</evidence>\n<answer>c</answer>", {"evidence": ["a", "b"], "answers": ["c"]}),
        ("<evidence>[1]: a</evidence>", {"evidence": ["a"]}),
        ("<evidence></evidence><answer>c</answer>", {"evidence": [], "answers": ["c"]}),
        ("<evidence>[1]: a</evidence><answer>c", {"evidence": ["a"]}),
        ("<evidence>[1]: a<answer>c</answer>", {"answers": ["c"]}),
    ],
)
def test_gold_text_is_read_with_and_without_tags(text, truth):
    assert parse_gold(text) == truth


def test_what_gold_response_writes_parse_gold_reads():
    truth = {"evidence": [f"page {number} says {number}" for number in range(1, 8)], "answers": ["16"]}
    assert parse_gold(gold_response(truth)) == truth


tag_soup = st.lists(
    st.sampled_from(
        [f"<{slash}{name}>" for name in ("observe", "evidence", "think", "answer") for slash in ("", "/")]
        + ["[1]:", "[2]:", "[3]:", "[1]", "16", "\r\n", "é", "no relevant information", "<", "answer>"]
    ),
    max_size=16,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(tag_soup, truths, st.integers(0, 3000))
def test_no_response_crashes_a_reward_or_leaves_its_range(text, truth, num_tokens):
    response = Response(text, truth, num_tokens)
    for function in ALL_REWARDS:
        value, top = score_of(function, response), MAXIMUM.get(function, 1.0)
        assert value is not None
        assert top - 1.0 <= value <= top, function.name
        span = function.scope(response)
        assert span is None or 0 <= span.start <= span.end <= len(text)
    spans = sorted(credit.span.start for credit in evidence_slots(response) if credit.span)
    ends = sorted(credit.span.end for credit in evidence_slots(response) if credit.span)
    assert all(end <= start for end, start in zip(ends, spans[1:], strict=False))
    rate = marked_rate(response)
    assert rate is None or 0.0 <= rate <= 1.0
