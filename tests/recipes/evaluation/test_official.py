"""The rules of benchmarks, on cases worked out by hand; what is marked "program" is what the released program gives.

The programs (commits 263f15d of MMLongBench-Doc, 8911d1b of ChartQAPro, ef1292f of SlideVQA; metrics.py of
MP-DocVQA-Framework 0f12ae3 and of lmms-eval 008ddc8) gave the same score on 40,000 generated cases each, except for
ChartQAPro's golds with quotes inside of quotes.
"""

from __future__ import annotations

import doctest

import pytest

from recipes.evaluation import official, parts
from recipes.evaluation.official import PROTOCOLS, anls, chartqapro, edit_distance, mmlongbench, relaxed, vidoseek
from recipes.evaluation.parts import (
    Parts,
    answer_parts,
    box_parts,
    joint_parts,
    overlap,
    page_parts,
    slidevqa_parts,
)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(official).failed == doctest.testmod(parts).failed == 0


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "abc", 3), ("flaw", "lawn", 2), ("kitten", "sitting", 3), ("same", "same", 0)],
)
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


@pytest.mark.parametrize(
    ("prediction", "golds", "score"),
    [
        ("ITC  Limited", ["itc limited"], 1.0),  # case and white space do not count
        ("5", ["7", "5"], 1.0),  # the best gold
        ("abcd", ["abxy"], 0.5),  # program: exactly one half counts, against the paper's formula
        ("abcdef", ["abcxyzw"], 0.0),
        ("13", ["12"], 0.5),
        ("abcde", ["abcxy"], 0.6),
        ("", ["x"], 0.0),
        ("anything", [], 0.0),
    ],
)
def test_anls(prediction, golds, score):
    assert anls(prediction, golds) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("105", "100", 1.0),
        ("105.1", "100", 0.0),
        ("-95", "-100", 1.0),
        ("0", "0", 1.0),
        ("0.0", "0", 0.0),  # a gold of 0 is compared as text
        ("14%", "0.14", 1.0),
        ("14%%", "0.14", 1.0),  # program
        ("Blue", "blue", 1.0),
        ("dark blue", "blue", 0.0),
    ],
)
def test_relaxed_accuracy(prediction, gold, score):
    assert relaxed(prediction, [gold]) == score


@pytest.mark.parametrize(
    ("prediction", "gold", "columns", "score"),
    [
        ("2021", "2020", {"year": "NO"}, 1.0),  # a number within 5%
        ("2021", "2020", {"year": ["YES"]}, 0.0),  # a year is exact
        ("[2020, 11]", "[2020, 10]", {"year": ["YES", "NO"]}, 0.5),
        ("[1, 2, 3]", "[1, 2]", {}, 2 / 3),  # a surplus item counts below
        ("[1]", "[1, 2]", {}, 0.5),
        ("B", "b", {"question_type": "Multi Choice"}, 1.0),
        ("abcde", "abcxy", {}, 0.6),
        ("abcde", "abcxy", {"question_type": "Fact Checking"}, 0.0),
        # program, from here
        ("abcd", "abxy", {}, 0.0),  # its ANLS leaves out one half
        ("50", "50%", {}, 1.0),  # a percent sign does not count
        ("50%", "0.5", {}, 0.0),
        ("0.0", "0", {}, 1.0),
        ("$16", "16", {}, 2 / 3),  # not a number, so ANLS
        ("True.", "true", {"Question Type": "Fact Checking"}, 1.0),  # a full stop does not count
        ("2021", "2020", {"Year": ["NO", "YES"], "Question Type": "Conversational"}, 0.0),  # the last turn's year
        ("2021", "2020", {"Year": ["YES", "NO"], "Question Type": "Conversational"}, 1.0),
        ("['men', 'women']", "[men, women]", {}, 1.0),  # a gold may lack its quotes
        ("[men, women]", "['men', 'women']", {}, 0.0),  # an answer may not: it is one text
        ("x", "[]", {}, 0.0),
    ],
)
def test_chartqapro(prediction, gold, columns, score):
    assert chartqapro(prediction, [gold], columns) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "gold", "kind", "score"),
    [
        ("7.0", "7", "Int", 1.0),
        ("7.9", "7", "Int", 1.0),  # cut to a whole number, as int(float(...)) does
        ("seven", "7", "Int", 0.0),
        ("10.09", "10", "Float", 1.0),
        ("10.2", "10", "Float", 0.0),
        ("0.3", "0.304", "Float", 1.0),  # program: equal when rounded to two decimals
        ("0.001", "0.004", "Float", 0.0),
        ("0.01", "0.02", "Float", 0.0),
        ("many", "10", "Float", 0.0),
        ("12.5%", "0.125", "Float", 1.0),  # times 100
        ("$1.5", "1.5 (million)", "Float", 1.0),
        ("not answerable", "Not answerable", "None", 1.0),
        ("abcde", "abcxy", "Str", 0.6),
        ("page 13", "page 12", "Str", 0.0),  # must be equal
        ("2020-01-02", "2020-01-03", "Str", 0.0),
        ("['b', 'a']", "['a', 'b']", "List", 1.0),
        ("['a']", "['a', 'b']", "List", 0.0),
        ("['abcde', 'z']", "['abcxy', 'z']", "List", 0.6),  # the worst item
        ("[1, 2]", "[1, 3]", "List", 0.0),
        ("[a, b]", "['a', 'b']", "List", 0.0),  # program: not a list that Python reads
        ("[]", "[]", "List", 0.0),
        ("abcd", "abxy", "Str", 0.0),  # its similarity leaves out one half
    ],
)
def test_mmlongbench(prediction, gold, kind, score):
    assert mmlongbench(prediction, [gold], {"answer_format": kind}) == pytest.approx(score)


