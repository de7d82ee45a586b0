"""Law 11 over turns: credits that the policy chooses to have leave the expected update equal to the exact gradient.

The policy writes up to three turns. Each is a letter and then, by choice, an end-of-text or a second letter; an
environment answers a turn that began with `a` or `b`, and `c` ends the episode. Rewards come from `rewards.turns`: a
score per turn, decided by the turns so far, and an answer that only the last turn determines.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from rewards.api import Response, reward
from rewards.turns import last_turn, per_turn, turn_end, turns_of
from rollout.types import Observation, Prompt, Rollout, RolloutGroup
from rsgrpo.algorithm.advantages import Rule, credit_terms
from rsgrpo.algorithm.scoring import NamedReward, RewardSet

END = "."
TURNS = ["a.", "ab", "b.", "bb", "c."]
WEIGHTS = (1.0, 0.7, 1.3)


def episodes() -> list[tuple[str, ...]]:
    """Return every sequence of turns: the episode ends behind `c` or the second turn."""
    found = [(first,) for first in TURNS if first[0] == "c"]
    return found + [pair for pair in itertools.product(TURNS, repeat=2) if pair[0][0] != "c"]


EPISODES = episodes()


def value(text: str) -> float:
    return (sum(ord(character) * 31**index for index, character in enumerate(text)) % 101) / 100


def words(response: Response) -> list[str]:
    return [response.text[turn.span.start : turn.span.end] for turn in turns_of(response)]


@reward
def each_turn(response: Response):
    said = words(response)
    return per_turn(response, [value("|".join(said[: number + 1])) for number in range(len(said))])


@reward(scope=last_turn)
def answer(response: Response) -> float:
    return value("answer" + response.text)


@reward(determined=turn_end(1))
def opening(response: Response) -> float:
    return value("opening" + words(response)[0])


REWARDS = RewardSet(tuple(NamedReward(each.name, each) for each in (each_turn, answer, opening)))


def tokens_of(episode: tuple[str, ...]) -> list[str]:
    return [token for turn in episode for token in turn]


def rollout_of(episode: tuple[str, ...]) -> Rollout:
    """Return the rollout as an episode makes it: the end-of-text between two turns holds the line break."""
    text = ""
    spans: list[tuple[int, int]] = []
    observations: list[Observation] = []
    for number, turn in enumerate(episode):
        if number:
            observations.append(Observation(len(spans), len(text), (7,), "seen"))
            if spans[-1][0] == spans[-1][1]:
                spans[-1] = (len(text), len(text) + 1)
            text += "\n"
        for token in turn:
            spans.append((len(text), len(text) + (token != END)))
            text += token if token != END else ""
    ids = tuple(map(ord, tokens_of(episode)))
    return Rollout(ids, (0.0,) * len(ids), text, tuple(spans), "stop", 0, tuple(observations))


@pytest.fixture(scope="module")
def logits() -> dict[str, torch.Tensor]:
    """Return, for every prefix of tokens, logits over the tokens that may follow it."""
    torch.manual_seed(1)
    prefixes = sorted({"".join(tokens_of(e)[:t]) for e in EPISODES for t in range(len(tokens_of(e)))})
    return {prefix: torch.randn(3, dtype=torch.float64).requires_grad_() for prefix in prefixes}


def token_logprobs(logits: dict[str, torch.Tensor], episode: tuple[str, ...]) -> list[torch.Tensor]:
    tokens = tokens_of(episode)
    found = []
    for t, token in enumerate(tokens):
        prefix = "".join(tokens[:t])
        follow = sorted(
            {tokens_of(e)[t] for e in EPISODES if "".join(tokens_of(e)[:t]) == prefix and len(tokens_of(e)) > t}
        )
        found.append(logits[prefix][: len(follow)].log_softmax(-1)[follow.index(token)])
    return found


def gradient(logits: dict[str, torch.Tensor], objective: torch.Tensor) -> np.ndarray:
    parts = torch.autograd.grad(objective, list(logits.values()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts]).numpy()


@pytest.mark.parametrize("credit", ["causal", "whole"])
def test_the_expected_update_over_turns_is_the_exact_gradient(credit: Any, logits: dict[str, torch.Tensor]) -> None:
    logprobs = {episode: token_logprobs(logits, episode) for episode in EPISODES}
    chance = {episode: torch.stack(logprobs[episode]).sum().exp() for episode in EPISODES}
    assert torch.stack(list(chance.values())).sum().item() == pytest.approx(1.0, abs=1e-12)
    whole = RolloutGroup(Prompt("p", "?"), tuple(map(rollout_of, EPISODES)))
    [scored] = REWARDS.score([whole])
    assert {len(each.observations) for each in whole.rollouts} == {0, 1}
    totals = [
        sum(weight * sum(c.score for c in credits) for weight, credits in zip(WEIGHTS, credits_K, strict=True))
        for credits_K in scored.credits_GK
    ]
    exact = gradient(logits, torch.stack([chance[e] * total for e, total in zip(EPISODES, totals, strict=True)]).sum())
    rule = Rule("per_reward", credit=credit, baseline="leave_one_out", scale="none")
    taught = {episode: np.zeros(len(logprobs[episode])) for episode in EPISODES}
    for pair in itertools.product(EPISODES, repeat=2):
        group = RolloutGroup(Prompt("p", "?"), tuple(map(rollout_of, pair)))
        [terms_G] = credit_terms(REWARDS.score([group]), rule, WEIGHTS)
        share = chance[pair[0]].item() * chance[pair[1]].item() / 2
        for episode, (_, advantages_KT) in zip(pair, terms_G, strict=True):
            taught[episode] += share * (np.asarray(WEIGHTS) @ advantages_KT)
    parts = [a * lp for e in EPISODES for a, lp in zip(taught[e], logprobs[e], strict=True)]
    update = gradient(logits, torch.stack(parts).sum())
    np.testing.assert_allclose(update, exact, rtol=0, atol=1e-12)
    assert np.linalg.norm(exact) > 0.1
