"""What flows through sampling: prompts in, groups of rollouts out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class ImageReference(Protocol):
    """An image that is read on demand. name: for messages."""

    @property
    def name(self) -> str: ...

    def read(self) -> bytes:
        """Return its compressed bytes."""
        ...


ImageSource = str | bytes | ImageReference
"""One page image: a path, its compressed bytes (png, jpeg, ...), or a reference to them. Never a pixel tensor."""

FinishReason = Literal["stop", "length", "turns"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question over page images.

    id: unique and stable in its data set; it seeds sampling.
    text: the user message with one `<image>` at the position of each image, and one `<video>` at that of each video.
    images: one per `<image>` in `text` and, in the place of each `<video>`, its frames.
    truth: gold columns of the row, passed unchanged to the rewards.
    question: the bare question, for judges and reports.
    system: the system message; "" leaves it to the chat template.
    history: earlier turns, (user message, the model's answer); their images come first in `images`.
    num_tokens: length of the rendered prompt, where its row was checked; 0 is not known yet.
    videos: of each `<video>` in `text`, the seconds from the video's start at which its frames were taken.
    """

    id: str
    text: str
    images: tuple[ImageSource, ...] = ()
    truth: Mapping[str, Any] = field(default_factory=dict)
    question: str = ""
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()
    num_tokens: int = field(default=0, compare=False)
    videos: tuple[tuple[float, ...], ...] = ()

    @property
    def num_pages(self) -> int:
        """Images that are no frames of a video."""
        return len(self.images) - sum(map(len, self.videos))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a group is sampled.

    group_size: rollouts per prompt.
    temperature: 0 is greedy.
    top_p, top_k: 1.0 and 0 are off.
    max_tokens: response limit, end-of-text included.
    seed: fixes, with the prompt's id and the rollout's index, every random draw of the embedded engine.
    """

    group_size: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 1024
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Observation:
    """What an environment wrote behind one turn of the policy. The policy reads it; nothing teaches it.

    at, at_char: sampled tokens, and characters of `Rollout.text`, before it.
    token_ids_S: what the model reads, marks of turns included, each image expanded to its vision tokens; empty where
        the episode ended here.
    text: what the environment wrote, with one `<image>` at the position of each image.
    images: one per `<image>` in `text`.
    facts: what the environment notes about the turn, for rewards and reports; JSON values.
    fault: why it could not do what the turn asked for; "" where it did.
    """

    at: int
    at_char: int
    token_ids_S: Sequence[int] = ()
    text: str = ""
    images: tuple[ImageSource, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response of T tokens; with an environment, those of all its turns.

    token_ids_T: sampled ids, the end-of-text token included when it was sampled.
    logprobs_T: natural log-probabilities under log_softmax((logits + ban) / temperature); greedy: T = 1.
    text: decoded characters, without end-of-text; turns are separated by a line break.
    token_spans_T: (start, end) characters of `text` of which the token holds any byte; (n, n) for end-of-text. The
        end-of-text between two turns holds the line break.
    finish_reason: "stop" at end-of-text or where the environment ended the episode, "length" at the limit of tokens,
        "turns" at the limit of turns.
    weights_version: version of the weights that sampled it, the oldest of several.
    observations: what an environment wrote behind each turn, in order.
    experts_RLk: (R - 1, layers, k) uint8 or uint16, the experts that all tokens but the last took in each decoder
        layer, those of observations in their places; None: not recorded.
    version_ends: where weights changed in the middle, (version, tokens sampled by its end) in order; else empty.
    """

    token_ids_T: Sequence[int]
    logprobs_T: Sequence[float]
    text: str
    token_spans_T: Sequence[tuple[int, int]]
    finish_reason: FinishReason
    weights_version: int
    observations: tuple[Observation, ...] = ()
    experts_RLk: np.ndarray | None = field(default=None, compare=False, repr=False)
    version_ends: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The G rollouts of one prompt.

    num_prompt_tokens: length of the rendered prompt, every vision token counted.
    error: why the prompt could not be sampled (then `rollouts` is empty); None when it was.
    prompt_experts_TLk: (prompt tokens, layers, k), as `Rollout.experts_RLk`.
    """

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    num_prompt_tokens: int = 0
    error: str | None = None
    prompt_experts_TLk: np.ndarray | None = field(default=None, compare=False, repr=False)
