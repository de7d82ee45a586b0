"""Answer metrics against the reference numbers, splits and counts by hand, intervals and tests by known cases."""

from __future__ import annotations

import json

import numpy as np
import pytest

from recipes.answers.predictions import Prediction, Predictions, load_predictions
from recipes.answers.questions import Question
from recipes.evaluation.intervals import Ratio, compare, estimate, mean_of
from recipes.evaluation.scoring import (
    compare_evaluations,
    evaluate_predictions,
    released_prediction,
    score_answer,
    score_item,
)
from rsgrpo.errors import RsgrpoError
from tests.material import DATA
from tests.material.answering import response

REFERENCE = [json.loads(line) for line in (DATA / "metrics.jsonl").read_text().splitlines()]
NOTHING = "no relevant information"


def question(id_, answers=("16%",), **more):
    return Question(id_, "what share?", ("a.png", "b.png"), answers=tuple(answers), **more)


def predictions(**texts):
    return Predictions({id_: Prediction(id_, text) for id_, text in texts.items()})


def test_paper_mode_gives_the_reference_numbers():
    assert len(REFERENCE) == 200
    for row in REFERENCE:
        asked = Question(row["qid"], "q", answers=tuple(row["answer"]), is_sufficient=row["is_sufficient"])
        scores = score_item(asked, Prediction(row["qid"], row["pred"])).answer["paper"]
        assert (scores.em, scores.acc) == (row["em"], row["acc"]), row["qid"]
        assert scores.f1 == pytest.approx(row["f1"], abs=1e-12), row["qid"]


# One answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>7</answer>", "7"),
        ("<answer>7</answer><answer>8</answer>", "7"),
        ("<think>t</think><answer> 7", "7"),
        ("</answer><answer>7</answer>", "7"),
        ("7 percent", "7 percent"),
        ("<think>t</think>", "<think>t</think>"),
        ("", ""),
    ],
)
def test_the_released_prediction(text, expected):
    assert released_prediction(text) == expected


@pytest.mark.parametrize(
    ("prediction", "gold", "paper_em", "strict_em"),
    [
        ("125", "12.5", 1, 0),
        ("5", "-5", 1, 0),
        ("12.5%", "12.5", 1, 1),
        ("1,200", "1200", 1, 1),
        ("a", "A", 0, 1),
        ("The", "the", 0, 1),
        ("", "the", 0, 0),
        ("b", "a", 0, 0),
        ("16 percent", "16 percent.", 1, 1),
    ],
)
def test_strict_keeps_signs_points_and_single_letters(prediction, gold, paper_em, strict_em):
    assert score_answer(prediction, [gold], "paper").em == paper_em
    assert score_answer(prediction, [gold], "strict").em == strict_em


def test_each_metric_takes_its_best_gold():
    scores = score_answer("red blue green", ["red blue green grey", "blue"], "strict")
    assert (scores.em, scores.acc) == (0.0, 1.0)
    assert scores.f1 == pytest.approx(2 * 3 / (3 + 4))


def test_strict_reads_the_last_answer_after_the_reasoning():
    text = "<think>maybe <answer>12</answer></think><answer>16%</answer>"
    item = score_item(question("q"), Prediction("q", text))
    assert item.predicted == {"paper": "12", "strict": "16%"}
    assert (item.answer["paper"].em, item.answer["strict"].em) == (0.0, 1.0)


def test_an_insufficient_question_wants_an_abstention_whatever_its_gold_says():
    item = score_item(question("q", is_sufficient=False), Prediction("q", response("Insufficient to answer.")))
    assert item.answer["paper"].em == item.answer["strict"].em == 1.0
    assert score_item(question("q", is_sufficient=False), Prediction("q", response("16%"))).answer["paper"].f1 == 0.0


# A whole file

