"""Normalisation, token F1 and containment, in both modes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.api import RewardError
from rewards.text import containment, normalise, set_f1


@pytest.mark.parametrize(
    ("text", "paper"),
    [
        ("The  Cat,\r\n sat\ton A mat.", "cat sat on mat"),
        ("12.5%", "125"),
        ("-5", "5"),
        ("$1,200", "1200"),
        ("year-on-year", "yearonyear"),
        ("Theme analysis", "theme analysis"),  # articles are whole words
        ("É\N{EN DASH}日本", "é\N{EN DASH}日本"),  # only ASCII punctuation goes
        ("A", ""),
        ("an. the!", ""),
    ],
)
def test_paper_normalisation(text, paper):
    assert normalise(text) == paper


@pytest.mark.parametrize(
    ("text", "strict"),
    [
        ("12.5%", "12.5"),
        ("-5", "-5"),
        ("\N{MINUS SIGN}5", "-5"),
        ("\N{EN DASH}5", "-5"),
        ("+5", "5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("-.5", "-.5"),
        ("It is 12.", "it is 12"),
        ("1,200,300.5", "1200300.5"),
        ("12,5", "12 5"),
        ("2019-2020", "2019 2020"),
        ("2019\N{EN DASH}2020", "2019 2020"),
        ("10%-12%", "10 12"),
        ("9:30", "9 30"),
        ("(3,-5)", "3 -5"),
        ("Covid-19", "covid19"),
        ("- five", "five"),
        ("The answer: A.", "answer a"),  # a single letter can be the answer
        ("\N{EN DASH}", ""),
    ],
)
def test_strict_normalisation_keeps_what_numbers_mean(text, strict):
    assert normalise(text, "strict") == strict


def test_set_f1_by_hand():
    # {revenue, grew, 16} and {16, grew, fast, today}: 2 shared, precision 2/3, recall 2/4 -> 4/7
    assert set_f1("Revenue grew 16%", "16 grew fast today") == pytest.approx(4 / 7)
    assert set_f1("16 16 16", "16") == 1.0  # a set, not a multiset
    assert set_f1("", "16") == 0.0
    assert set_f1("the", "16") == 0.0
    assert set_f1("blue", "red") == 0.0


@pytest.mark.parametrize(("prediction", "gold"), [("12.5", "125"), ("5", "-5"), ("5", "\N{MINUS SIGN}5")])
def test_numbers_differ_in_strict_mode(prediction, gold):
    assert set_f1(prediction, gold, "strict") == 0.0
    assert containment(prediction, gold, "strict") == 0.0
    assert set_f1(gold, gold, "strict") == 1.0


def test_containment_is_of_characters_in_paper_mode_and_of_words_in_strict_mode():
    assert containment("in 2016", "16") == 1.0
    assert containment("in 2016", "16", "strict") == 0.0
    assert containment("rose to 16%.", "16", "strict") == 1.0
    assert containment("rose to -16%", "16", "strict") == 0.0
    assert containment("no such thing", "no relevant information") == 0.0


@pytest.mark.parametrize("gold", ["A", "The", "\N{EN DASH}", "...", "", " a "])
@pytest.mark.parametrize("mode", ["paper", "strict"])
def test_a_gold_that_normalises_to_nothing_is_compared_raw(gold, mode):
    for compare in (set_f1, containment):
        assert compare(f" {gold.lower()}\n", gold, mode) == 1.0
        assert compare("B", gold, mode) == 0.0
        assert compare("a long sentence of five words" if gold.strip().lower() != "a" else "b c", gold, mode) == 0.0


def test_an_unknown_mode_is_refused():
    with pytest.raises(RewardError, match="'paper' or 'strict', got 'loose'"):
        normalise("x", "loose")  # type: ignore[arg-type]


@given(st.text(), st.text(), st.sampled_from(["paper", "strict"]))
def test_a_text_equals_itself_and_scores_lie_between_0_and_1(prediction, gold, mode):
    assert set_f1(gold, gold, mode) == containment(gold, gold, mode) == 1.0
    assert 0.0 <= set_f1(prediction, gold, mode) <= 1.0
    assert containment(prediction, gold, mode) in (0.0, 1.0)


@given(st.text(alphabet="a1 -.,:%$", max_size=30))
def test_strict_normalisation_leaves_its_own_numbers_alone(text):
    for token in normalise(text, "strict").split():
        if token.count(".") <= 1 and token.strip("-.").isdigit():
            assert normalise(token, "strict") == token
