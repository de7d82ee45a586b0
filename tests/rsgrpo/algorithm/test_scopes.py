"""From characters to tokens."""

from __future__ import annotations

from rewards.api import Span
from rsgrpo.algorithm.scopes import token_mask


def test_a_token_is_covered_when_any_of_its_characters_is():
    spans_T = [(0, 3), (3, 5), (5, 9)]
    assert token_mask(spans_T, Span(3, 5), 9).tolist() == [False, True, False]
    assert token_mask(spans_T, Span(2, 4), 9).tolist() == [True, True, False]
    assert token_mask(spans_T, Span(5, 5), 9).tolist() == [False, False, False]
    assert token_mask(spans_T, None, 9).tolist() == [False, False, False]


def test_two_tokens_that_share_a_character_are_both_covered():
    # One emoji cut over two byte-level tokens: both hold bytes of character 4.
    assert token_mask([(0, 4), (4, 5), (4, 5), (5, 6)], Span(4, 5), 6).tolist() == [False, True, True, False]


def test_end_of_text_is_in_every_span_that_reaches_the_end_and_in_no_other():
    spans_T = [(0, 4), (4, 8), (8, 8)]
    assert token_mask(spans_T, Span(4, 8), 8).tolist() == [False, True, True]
    assert token_mask(spans_T, Span(0, 8), 8).tolist() == [True, True, True]
    assert token_mask(spans_T, Span(0, 4), 8).tolist() == [True, False, False]
    assert token_mask([(0, 0)], Span(0, 0), 0).tolist() == [True]
    assert token_mask([], Span(0, 0), 0).tolist() == []
