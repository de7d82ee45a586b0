"""Law 4: a tag is found in every BPE context; a miss is counted, and never widens a scope in silence."""

from __future__ import annotations

import pytest

from rewards.api import Credit, Response, Span, between
from rollout.inputs.offsets import token_spans
from rsgrpo.algorithm.scopes import token_mask
from rsgrpo.algorithm.scoring import RewardFailed
from tests.rsgrpo.algorithm.test_scoring import group, length, reward_set


def test_a_token_that_fuses_two_tags_is_in_both_scopes(tiny_model_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    text = "<evidence>[1]: 7</evidence><think>The</think>"
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    decoded, spans_T = token_spans(tokenizer, ids)
    assert decoded == text
    response = Response(text)
    evidence_T = token_mask(spans_T, between(None, "<think>")(response), len(text))
    think_T = token_mask(spans_T, between("<think>", None)(response), len(text))
    boundary = text.index("<think>")
    for (start, end), in_evidence, in_think in zip(spans_T, evidence_T, think_T, strict=True):
        assert in_evidence == (start < boundary and end > start)
        assert in_think == (end > boundary or start == len(text))
    assert not evidence_T[-1]
    assert think_T[-1]


def test_a_missing_marker_is_void_by_default_and_counted():
    scored = reward_set(length).score([group()])[0]
    assert scored.missed_GK == [[False], [True]]
    assert scored.credits_GK[1][0] == (Credit("", 0.14, None, 14),)


def test_a_missing_marker_can_widen_or_stop():
    widened = reward_set(length, missing_marker="widen").score([group()])[0]
    assert widened.credits_GK[1][0] == (Credit("", 0.14, Span(0, 14), 14),)
    assert widened.missed_GK[1] == [True]
    with pytest.raises(RewardFailed, match=r"'length' finds no scope in sample row7#1"):
        reward_set(length, missing_marker="error").score([group()])