QUESTIONS = [
    question("right", evidence=("Sweden 16%", NOTHING)),
    question("half", answers=("blue house",), evidence=(NOTHING, "a blue house")),
    question("abstains", evidence=("16% in all", NOTHING)),
    question("lost", is_sufficient=False, evidence=(NOTHING, NOTHING)),
    question("settled", is_sufficient=False, evidence=(NOTHING, NOTHING)),
]
FILE = predictions(
    right=response("16%", "Sweden 16%", NOTHING, think="[1] says so"),
    half=response("blue", "blue", "blue", think="[1] and [2]"),
    abstains=response("insufficient to answer", NOTHING, NOTHING),
    settled=response("no relevant information", NOTHING, NOTHING),
    stranger=response("16%"),
)


def test_a_file_is_scored_as_by_hand():
    result = evaluate_predictions(QUESTIONS, FILE, num_samples=0)
    value = {name: estimate.value for name, estimate in result.estimates.items()}
    by_hand = {
        "strict/global/em": 2 / 5,  # right, settled
        "strict/sufficient/em": 1 / 3,
        "strict/insufficient/em": 1 / 2,
        "strict/sufficient/f1": (1 + 2 / 3 + 0) / 3,
        "strict/sufficient/acc": 1 / 3,
        "abstention/rate": 2 / 5,
        "output/format_ok": 1.0,
    }
    # abstained: "abstains" (wrongly), "settled" (rightly); "lost" has no answer at all
    by_hand |= {f"abstention/{part}": 1 / 2 for part in ("precision", "recall", "f1")}
    # slots claimed: right 1 (hit), half 1 (false) and 2 (hit); missed: abstains 1. Cited: the same
    by_hand |= {f"evidence/{kind}_{part}": 2 / 3 for kind in ("slot", "citation") for part in ("precision", "recall")}
    assert {name: value[name] for name in by_hand} == pytest.approx(by_hand)
    assert value["evidence/slot_f1"] == pytest.approx(2 / 3)
    assert (result.num_missing, result.num_failed, result.num_unknown) == (1, 0, 1)


def test_what_a_file_has_none_of_has_no_score():
    result = evaluate_predictions([question("right")], FILE, num_samples=20)
    assert not [name for name in result.estimates if name.startswith("evidence/")]
    insufficient = result.estimates["paper/insufficient/em"]
    assert (insufficient.value, insufficient.low, insufficient.high, insufficient.count) == (None, None, None, 0)
    assert result.estimates["abstention/precision"].value is None


def test_a_question_that_could_not_be_asked_is_missing():
    failed = Predictions({"right": Prediction("right", "", "error", "image b.png does not exist")})
    result = evaluate_predictions([question("right")], failed, num_samples=0)
    assert (result.num_missing, result.num_failed) == (1, 1)
    assert result.estimates["paper/global/f1"].value == 0.0
    assert result.estimates["output/format_ok"].value is None


# Intervals


def test_an_interval_holds_the_mean_and_shrinks_with_more_items():
    widths = []
    for num_items in (25, 400):
        values = np.arange(num_items) % 2
        found = estimate({"m": mean_of(values)}, 500, seed=0)["m"]
        low, high = found.low or 0, found.high or 0
        assert low < (found.value or 0) < high
        widths.append(high - low)
    # the standard error of a fair coin: 1.96 * 2 * 0.5 / sqrt(n)
    assert widths[0] == pytest.approx(1.96 / 5, rel=0.2)
    assert widths[1] == pytest.approx(1.96 / 20, rel=0.2)


def test_a_constant_metric_has_no_width_and_a_seed_fixes_the_rest():
    same = estimate({"m": mean_of(np.ones(10))}, 100, seed=0)["m"]
    assert (same.low, same.value, same.high) == (1.0, 1.0, 1.0)
    coins = {"m": mean_of(np.arange(30) % 2)}
    assert estimate(coins, 100, seed=1) == estimate(coins, 100, seed=1) != estimate(coins, 100, seed=2)


def test_a_ratio_of_sums_is_not_a_mean_of_ratios():
    assert Ratio(np.array([1.0, 0.0]), np.array([1.0, 3.0])).value() == 0.25