def test_slidevqa_joins_answer_and_pages_by_products():
    answer = answer_parts("16 percent growth", ["16 percent"])
    assert answer == Parts(0.0, 2 / 3, 1.0, 0.8)
    pages = page_parts({1, 2}, {2})
    joint = joint_parts(answer, pages)
    assert (joint.em, joint.recall) == (0.0, 1.0)
    assert joint.precision == pytest.approx(1 / 3)
    assert joint.f1 == pytest.approx(0.5)
    assert page_parts(set(), set()) == Parts(1.0, 1.0, 1.0, 1.0)
    assert page_parts({1}, set()) == page_parts(set(), {1}) == Parts(0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("prediction", "gold", "question", "em", "f1"),
    [
        ("twelve", "12", "What is it?", 1.0, 1.0),
        ("9 countries", "nine", "In how many countries is it sold?", 1.0, 1.0),  # the unit that the question names
        ("9 countries", "nine", "How many countries?", 0.0, 2 / 3),  # the question is read as written
        ("it is 16 percent", "16%", "", 1.0, 1.0),
        ("Yes, it does", "yes", "", 1.0, 1.0),  # the first word of an answer that begins with yes or no
        ("research & development", "research and development", "", 1.0, 1.0),
        ("The", "a", "", 0.0, 0.0),  # nothing is left
    ],
)
def test_slidevqa_reads_answers_as_its_program_does(prediction, gold, question, em, f1):
    found = slidevqa_parts(prediction, [gold], {"question": question})
    assert found.em == em
    assert found.f1 == pytest.approx(f1)


def test_boxes_match_once_each():
    square = (0.0, 0.0, 2.0, 2.0)
    assert overlap(square, (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert overlap(square, (5, 5, 6, 6)) == 0.0
    twice = box_parts([square, square], [square])
    assert (twice.precision, twice.recall, twice.em) == (0.5, 1.0, 0.0)
    assert box_parts([square], [square]) == Parts(1.0, 1.0, 1.0, 1.0)
    assert box_parts([], []) == Parts(1.0, 1.0, 1.0, 1.0)


def test_every_protocol_names_its_source_and_gives_a_right_answer_one():
    for protocol in PROTOCOLS.values():
        assert "arXiv" in protocol.source
        assert protocol.scorer("5" if protocol.is_judged else "16", ["16"], {}) == 1.0
        assert protocol.scorer("cat", ["16"], {}) == 0.0


@pytest.mark.parametrize(("mark", "score"), [("4", 1), ("5 of 5", 1), ("Mark: 3", 0), ("10", 0), ("", 0), ("4.5", 1)])
def test_a_judges_mark_of_four_or_five_is_right(mark, score):
    assert vidoseek(mark, ["any"]) == score
