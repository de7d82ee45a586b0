"""The rules of benchmarks, on cases worked out by hand from the text of each rule."""

from __future__ import annotations

import doctest

import pytest

from recipes.evaluation import official
from recipes.evaluation.official import (
    PROTOCOLS,
    Parts,
    anls,
    answer_parts,
    box_parts,
    chartqapro,
    edit_distance,
    joint_parts,
    mmlongbench,
    overlap,
    page_parts,
    relaxed,
)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(official).failed == 0


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
        ("abcd", ["abxy"], 0.0),  # a similarity of exactly one half counts for nothing
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
        assert protocol.scorer("16", ["16"], {}) == 1.0
        assert protocol.scorer("cat", ["16"], {}) == 0.0