def test_large_files_are_resampled_in_pieces(monkeypatch):
    whole = estimate({"m": mean_of(np.arange(50) % 2)}, 64, seed=0)
    monkeypatch.setattr("recipes.evaluation.intervals.MAX_DRAWN_VALUES", 500)
    assert estimate({"m": mean_of(np.arange(50) % 2)}, 64, seed=0) == whole


# Comparing


def ones_and_zeros(num_ones, num_items=20):
    return {"m": mean_of(np.array([1.0] * num_ones + [0.0] * (num_items - num_ones)))}


def compared(first, second, num_permutations=500):
    return compare(ones_and_zeros(first), ones_and_zeros(second), 200, num_permutations, seed=0)["m"]


def test_equal_predictions_do_not_differ_and_swapping_the_files_turns_the_sign():
    same, one, other = compared(5, 5), compared(10, 4), compared(4, 10)
    assert (same.value, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert [one.value, one.low, one.high] == pytest.approx([-(x or 0) for x in (other.value, other.high, other.low)])
    assert other.p_value == one.p_value


def test_the_p_value_is_that_of_the_exact_test():
    # 6 discordant items, all in favour of the first: two of 2**6 sign patterns are as extreme, p = 1/32
    found = compared(10, 4, num_permutations=20_000)
    assert found.value == pytest.approx(0.3)
    assert found.p_value == pytest.approx(1 / 32, rel=0.1)
    assert (found.low or 0) > 0


def test_evaluations_are_compared_by_question():
    better = predictions(right=response("16%"), half=response("blue house"))
    found = compare_evaluations(
        evaluate_predictions(QUESTIONS, better, num_samples=0),
        evaluate_predictions(QUESTIONS, predictions(right=response("16%")), num_samples=0),
        num_samples=50,
        num_permutations=200,
    )
    assert found["strict/global/em"].value == pytest.approx(1 / 5)
    assert found["strict/sufficient/em"].value == pytest.approx(1 / 3)
    assert found["strict/insufficient/em"].p_value == 1.0


# Prediction files


@pytest.mark.parametrize(
    "row",
    [
        {"id": "7", "raw": "16%", "answer": "not this"},
        {"qid": 7, "pred": "16%", "answer": ["gold"]},
        {"question_id": "7", "response": "16%"},
        {"qid": "7", "prediction": ["16%"]},
        {"id": "7", "answer": "16%"},
    ],
)
def test_files_of_several_origins_load(tmp_path, row):
    (tmp_path / "p.jsonl").write_text("\ufeff" + json.dumps(row) + "\r\n\n", encoding="utf-8")
    (tmp_path / "p.json").write_text(json.dumps([row]))
    for name in ("p.jsonl", "p.json"):
        assert load_predictions(tmp_path / name).by_id == {"7": Prediction("7", "16%")}


def test_a_map_from_id_to_output_loads_and_the_last_of_several_lines_counts(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"7": "16%", "8": {"pred": "x"}}))
    assert [found.text for found in load_predictions(tmp_path / "p.json").by_id.values()] == ["16%", "x"]
    (tmp_path / "p.jsonl").write_text('{"id": "7", "raw": "old"}\n{"id": "7", "raw": "new"}\n')
    loaded = load_predictions(tmp_path / "p.jsonl")
    assert (loaded.by_id["7"].text, loaded.num_repeated) == ("new", 1)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"id": "7", "raw": "x"}\n{"id": ', "line 2 of .* is not valid JSON"),
        ('{"raw": "x"}', "names no question: it needs one of id, qid"),
        ('{"id": "7", "text": "x"}', "has no output: it needs one of raw, pred"),
        ('{"id": "7", "answer": ["gold"]}', "has no output"),
        ("[1]", "must be a JSON object"),
        ("", "has no rows"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(tmp_path, content, complaint):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(RsgrpoError, match=complaint):
        load_predictions(tmp_path / "p.jsonl")
    with pytest.raises(RsgrpoError, match="cannot be read"):
        load_predictions(tmp_path / "none.jsonl")
