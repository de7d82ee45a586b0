"""Law 11: credit is unbiased. On a policy that can be enumerated, the expected update equals the exact gradient.

The policy writes three characters, one per segment, from tables of logits that depend on what was written before.
Groups are enumerated, so nothing is sampled and the only error is rounding. Rewards: `first` is determined by the
first character, `second` by the first two, `third` at the end, where it looks at the first and the last.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from rewards.api import Credit, Span
from rollout.types import Prompt, Rollout, RolloutGroup
from rsgrpo.algorithm.advantages import Rule, credit_terms
from rsgrpo.types import ScoredGroup

VOCABULARY = "abc"
RESPONSES = ["".join(letters) for letters in itertools.product(VOCABULARY, repeat=3)]
WEIGHTS = (1.0, 0.7, 1.3)
FIRST = {"a": 1.0, "b": 0.2, "c": 0.0}
SECOND = {"aa": 1.0, "ab": 0.1, "ba": 0.4, "bb": 0.9, "ca": 0.0, "cb": 0.6}
THIRD = {"aa": 0.3, "ac": 1.0, "bb": 0.5, "cc": 0.8, "ca": 0.1}


def scores_of(text: str) -> tuple[float, float, float]:
    return FIRST[text[0]], SECOND.get(text[:2], 0.3), THIRD.get(text[0] + text[2], 0.0)


def plain_credits(text: str) -> tuple[tuple[Credit, ...], ...]:
    """The scopes of RS-GRPO: each reward on its own segment; determined at the segment's end."""
    return tuple((Credit("", score, Span(k, k + 1), k + 1),) for k, score in enumerate(scores_of(text)))


def optional_credits(text: str) -> tuple[tuple[Credit, ...], ...]:
    """The policy decides which credits of `second` exist: there is a slot only where the second character is a or b."""
    first, _, third = plain_credits(text)
    slots = [Credit("slot", SECOND.get(text[:2], 0.3), Span(1, 2), 2)] if text[1] != "c" else []
    return first, (Credit("always", 0.1 * ord(text[0]) % 1, Span(0, 1), 1), *slots), third


def total_score(text: str, credits_of) -> float:
    """What is maximised: the weighted sum of everything that is scored."""
    return sum(w * sum(c.score for c in credits) for w, credits in zip(WEIGHTS, credits_of(text), strict=True))


@pytest.fixture(scope="module")
def logits():
    torch.manual_seed(0)
    shapes = [(3,), (3, 3), (3, 3, 3)]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def token_logprobs(logits, text: str) -> list[torch.Tensor]:
    a, b, c = (VOCABULARY.index(letter) for letter in text)
    return [logits[0].log_softmax(-1)[a], logits[1][a].log_softmax(-1)[b], logits[2][a, b].log_softmax(-1)[c]]


def probability(logits, text: str) -> torch.Tensor:
    return torch.stack(token_logprobs(logits, text)).sum().exp()


def gradient(logits, objective: torch.Tensor) -> np.ndarray:
    parts = torch.autograd.grad(objective, logits, retain_graph=True)
    return torch.cat([part.flatten() for part in parts]).numpy()


def exact_gradient(logits, credits_of) -> np.ndarray:
    parts = [probability(logits, text) * total_score(text, credits_of) for text in RESPONSES]
    return gradient(logits, torch.stack(parts).sum())


def group_of(texts, credits_of) -> ScoredGroup:
    rollouts = tuple(
        Rollout(tuple(map(ord, text)), (0.0,) * 3, text, ((0, 1), (1, 2), (2, 3)), "stop", 0) for text in texts
    )
    credits_GK = [list(credits_of(text)) for text in texts]
    scores_GK = [[float(np.mean([c.score for c in credits])) for credits in row] for row in credits_GK]
    return ScoredGroup(
        group=RolloutGroup(Prompt(id="p", text="t"), rollouts),
        reward_names_K=("first", "second", "third"),
        scores_GK=scores_GK,
        credits_GK=credits_GK,
        missed_GK=[[False] * 3 for _ in texts],
    )


def expected_update(logits, rule: Rule, credits_of, *, size: int = 2) -> np.ndarray:
    """Return E[sum over rollouts, rewards and tokens of w_k A_kt grad log p_t] / G over all groups of `size`."""
    logprobs = {text: token_logprobs(logits, text) for text in RESPONSES}
    chance = {text: probability(logits, text).item() for text in RESPONSES}
    taught = {text: np.zeros(3) for text in RESPONSES}
    for texts in itertools.product(RESPONSES, repeat=size):
        terms_G = credit_terms([group_of(texts, credits_of)], rule, WEIGHTS)[0]
        share = np.prod([chance[text] for text in texts]) / size
        for text, (_, advantages_KT) in zip(texts, terms_G, strict=True):
            taught[text] += share * (np.asarray(WEIGHTS) @ advantages_KT)
    parts = [a * lp for text in RESPONSES for a, lp in zip(taught[text], logprobs[text], strict=True)]
    return gradient(logits, torch.stack(parts).sum())


@pytest.mark.parametrize("credits_of", [plain_credits, optional_credits], ids=["plain", "optional"])
@pytest.mark.parametrize("credit", ["causal", "whole"])
@pytest.mark.parametrize(("baseline", "factor"), [("leave_one_out", 1.0), ("group", 0.5)])
def test_the_expected_update_is_the_exact_gradient(logits, credit, baseline, factor, credits_of):
    """A group's own mean holds the score itself, which costs the factor (G - 1) / G and no direction."""
    rule = Rule("per_reward", credit=credit, baseline=baseline, scale="none")
    update = expected_update(logits, rule, credits_of)
    np.testing.assert_allclose(update, factor * exact_gradient(logits, credits_of), rtol=0, atol=1e-12)


def test_credit_to_the_own_scope_is_biased_by_what_a_segment_does_to_later_rewards(logits):
    """Own credit keeps grad_t E[s_k] only where k is the token's own reward; the rest of the gradient is its bias."""
    rule = Rule("per_reward", credit="own", baseline="leave_one_out", scale="none")
    update = expected_update(logits, rule, plain_credits)
    kept = np.zeros_like(update)
    sizes = np.cumsum([0, *(part.numel() for part in logits)])
    for k, weight in enumerate(WEIGHTS):
        parts = [probability(logits, text) * scores_of(text)[k] for text in RESPONSES]
        kept[sizes[k] : sizes[k + 1]] = weight * gradient(logits, torch.stack(parts).sum())[sizes[k] : sizes[k + 1]]
    np.testing.assert_allclose(update, kept, rtol=0, atol=1e-12)
    exact = exact_gradient(logits, plain_credits)
    first = slice(0, sizes[1])
    assert np.linalg.norm(update[first] - exact[first]) > 0.2 * np.linalg.norm(exact[first])
