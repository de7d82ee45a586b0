"""Compare the shared-prefix forward with transformers' own, once at the start of a run and on the real weights.

Blank images are run once too: a model that does not look at its images is caught before it is trained.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch

from rollout.inputs.processor import PromptInputs
from rsgrpo.learning.packing import build_micro_batch
from rsgrpo.learning.passes import move
from rsgrpo.learning.policy import PlainRow, Policy
from rsgrpo.learning.prompt_store import PromptEncoder, PromptStore
from rsgrpo.types import MicroBatch, RsgrpoError, Sample, TrainGroup

logger = logging.getLogger(__name__)

# Largest mean |difference| of logprobs: float32 forwards differ by rounding, bfloat16 ones by its noise.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
_NUM_SAMPLES = 2


def check_policy(
    policy: Policy, prompts: PromptStore, encoder: PromptEncoder, groups: Sequence[TrainGroup], device: torch.device
) -> None:
    """Compare the shared-prefix log-probabilities of the smallest group with the plain forward's. Collective.

    Raises:
        RsgrpoError: they differ, or blank images change nothing.
    """
    lengths = prompts.count_tokens([group.prompt for group in groups])
    has_images = any(group.prompt.images for group in groups)
    candidates = [index for index, group in enumerate(groups) if group.prompt.images or not has_images]
    group = groups[min(candidates, key=lambda index: (lengths[index], index))]
    samples = group.samples[:_NUM_SAMPLES]
    batch = move(build_micro_batch([(prompts.encode(group.prompt), samples)]), device)
    inputs = encoder.encode(group.prompt)
    policy.eval()
    with torch.no_grad():
        shared_N = policy(batch, 1.0, False).logprobs_N
        plain = [policy(_plain_row(inputs, sample, device), 1.0, False) for sample in samples]
        plain_N = torch.cat([scores.logprobs_N for scores in plain])
        difference = (shared_N - plain_N).abs()
        tolerance = _TOLERANCE[policy.compute_dtype]
        logger.info("self-check: shared-prefix logprobs differ by %.2g on average", difference.mean().item())
        if not difference.mean() <= tolerance:
            raise RsgrpoError(
                f"learner.self_check: on prompt {group.prompt.id} the shared-prefix logprobs differ from the plain "
                f"forward's by {difference.mean():.3g} on average and {difference.max():.3g} at most (limit "
                f"{tolerance:g} on average): this model does not work with torch {torch.__version__} and the attention "
                "kernel. Try learner.attention=sdpa"
            )
        if has_images and torch.equal(shared_N, policy(_blank(batch), 1.0, False).logprobs_N):
            raise RsgrpoError(
                f"learner.self_check: blank images give exactly the same logprobs on prompt {group.prompt.id}: the "
                "model does not see its images. Check the model's folder and its processor"
            )


def _plain_row(inputs: PromptInputs, sample: Sample, device: torch.device) -> PlainRow:
    tokens = [*inputs.token_ids_T, *sample.token_ids_T.tolist()]
    return PlainRow(
        token_ids_T=torch.tensor(tokens, device=device),
        num_response_tokens=len(sample.token_ids_T),
        pixel_values=None if inputs.pixel_values is None else inputs.pixel_values.to(device),
        image_grid_thw=None if inputs.image_grid_thw is None else inputs.image_grid_thw.to(device),
    )


def _blank(batch: MicroBatch) -> MicroBatch:
    features = None if batch.features is None else torch.zeros_like(batch.features)
    pixels = None if batch.pixel_values is None else torch.zeros_like(batch.pixel_values)
    return dataclasses.replace(batch, features=features, pixel_values=pixels)
