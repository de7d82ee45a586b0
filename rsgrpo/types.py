"""The typed stages between sampling and the optimiser step. One stage adds, none mutates.

Axes: P prompts per step, G rollouts per group, K loss terms (one per reward in `per_reward`), T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rewards.api import Credit
from rollout.types import Observation, Prompt, RolloutGroup
from rsgrpo.errors import RsgrpoError as RsgrpoError

if TYPE_CHECKING:  # a command line is checked before torch is loaded
    import torch


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group with what every reward said of every rollout.

    scores_GK: one number per rollout and reward (mean over keys if it gave several); None: did not apply.
    credits_GK: the credits behind each score; empty where the reward did not apply. A plain score is one credit with
        key "" on the reward's scope; its span is None where a marker is missing and the policy is `void`.
    reward_names_K: order of the K axis. missed_GK: True where a scope marker was missing, whatever the policy.
    monitors_GM: one number (or None) per rollout and monitor, in the order of `monitor_names_M`.
    num_errors_K: exceptions of each reward that were skipped on request.
    """

    group: RolloutGroup
    reward_names_K: tuple[str, ...]
    scores_GK: Sequence[Sequence[float | None]]
    credits_GK: Sequence[Sequence[tuple[Credit, ...]]]
    missed_GK: Sequence[Sequence[bool]]
    monitor_names_M: tuple[str, ...] = ()
    monitors_GM: Sequence[Sequence[float | None]] = ()
    num_errors_K: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One response as the learner sees it.

    token_ids_T: (T,) int64, the policy's own tokens.
    scope_KT: (K, T) bool, the tokens that loss term k may teach.
    advantages_KT: (K, T) float32, 0 outside the scope.
    rollout_logprobs_T: (T,) float32 as the engine computed them; None in supervised training.
    ref_logprobs_T: (T,) float32 under the reference model or the teacher; None where the loss has no term for it.
    observations: what it read between its turns: tokens and images of the row that nothing teaches.
    """

    token_ids_T: np.ndarray
    scope_KT: np.ndarray
    advantages_KT: np.ndarray
    rollout_logprobs_T: np.ndarray | None = None
    ref_logprobs_T: np.ndarray | None = None
    observations: tuple[Observation, ...] = ()
    experts_RLk: np.ndarray | None = None  # as `Rollout` has them; None lets the policy choose


@dataclass(frozen=True, slots=True)
class TrainGroup:
    """One prompt and the responses that share it: the unit that packing never takes apart without need."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    prompt_experts_TLk: np.ndarray | None = None  # as `RolloutGroup` has them


@dataclass(frozen=True, slots=True)
class PrefixLayout:
    """Where prompts and responses lie in a padding-free row: for each group its prompt, then its responses.

    prompt_lengths, response_lengths: tokens of each group's prompt in this row, and of each of its responses.
    whole_lengths: tokens of each whole prompt where several ranks share the row; empty where it is all here.
    """

    prompt_lengths: tuple[int, ...]
    response_lengths: tuple[tuple[int, ...], ...]
    whole_lengths: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Whole groups in one padding-free row of T tokens, and what the loss needs of their N response tokens.

    layout: where prompts and responses lie in the row.
    token_ids_T: (T,) int64. position_ids_3T: (3, T) int64, time, height, width of M-RoPE.
    features: (image tokens of the row, F) of a frozen tower; None without images or with a trained tower.
    pixel_values, image_grid_thw: of all images in row order for a trained tower; else None.
    head_index_N: (N,) int64, the row position whose hidden state predicts each response token.
    targets_N: (N,) int64. sample_index_N: (N,) int64, which response of the micro-batch a token belongs to.
    scope_KN: (K, N) bool. advantages_KN: (K, N) float32.
    rollout_logprobs_N, ref_logprobs_N, old_logprobs_N: (N,) float32 or None.
    """

    layout: PrefixLayout
    token_ids_T: torch.Tensor
    position_ids_3T: torch.Tensor
    features: torch.Tensor | None
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    head_index_N: torch.Tensor
    targets_N: torch.Tensor
    sample_index_N: torch.Tensor
    scope_KN: torch.Tensor
    advantages_KN: torch.Tensor
    rollout_logprobs_N: torch.Tensor | None = None
    ref_logprobs_N: torch.Tensor | None = None
    old_logprobs_N: torch.Tensor | None = None
    experts_TLk: torch.Tensor | None = None  # (T, layers, k) int16; -1 lets the policy choose, None everywhere
    taken_F: torch.Tensor | None = None  # bool, which features of the images are the row's image tokens; None: all


class TokenScores(NamedTuple):
    """What the head says of the N response tokens of a micro-batch, all float32 but `is_top_N`.

    logprobs_N: of the tokens themselves. entropy_N: of the distributions that they were drawn from, in nats.
    top_probs_N: probability of the most probable token. is_top_N: (N,) bool, whether it is the response's own.
    """

    logprobs_N: torch.Tensor
    entropy_N: torch.Tensor
    top_probs_N: torch.Tensor
    is_top_N: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StepTotals:
    """The weights and denominators of one optimiser step's loss: the same on every rank and in every micro-batch.

    loss_weights_K: (K,) float32. response_tokens: all response tokens of the step.
    scope_tokens_K: (K,) float32, scope-k tokens in the whole step.
    active_K: (K,) bool, whether some in-scope token of term k has a non-zero advantage.
    """

    loss_weights_K: torch.Tensor
    scope_tokens_K: torch.Tensor
    active_K: torch.Tensor
    response_tokens: int


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Loss of one micro-batch: a share of the step's loss, so that shares of micro-batches and ranks add up.

    loss: scalar with gradient. metrics: detached scalars; means are divided by the step's totals, so they add up.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
